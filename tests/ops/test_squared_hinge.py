import pytest
import references
import torch
from largest_tensor import LargestTensor
from test_cross_entropy import (
    IGNORED,
    VOCABULARY,
    codes_of,
    dense_logits,
    each_kind,
    gradients,
    make_problem,
)

from hf_vqlogits import ops
from hf_vqlogits.gru_svm.squared_hinge import squared_hinge as dense_squared_hinge
from hf_vqlogits.ops import squared_hinge


def dense_loss(hidden, labels, head, *, scale=1.0, cap=None, reduction="mean"):
    """The loss of the written-out logits in float64, and what it is differentiable in."""
    z, exact = dense_logits(hidden, head, scale, cap)
    signs = torch.where(labels[:, None] == torch.arange(VOCABULARY), 1.0, -1.0)
    losses = torch.clamp(1 - signs * z, min=0).square().sum(1).masked_fill(labels == IGNORED, 0)
    count = (labels != IGNORED).sum()
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / count}[reduction]
    return loss, exact


def chunked_loss(hidden, labels, head, *, scale=1.0, cap=None, **options):
    return ops.linear_squared_hinge(
        hidden, labels, **head, logit_scale=scale, final_logit_softcapping=cap, **options
    )


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("scale", "cap", "chunk_size"),
    [(1.0, None, None), (0.3, None, 2), (1.0, 2.0, 1), (1.7, 5.0, 9)],
)
def test_loss_and_gradients_are_those_of_the_dense_logits(kind, reduction, scale, cap, chunk_size):
    hidden, labels, head = make_problem(kind)
    options = {"reduction": reduction, "scale": scale, "cap": cap}
    want, exact = dense_loss(hidden, labels, head, **options)
    got = chunked_loss(hidden, labels, head, chunk_size=chunk_size, **options)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, dtype=torch.float64)  # a gradient of its own for every row
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, theirs in zip(gradients(hidden, head), exact, strict=True):
        torch.testing.assert_close(mine, theirs.grad)


@each_kind
def test_it_is_the_loss_of_the_dense_layer(kind):
    hidden, labels, head = make_problem(kind)
    z, _ = dense_logits(hidden, head, 1.0, None)
    want = dense_squared_hinge(z, labels, ignore_index=IGNORED)
    torch.testing.assert_close(chunked_loss(hidden, labels, head, reduction="sum"), want)


