import pytest
import references
import torch
from largest_tensor import LargestTensor
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from triton_devices import STEP, each_device, on_gpu, second_codes, sum_error, to

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, triton_cross_entropy

IGNORED = -7
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def make_problem(rows, vocabulary, num_codebooks, fine=0, dtype=torch.float32):
    """Scores whose logits have a deviation of about 2, codes and labels."""
    scores = references.random_scores(rows, num_codebooks) * 2 / num_codebooks**0.5
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    return scores.to(dtype), codes, second_codes(vocabulary, fine, num_codebooks), labels


def reference(scores, codes, fine, labels, *, smoothing=0.0, scale=1.0, cap=None, z_loss=0.0):
    """Losses, their gradient in the scores, and the logits, in float64."""
    exact = scores.detach().cpu().double().requires_grad_()
    z = scale * references.logits(exact, codes.cpu(), "sign", *to("cpu", *fine))
    z = z if cap is None else cap * torch.tanh(z / cap)
    options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "none"}
    losses = functional.cross_entropy(z, labels.cpu(), **options)
    losses = losses + z_loss * z.logsumexp(1).square().masked_fill(labels.cpu() == IGNORED, 0)
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    return losses.detach(), gradient, z.detach()


def error_bounds(scores, z, fine, *, smoothing=0.0, scale=1.0, cap=None, z_loss=0.0):
    """Largest errors of the losses (N,) and of their gradients (N, 1), from the arithmetic.

    Beside the sums of scores, all is in float32, and `STEP` is two roundings.
    """
    vocabulary = z.shape[1]
    # A logit: the sum; the factor; tanh with four operations on numbers up to 1.
    logit = scale * sum_error(scores, scores.shape[1], fine).squeeze(1)
    largest = z.abs().amax(1)
    logit = logit + 2 * STEP * largest + (0 if cap is None else 8 * STEP * cap)
    # A probability, relative to itself: exp makes of an absolute error a relative one. It takes a
    # difference, rounded, of at most twice the largest logit, and is itself off by four steps.
    exponential = logit + STEP * (2 * largest + 4)
    # Its sum: 128 numbers of a tile, tile after tile, piece after piece; then a logarithm.
    tiles = -(-vocabulary // 128)
    logsumexp = exponential + STEP * (128 + tiles + 128 + 2 * (largest + 20))
    mean = logit + STEP * (128 + tiles + 128) * largest
    label = logit + STEP * largest
    loss = logsumexp + label + smoothing * mean + 4 * STEP * (2 * largest + 20)
    peak = largest + torch.tensor(float(vocabulary)).log()  # of |logsumexp|
    loss = loss + 2 * z_loss * peak * logsumexp + 4 * STEP * z_loss * peak.square()
    # d loss / d z: what all tokens have together, at most, and its error.
    whole = 2 + 2 * z_loss * peak
    slope = whole * (exponential + logsumexp + 8 * STEP) + 2 * z_loss * logsumexp
    if cap is not None:
        slope = slope + whole * (2 * logit / cap + 8 * STEP)
    # Its product with the signs: the digits that go in, and the sums.
    parts = 3 if scores.dtype == torch.float32 else 2
    depth = 32 + parts * -(-vocabulary // 16) + 128
    product = whole * (2.0 ** (1 - 8 * parts) + depth * STEP)
    return loss, (scale * (1.5 if fine else 1) * (slope + product)).unsqueeze(1)


def check(scores, codes, fine, labels, **options):
    got, gradient = triton_cross_entropy.losses_and_gradient(
        scores,
        codes,
        *fine,
        labels,
        label_smoothing=options.get("smoothing", 0.0),
        logit_scale=options.get("scale", 1.0),
        softcap=options.get("cap"),
        z_loss=options.get("z_loss", 0.0),
        with_gradient=True,
    )
    want, exact, z = reference(scores, codes, fine, labels, **options)
    loss, slope = error_bounds(scores.cpu(), z, fine[0] is not None, **options)
    assert got.dtype == torch.float32
    assert gradient.dtype == scores.dtype
    assert bool(((got.cpu().double() - want).abs() <= loss).all())
    allowed = slope + torch.finfo(scores.dtype).eps / 2 * (exact.abs() + slope)
    assert bool(((gradient.cpu().double() - exact).abs() <= allowed).all())
    return loss, slope


OPTIONS = [
    {},
    {"smoothing": 0.1},
    {"scale": 0.7, "cap": 3.0},
    {"z_loss": 0.01},
    {"smoothing": 1.0, "scale": 1.7, "cap": 5.0, "z_loss": 0.1},
]


@each_device
@each_dtype
@pytest.mark.parametrize("options", OPTIONS)
def test_options_stay_within_the_error_bounds(options, dtype, device):
    scores, codes, fine, labels = make_problem(7, 333, 31, 40, dtype)
    loss, slope = check(*to(device, scores, codes), to(device, *fine), labels.to(device), **options)
    assert loss.max() < 2e-3  # bounds that bind
    assert slope.max() < 1e-2


@each_device
@each_dtype
@pytest.mark.parametrize(
    ("rows", "vocabulary", "num_codebooks", "fine"),
    [(1, 1, 1, 1), (33, 259, 1, 0), (1, 515, 491, 0), (33, 77, 983, 77), (70, 129, 33, 20)],
)
def test_shapes_stay_within_the_error_bounds(rows, vocabulary, num_codebooks, fine, dtype, device):
    scores, codes, fine, labels = make_problem(rows, vocabulary, num_codebooks, fine, dtype)
    check(*to(device, scores, codes), to(device, *fine), labels.to(device))


@each_device
def test_labels_of_every_token(device):
    """Also of those with a second code, which the kernels count first."""
    scores, codes, fine, _ = make_problem(9, 9, 20, 4)
    labels = torch.arange(9)
    check(*to(device, scores, codes), to(device, *fine), labels.to(device))


@each_device
@pytest.mark.parametrize("strided", [False, True])
def test_the_whole_loss(strided, device, monkeypatch):
    """From hidden states to all gradients, through the operation that PyTorch sees."""
    monkeypatch.setenv(backends.VARIABLE, "triton")
    _, codes, fine, labels = make_problem(7, 77, 31, 9)
    labels[1] = IGNORED
    hidden, codebook, bias = (torch.randn(*s) for s in ((7, 6), (31, 6), (31,)))
    leaves = [t.to(device).requires_grad_() for t in (hidden, codebook, bias)]
    given = [t.T.contiguous().T if strided and t.dim() == 2 else t for t in leaves]
    if strided:
        codes = torch.cat([codes, codes], 1)[:, : codes.shape[1]]
        labels = labels.repeat_interleave(2)[::2]
    head = {"codes": codes.to(device), "code_type": "sign"}
    head |= dict(zip(("fine_ids", "fine_codes"), to(device, *fine), strict=True))
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": IGNORED}
    exact = [t.double().requires_grad_() for t in (hidden, codebook, bias)]
    scores = torch.addmm(exact[2], exact[0], exact[1].T)
    z = 0.7 * references.logits(scores, codes, "sign", *fine)
    z = 3 * torch.tanh(z / 3)
    losses = functional.cross_entropy(
        z, labels, label_smoothing=0.1, ignore_index=IGNORED, reduction="none"
    )
    losses = losses + 0.01 * z.logsumexp(1).square().masked_fill(labels == IGNORED, 0)
    for reduction, number, want in (
        ("mean", None, losses.sum() / 6),
        ("mean", 20, losses.sum() / 20),
        ("sum", None, losses.sum()),
        ("none", None, losses),
    ):
        got = ops.linear_cross_entropy(
            given[0],
            labels.to(device),
            codebook=given[1],
            codebook_bias=given[2],
            **head,
            **options,
            logit_scale=0.7,
            final_logit_softcapping=3.0,
            reduction=reduction,
            num_items_in_batch=number,
        )
        # The products with the codebook are float32's, the rest is within 1e-4 (above).
        torch.testing.assert_close(got.cpu().double(), want, atol=2e-4, rtol=0)
        weights = torch.rand(want.shape)
        found = torch.autograd.grad((got * weights.to(device)).sum(), leaves)
        right = torch.autograd.grad((want * weights).sum(), exact, retain_graph=True)
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine.cpu().double(), theirs, atol=2e-3, rtol=0)


@each_device
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_that_counts(rows, device, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    _, codes, _, _ = make_problem(3, 77, 31)
    codebook = torch.randn(31, 6, device=device, requires_grad=True)
    loss = ops.linear_cross_entropy(
        torch.randn(rows, 6, device=device),
        torch.full((rows,), IGNORED, device=device),
        codebook=codebook,
        codebook_bias=torch.zeros(31, device=device),
        codes=codes.to(device),
        code_type="sign",
        ignore_index=IGNORED,
        reduction="sum",
    )
    assert loss.item() == 0
    loss.backward()
    assert not bool(codebook.grad.any())


@each_device
def test_large_logits_do_not_overflow(device):
    scores, codes, fine, labels = make_problem(7, 333, 31)
    arguments = *to(device, 1e4 * scores, codes), fine, labels.to(device)
    check(*arguments)


@each_device
def test_a_row_that_is_not_finite_spoils_no_other(device):
    scores, codes, fine, labels = make_problem(7, 77, 31)
    options = {"label_smoothing": 0.1, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0}

    def compute():
        given = *to(device, scores, codes), *fine, labels.to(device)
        return triton_cross_entropy.losses_and_gradient(*given, **options, with_gradient=True)

    want = compute()
    scores[3, 5] = float("nan")
    got = compute()
    others = torch.arange(7) != 3
    for before, after in zip(want, got, strict=True):
        assert torch.equal(after[others], before[others])
        assert bool(after[3].isnan().all())


@each_device
def test_the_same_input_gives_the_same_bits(device):
    scores, codes, fine, labels = make_problem(33, 700, 40, 20)
    options = {"label_smoothing": 0.1, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0}
    given = *to(device, scores, codes), *to(device, *fine), labels.to(device)
    first, second = (
        triton_cross_entropy.losses_and_gradient(*given, **options, with_gradient=True)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@each_device
def test_no_tensor_has_the_size_of_the_logits(device):
    rows, vocabulary, num_codebooks = 64, 1500, 20
    scores, codes, fine, labels = make_problem(rows, vocabulary, num_codebooks)
    given = *to(device, scores, codes), *fine, labels.to(device)
    options = {"label_smoothing": 0.1, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0}
    triton_cross_entropy.losses_and_gradient(*given, **options, with_gradient=False)
    with LargestTensor() as largest:
        triton_cross_entropy.losses_and_gradient(*given, **options, with_gradient=True)
    # 12 pieces of 128 tokens, each with float32 sums of its own for every score, which the
    # interpreter copies as bytes.
    assert largest.elements <= 4 * 12 * rows * num_codebooks < rows * vocabulary


@each_device
def test_evaluation_computes_no_gradient(device):
    scores, codes, fine, labels = make_problem(7, 77, 31)
    options = {"label_smoothing": 0.0, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0}
    given = *to(device, scores, codes), *fine, labels.to(device)
    compute = triton_cross_entropy.losses_and_gradient
    losses, gradient = compute(*given, **options, with_gradient=False)
    assert gradient is None
    assert torch.equal(losses, compute(*given, **options, with_gradient=True)[0])


@each_device
def test_pytorch_accepts_the_registration(device, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    scores, codes, fine, labels = make_problem(7, 77, 31, 9)
    labels[2] = IGNORED
    scores.requires_grad_()
    given = (*to(device, scores, codes), "sign", *to(device, *fine), labels.to(device), IGNORED)
    arguments = (*given, 0.1, 0.7, 30.0, 0.01, None, True)
    torch.library.opcheck(torch.ops.vqlogits.cross_entropy.default, arguments)


class TestOnGPU:
    pytestmark = on_gpu

    @each_dtype
    @pytest.mark.parametrize("rows", [3, 100])
    def test_a_large_layer(self, rows, dtype):
        """V 128,256 and d 4,096 at 99% by the paper's count: 1,282 bits a token."""
        scores, codes, fine, labels = make_problem(rows, 128_256, 1282, 12_825, dtype)
        check(*to("cuda", scores, codes), to("cuda", *fine), labels.to("cuda"), smoothing=0.1)

    def test_the_loss_needs_no_memory_for_logits(self):
        rows, vocabulary = 8192, 128_256
        hidden = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        codes = references.random_sign_codes(vocabulary, 1282).to("cuda")
        codebook = torch.randn(1282, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(0, vocabulary, (rows,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear_cross_entropy(
            hidden,
            labels,
            codebook=codebook,
            codebook_bias=torch.zeros(1282, device="cuda", dtype=torch.bfloat16),
            codes=codes,
            code_type="sign",
            score_scale=2.0**-10,
        ).backward()
        needed = torch.cuda.max_memory_allocated() - before
        assert needed < rows * vocabulary  # the logits alone would take two bytes each
