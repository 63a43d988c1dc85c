import pytest
import references
import torch
from largest_tensor import LargestTensor
from torch.nn import functional

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, cross_entropy, row_losses

VOCABULARY, HIDDEN = 97, 6
CODES = {
    "sign": references.random_sign_codes(VOCABULARY, 13),
    "index": references.random_index_codes(VOCABULARY, 3, 5),
    "one codebook": references.random_index_codes(VOCABULARY, 1, 11),
    "two codebooks": references.random_index_codes(VOCABULARY, 2, 7),
    "fine": references.random_sign_codes(VOCABULARY, 13),
}
FINE = {
    "fine_ids": torch.tensor([96, 0, 41, 5, 60], dtype=torch.int32),
    "fine_codes": references.random_sign_codes(5, 13, seed=1),
}
each_kind = pytest.mark.parametrize("kind", CODES)
IGNORED = -7


def make_problem(kind, dtype=torch.float64, rows=9, seed=0):
    """Hidden states, labels of which two are ignored, and the tensors of a head."""
    torch.manual_seed(seed)
    shape = {
        "sign": (13,),
        "fine": (13,),
        "index": (3, 5),
        "one codebook": (1, 11),
        "two codebooks": (2, 7),
    }[kind]
    codes = CODES[kind]
    if kind == "one codebook":
        codes = torch.where(codes == 4, 5, codes).to(torch.uint8)  # codeword 4 is of no token
    labels = torch.randint(0, VOCABULARY, (rows,))
    labels[:2] = IGNORED
    head = {
        "codebook": torch.randn(*shape, HIDDEN, dtype=dtype, requires_grad=True),
        "codebook_bias": torch.randn(*shape, dtype=dtype, requires_grad=True),
        "codes": codes,
        "code_type": "sign" if kind in ("sign", "fine") else "index",
        **(FINE if kind == "fine" else {}),
        "ignore_index": IGNORED,
    }
    return torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True), labels, head


def dense_logits(hidden, head, scale, cap):
    """The written-out logits in float64, and the tensors that they are differentiable in."""
    exact = {k: head[k].detach().double() for k in ("codebook", "codebook_bias")}
    for tensor in exact.values():
        tensor.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    scores = torch.einsum("nd,...d->n...", exact_hidden, exact["codebook"]) + exact["codebook_bias"]
    z = scale * references.logits(scores, **codes_of(head))
    z = z if cap is None else cap * torch.tanh(z / cap)
    return z, (exact_hidden, *exact.values())


def dense_loss(hidden, labels, head, *, scale=1.0, cap=None, z_loss=0.0, **options):
    """The loss of those logits, and what it is differentiable in."""
    z, exact = dense_logits(hidden, head, scale, cap)
    loss = functional.cross_entropy(z, labels, ignore_index=IGNORED, **options)
    if z_loss:
        squares = z.logsumexp(1).square().masked_fill(labels == IGNORED, 0)
        reduction = options.get("reduction", "mean")
        count = (labels != IGNORED).sum()
        loss = loss + z_loss * {"none": squares, "sum": squares.sum()}.get(
            reduction, squares.sum() / count
        )
    return loss, exact


def codes_of(head):
    """The codes, as the operations take them."""
    names = ("codes", "code_type", "fine_ids", "fine_codes")
    return {name: head.get(name) for name in names}


def chunked_loss(hidden, labels, head, *, scale=1.0, cap=None, **options):
    return ops.linear_cross_entropy(
        hidden, labels, **head, logit_scale=scale, final_logit_softcapping=cap, **options
    )