@each_kind
def test_gradcheck(kind):
    hidden, labels, head = make_problem(kind, rows=4)

    def function(hidden, codebook, codebook_bias):
        tensors = {"codebook": codebook, "codebook_bias": codebook_bias}
        return chunked_loss(hidden, labels, head | tensors, scale=0.7, cap=3.0, chunk_size=3)

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
    torch.testing.assert_close(got.double(), want.detach(), atol=0, rtol=2 * tolerance)
    for mine, theirs in zip(gradients(hidden, head), exact, strict=True):
        error = (mine.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 5 * tolerance


@each_kind
def test_logits_of_zero_miss_every_margin_by_one(kind):
    hidden, labels, head = make_problem(kind)
    with torch.no_grad():
        head["codebook"].zero_()
        head["codebook_bias"].zero_()
    got = chunked_loss(hidden, labels, head, reduction="none")
    assert got.tolist() == [0, 0, *[VOCABULARY] * 7]


@each_kind
def test_no_row_that_counts(kind):
    hidden, labels, head = make_problem(kind)
    got = chunked_loss(hidden, torch.full_like(labels, IGNORED), head)
    got.backward()
    assert bool(got.isnan())
    assert not bool(hidden.grad.any())
    empty = chunked_loss(hidden[:0], labels[:0], head, reduction="none")
    assert empty.shape == (0,)


@each_kind
def test_the_number_of_rows_may_be_that_of_several_batches(kind):
    hidden, labels, head = make_problem(kind)
    total = chunked_loss(hidden, labels, head, reduction="sum")
    for number in (20, torch.tensor(20)):
        got = chunked_loss(hidden, labels, head, num_items_in_batch=number)
        torch.testing.assert_close(got, total / 20)


@each_kind
def test_evaluation_keeps_no_gradient(kind):
    hidden, labels, head = make_problem(kind)
    scores = torch.randn(9, *head["codebook_bias"].shape)
    arguments = (scores, *codes_of(head).values(), labels, IGNORED, 0.7, 3.0, None)
    losses, gradient = squared_hinge.compute_squared_hinge(*arguments, False)
    assert gradient.numel() == 0
    again, gradient = squared_hinge.compute_squared_hinge(*arguments, True)
    assert gradient.shape == scores.shape
    assert torch.equal(losses, again)
    with torch.no_grad():
        assert not chunked_loss(hidden, labels, head).requires_grad


@pytest.mark.parametrize("cap", [None, 3.0])
def test_no_tensor_is_larger_than_a_chunk_of_logits(cap):
    vocabulary, rows, chunk = 3000, 64, 40
    scores, codes = torch.randn(rows, 40), references.random_sign_codes(vocabulary, 40)
    labels = torch.randint(0, vocabulary, (rows,))
    with LargestTensor() as largest:
        squared_hinge.compute_squared_hinge(
            scores, codes, "sign", None, None, labels, IGNORED, 0.5, cap, chunk, True
        )
    assert largest.elements <= chunk * vocabulary


def test_one_codebook_needs_no_logits_at_all():
    vocabulary, rows = 3000, 64
    codes = references.random_index_codes(vocabulary, 1, 9)
    labels, scores = torch.randint(0, vocabulary, (rows,)), torch.randn(rows, 1, 9)
    with LargestTensor() as largest:
        squared_hinge.compute_squared_hinge(
            scores, codes, "index", None, None, labels, IGNORED, 0.5, 3.0, None, True
        )
    assert largest.elements == vocabulary  # the codes themselves, when tokens are counted


def test_twice_differentiated_is_refused():
    hidden, labels, head = make_problem("sign")
    loss = chunked_loss(hidden, labels, head)
    with pytest.raises(RuntimeError, match="can be differentiated once, .* use `expand`"):
        torch.autograd.grad(loss, head["codebook"], create_graph=True)


@each_kind
def test_pytorch_accepts_the_registration(kind):
    _, labels, head = make_problem(kind)
    scores = torch.randn(9, *head["codebook_bias"].shape, dtype=torch.float64, requires_grad=True)
    arguments = (scores, *codes_of(head).values(), labels, IGNORED, 0.7, 30.0, 5, True)
    torch.library.opcheck(torch.ops.vqlogits.squared_hinge.default, arguments)


def test_compilation_without_graph_breaks():
    hidden, labels, head = make_problem("sign", torch.float32)
    compiled = torch.compile(chunked_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (chunked_loss, compiled):
        loss = function(hidden, labels, head, cap=5.0)
        results.append((loss, *torch.autograd.grad(loss, [hidden, head["codebook"]])))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "`reduction` is 'max'; it must be mean, sum, none"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "but `reduction` is 'sum'"),
        ({"final_logit_softcapping": 0.0}, ValueError, "`final_logit_softcapping` is 0.0"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` is 0; it must be at least one row"),
        ({"codebook": torch.zeros(13, 5)}, ValueError, r"`codebook` has shape \(13, 5\)"),
        ({"labels": torch.zeros(9)}, TypeError, "`labels` is torch.float32; .* int64"),
        ({"labels": torch.full((9,), VOCABULARY)}, IndexError, "`labels` holds 97; .* 0..96"),
        ({"code_type": "signs"}, ValueError, "`code_type` is 'signs'"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    hidden, labels, head = make_problem("sign", torch.float32)
    arguments = {"labels": labels, **head} | change
    with pytest.raises(error, match=message):
        ops.linear_squared_hinge(hidden, arguments.pop("labels"), **arguments)