def gradients(hidden, head):
    return hidden.grad, head["codebook"].grad, head["codebook_bias"].grad


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("smoothing", "scale", "cap", "z_loss", "chunk_size"),
    [
        (0.0, 1.0, None, 0.0, None),
        (0.1, 1.0, None, 0.0, 2),
        (0.0, 0.3, 2.0, 0.0, 1),
        (0.0, 1.0, None, 0.1, 3),
        (1.0, 1.7, 5.0, 0.01, 100),
    ],
)
def test_loss_and_gradients_are_those_of_the_dense_logits(
    kind, reduction, smoothing, scale, cap, z_loss, chunk_size
):
    hidden, labels, head = make_problem(kind)
    options = {"reduction": reduction, "label_smoothing": smoothing, "scale": scale, "cap": cap}
    options["z_loss"] = z_loss
    want, exact = dense_loss(hidden, labels, head, **options)
    got = chunked_loss(hidden, labels, head, chunk_size=chunk_size, **options)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, dtype=torch.float64)  # a gradient of its own for every row
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, theirs in zip(gradients(hidden, head), exact, strict=True):
        torch.testing.assert_close(mine, theirs.grad)


@each_kind
@pytest.mark.parametrize("number", [20, torch.tensor(20)])
def test_the_number_of_rows_may_be_that_of_several_batches(kind, number):
    hidden, labels, head = make_problem(kind)
    got = chunked_loss(hidden, labels, head, num_items_in_batch=number)
    torch.testing.assert_close(got, chunked_loss(hidden, labels, head, reduction="sum") / 20)


@each_kind
def test_gradcheck(kind):
    hidden, labels, head = make_problem(kind, rows=4)

    def function(hidden, codebook, codebook_bias):
        tensors = {"codebook": codebook, "codebook_bias": codebook_bias}
        options = {"scale": 0.7, "cap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1, "chunk_size": 3}
        return chunked_loss(hidden, labels, head | tensors, **options)

    inputs = (hidden, head["codebook"], head["codebook_bias"])
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(kind, dtype):
    hidden, labels, head = make_problem(kind, dtype)
    got = chunked_loss(hidden, labels, head)
    got.backward()
    want, exact = dense_loss(hidden, labels, head)
    want.backward()
    assert got.dtype == torch.float32
    assert gradients(hidden, head)[1].dtype == dtype
    # Scores of a few units are rounded to the type; tables of 16 bits have 0.2% of them.
    tolerance = max(4 * torch.finfo(dtype).eps, 2e-3)
    torch.testing.assert_close(got.double(), want.detach(), atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(gradients(hidden, head), exact, strict=True):
        scale = theirs.grad.abs().max()
        error = (mine.double() - theirs.grad).abs().max() / scale
        assert error < 5 * tolerance


@pytest.mark.parametrize("fast", [True, False])
def test_gradients_of_bfloat16_scores_are_as_fine_as_these(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    scores = references.random_scores(33, 40).bfloat16()
    codes, labels = references.random_sign_codes(700, 40), torch.arange(33)
    nothing = (None, None)
    _, gradient = cross_entropy.compute_cross_entropy(
        scores, codes, "sign", *nothing, labels, IGNORED, 0.0, 1.0, None, 0.0, 8, True
    )
    exact = scores.double().requires_grad_()
    logits = references.logits(exact, codes, "sign")
    functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert gradient.dtype == torch.bfloat16
    error = (gradient.double() - exact.grad).norm() / exact.grad.norm()
    assert error < torch.finfo(torch.bfloat16).eps


@each_kind
def test_autocast_rounds_the_scores_and_nothing_else(kind, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "eager")  # exact to float32
    hidden, labels, head = make_problem(kind, torch.float32)
    with torch.no_grad():
        head["codebook_bias"] += 10
    options = {"reduction": "none", "label_smoothing": 0.3}
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_loss(hidden, labels, head, **options)
        inputs = hidden, head["codebook"].flatten(0, -2), head["codebook_bias"].flatten()
        rounded = functional.linear(*inputs).detach()
    assert got.dtype == torch.float32
    scores = rounded.double().view(-1, *head["codebook_bias"].shape)
    z = references.logits(scores, **codes_of(head))
    want = functional.cross_entropy(z, labels, ignore_index=IGNORED, **options)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    got.sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(hidden, head))


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_that_counts(kind, reduction, rows):
    hidden, _, head = make_problem(kind, rows=max(rows, 2))
    hidden = hidden.detach()[:rows].requires_grad_()
    labels = torch.full((rows,), IGNORED)
    want, exact = dense_loss(hidden, labels, head, reduction=reduction)
    got = chunked_loss(hidden, labels, head, reduction=reduction)
    torch.testing.assert_close(got, want, equal_nan=True)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(hidden.grad, exact[0].grad, equal_nan=True)
    assert not bool(hidden.grad.isnan().any())


@each_kind
def test_ignored_rows_are_not_computed(kind, monkeypatch):
    hidden, labels, head = make_problem(kind, rows=9)
    seen = []
    original = cross_entropy._losses_and_slope

    def record(logits, *arguments):
        seen.append(len(logits))
        return original(logits, *arguments)

    monkeypatch.setattr(cross_entropy, "_losses_and_slope", record)
    chunked_loss(hidden, labels, head, chunk_size=3, cap=5.0)
    assert seen == [3, 3, 1]


@each_kind
def test_evaluation_keeps_no_gradient(kind):
    hidden, labels, head = make_problem(kind)
    scores = torch.randn(9, *head["codebook_bias"].shape)
    arguments = (scores, *codes_of(head).values(), labels, IGNORED, 0.0, 1.0, None, 0.0, None)
    losses, gradient = cross_entropy.compute_cross_entropy(*arguments, False)
    assert gradient.numel() == 0
    again, gradient = cross_entropy.compute_cross_entropy(*arguments, True)
    assert gradient.shape == scores.shape
    assert torch.equal(losses, again)
    with torch.no_grad():
        assert not chunked_loss(hidden, labels, head).requires_grad


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("kind", ["sign", "index"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind, cap):
    vocabulary, rows, chunk = 3000, 64, 4
    if kind == "sign":
        scores, codes = torch.randn(rows, 40), references.random_sign_codes(vocabulary, 40)
    else:
        scores, codes = torch.randn(rows, 4, 9), references.random_index_codes(vocabulary, 4, 9)
    labels = torch.randint(0, vocabulary, (rows,))
    with LargestTensor() as largest:
        cross_entropy.compute_cross_entropy(
            scores, codes, kind, None, None, labels, IGNORED, 0.1, 0.5, cap, 0.01, chunk, True
        )
    # The signs of a piece of the vocabulary are the one thing beside chunks of logits.
    assert largest.elements <= max(chunk * vocabulary, 40 * vocabulary)
    assert largest.elements < rows * vocabulary


def test_one_codebook_needs_no_logits_at_all():
    vocabulary, rows = 3000, 64
    codes = references.random_index_codes(vocabulary, 1, 9)
    labels = torch.randint(0, vocabulary, (rows,))
    scores, options = torch.randn(rows, 1, 9), (IGNORED, 0.1, 0.5, 3.0, 0.01, None, True)
    with LargestTensor() as largest:
        cross_entropy.compute_cross_entropy(scores, codes, "index", None, None, labels, *options)
    assert largest.elements == vocabulary  # the codes themselves, when tokens are counted


def test_large_logits_do_not_overflow():
    hidden, labels, head = make_problem("sign", torch.float32)
    got = chunked_loss(1e4 * hidden.detach(), labels, head)
    want, _ = dense_loss(1e4 * hidden, labels, head)
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-2, atol=0)


def test_twice_differentiated_is_refused():
    hidden, labels, head = make_problem("sign")
    loss = chunked_loss(hidden, labels, head)
    with pytest.raises(RuntimeError, match="can be differentiated once, .* use `expand`"):
        torch.autograd.grad(loss, head["codebook"], create_graph=True)


def test_the_graph_can_be_used_again():
    hidden, labels, head = make_problem("sign")
    loss = chunked_loss(hidden, labels, head)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_kind
def test_pytorch_accepts_the_registration(kind):
    _, labels, head = make_problem(kind)
    scores = torch.randn(9, *head["codebook_bias"].shape, dtype=torch.float64, requires_grad=True)
    arguments = (scores, *codes_of(head).values(), labels, IGNORED)
    options = (0.1, 0.7, 30.0, 0.01, 5, True)
    torch.library.opcheck(torch.ops.vqlogits.cross_entropy.default, (*arguments, *options))


@pytest.mark.parametrize("kind", ["sign", "one codebook"])
def test_compilation_without_graph_breaks(kind):
    hidden, labels, head = make_problem(kind, torch.float32)
    compiled = torch.compile(chunked_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (chunked_loss, compiled):
        loss = function(hidden, labels, head, label_smoothing=0.1, cap=5.0)
        results.append((loss, *torch.autograd.grad(loss, [hidden, head["codebook"]])))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


@each_kind
@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_labels_out_of_range_are_refused(kind, wrong):
    hidden, labels, head = make_problem(kind)
    labels[3] = wrong
    with pytest.raises(IndexError, match=f"`labels` holds {wrong}; with 97 tokens .* -7"):
        chunked_loss(hidden, labels, head)


def test_codes_out_of_range_are_refused():
    hidden, labels, head = make_problem("one codebook")
    head["codes"] = head["codes"].clone()
    head["codes"][5] = 11
    with pytest.raises(IndexError, match="`codes` holds 11, but the scores have 11 codewords"):
        chunked_loss(hidden, labels, head)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "`reduction` is 'max'; it must be mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, "`label_smoothing` is 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, "`label_smoothing` is nan"),
        ({"final_logit_softcapping": 0.0}, ValueError, "`final_logit_softcapping` is 0.0"),
        ({"z_loss": -0.1}, ValueError, "`z_loss` is -0.1; it must be a finite weight"),
        ({"z_loss": float("nan")}, ValueError, "`z_loss` is nan"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "but `reduction` is 'sum'"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` is 0; it must be at least one row"),
        ({"codebook": torch.zeros(13, 5)}, ValueError, r"`codebook` has shape \(13, 5\)"),
        ({"codebook_bias": torch.zeros(12)}, ValueError, r"it must be \(12, 6\)"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, ValueError, "flatten them to"),
        ({"labels": torch.zeros(9)}, TypeError, "`labels` is torch.float32; .* int64"),
        ({"hidden": torch.zeros(3, 3, 6)}, ValueError, r"`hidden` has shape \(3, 3, 6\)"),
        ({"code_type": "signs"}, ValueError, "`code_type` is 'signs'"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    hidden, labels, head = make_problem("sign", torch.float32)
    arguments = {"hidden": hidden, "labels": labels, **head} | change
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(arguments.pop("hidden"), arguments.pop("labels"), **arguments)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_logits_of_a_chunk_are_made_some_rows_at_a_time(
    kind, dtype, with_gradient, monkeypatch
):
    _, labels, head = make_problem(kind, rows=11)
    scores = torch.randn(11, *head["codebook_bias"].shape).to(dtype)
    arguments = (scores, *codes_of(head).values(), labels, IGNORED, 0.1, 0.7, 3.0, 0.1)
    want = cross_entropy.compute_cross_entropy(*arguments, None, with_gradient)
    monkeypatch.setattr(row_losses, "BLOCK_BYTES", 1)  # 4 rows
    made, expand = [], row_losses.compute_expand

    def watched(part, *others):
        made.append(len(part))
        return expand(part, *others)

    monkeypatch.setattr(row_losses, "compute_expand", watched)
    got = cross_entropy.compute_cross_entropy(*arguments, 9, with_gradient)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    rows = 0 if kind == "one codebook" else int((labels != IGNORED).sum())
    assert sum(made) == rows
    assert max(made, default=0) <= 4


def test_the_default_chunk_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(row_losses, "CHUNK_BYTES", 2 * 4 * VOCABULARY)
    _, labels, head = make_problem("index", torch.float32)
    scores = torch.randn(9, 3, 5)
    ops.expand(scores, head["codes"], code_type="index")  # the kernel keeps its form of the codes
    with LargestTensor() as largest:
        cross_entropy.compute_cross_entropy(
            scores, *codes_of(head).values(), labels, IGNORED, 0.0, 1.0, None, 0.0, None, False
        )
    assert largest.elements < 4 * VOCABULARY
