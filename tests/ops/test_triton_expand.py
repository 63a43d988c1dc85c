import os
import subprocess
import sys
from pathlib import Path

import pytest
import references
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from triton_devices import each_device, on_gpu, rounding, second_codes, sum_error, to

from hf_vqlogits import ops
from hf_vqlogits.ops import backends, triton_expand

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# rows N, vocabulary V, R, tokens with a second code; up to 4 rows are looked up in tables
SIGN_SHAPES = [
    (0, 10, 7, 2),
    (1, 1, 1, 1),
    (1, 515, 31, 0),
    (1, 301, 983, 40),
    (3, 259, 491, 259),
    (7, 333, 31, 0),
    (7, 129, 491, 129),
    (33, 259, 1, 5),
    (33, 77, 983, 30),
]
INDEX_SHAPES = [
    (0, 10, 2, 3),
    (1, 1, 1, 1),
    (7, 333, 3, 31),
    (33, 77, 2, 256),
    (1, 515, 2, 257),
    (7, 300, 1, 4096),
    (1, 77, 125, 5),
]


def check_signs(scores, codes, fine, **options):
    got = triton_expand.expand(scores, codes, "sign", *fine, **options)
    assert got.dtype == scores.dtype
    want = references.logits(*to("cpu", scores, codes), "sign", *to("cpu", *fine))
    error = sum_error(scores.cpu(), scores.shape[1], fine[0] is not None)
    allowed = error + rounding(want.abs() + error, scores.dtype)
    assert got.shape == want.shape
    assert bool(((got.cpu().double() - want).abs() <= allowed).all())


@each_device
@each_dtype
@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks", "fine"), SIGN_SHAPES)
def test_sign_codes_stay_within_the_error_bound(
    rows, vocabulary, num_codebooks, fine, dtype, device
):
    scores = references.random_scores(rows, num_codebooks).to(device, dtype)
    codes = references.random_sign_codes(vocabulary, num_codebooks).to(device)
    check_signs(scores, codes, to(device, *second_codes(vocabulary, fine, num_codebooks)))


@each_device
@pytest.mark.parametrize("few_rows", [0, 5])
def test_sums_of_small_integers_are_exact(few_rows, device):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-8, 9, (2, 300), generator=generator).float()
    codes, fine = references.random_sign_codes(270, 300), second_codes(270, 31, 300)
    want = references.logits(scores, codes, "sign", *fine).float()
    arguments = to(device, scores, codes)
    got = triton_expand.expand(*arguments, "sign", *to(device, *fine), few_rows=few_rows)
    assert torch.equal(got.cpu(), want)


@each_device
@pytest.mark.parametrize("stored", [torch.uint8, torch.int32])
@each_dtype
@pytest.mark.parametrize(("rows", "vocabulary", "books", "size"), INDEX_SHAPES)
def test_index_codes_are_rounded_once(rows, vocabulary, books, size, dtype, stored, device):
    if stored == torch.uint8 and size > 256:
        pytest.skip("codes beyond a byte")
    scores = references.random_scores(rows, books, size).to(dtype)
    codes = references.random_index_codes(vocabulary, books, size).to(stored)
    got = triton_expand.expand(*to(device, scores, codes), "index")
    want = references.logits(scores, codes, "index")
    # G additions, each rounded to half a step of at most the sum of the largest scores.
    largest = scores.double().abs().amax(2).sum(1, keepdim=True) if rows else torch.zeros(0, 1)
    error = books * 2.0**-24 * largest
    assert got.dtype == dtype
    assert got.shape == want.shape
    allowed = error + rounding(want.abs() + error, dtype)
    assert bool(((got.cpu().double() - want).abs() <= allowed).all())


@each_device
@pytest.mark.parametrize("rows", [2, 7])
def test_strides_do_not_matter(rows, device):
    codes, fine = references.random_sign_codes(100, 70), second_codes(100, 9, 70)
    scores = references.random_scores(rows, 70)
    codes, scores, *fine = to(device, codes, scores, *fine)
    want = triton_expand.expand(scores, codes, "sign", *fine)
    strided = scores.repeat_interleave(2, dim=1)[:, ::2]
    wide = torch.cat([codes, codes], 1)[:, : codes.shape[1]]
    assert not strided.is_contiguous()
    assert not wide.is_contiguous()
    assert torch.equal(triton_expand.expand(strided, wide, "sign", *fine), want)
    index_scores = references.random_scores(rows, 3, 7).to(device)
    index_codes = references.random_index_codes(100, 3, 7).to(device)
    want = triton_expand.expand(index_scores, index_codes, "index")
    turned = index_scores.transpose(0, 2).contiguous().transpose(0, 2)
    got = triton_expand.expand(turned, index_codes.T.contiguous().T, "index")
    assert torch.equal(got, want)


@each_device
@pytest.mark.parametrize("few_rows", [0, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_spoil_their_own_row_only(value, few_rows, device):
    codes = references.random_sign_codes(50, 40).to(device)
    scores = references.random_scores(3, 40).to(device)
    want = triton_expand.expand(scores, codes, "sign", few_rows=few_rows)
    scores[1, 7] = value
    got = triton_expand.expand(scores, codes, "sign", few_rows=few_rows)
    assert torch.equal(got[::2], want[::2])
    signs = references.sign_matrix(codes.cpu(), 40)[:, 7].float()
    torch.testing.assert_close(got[1].cpu(), value * signs, rtol=0, atol=0, equal_nan=True)


@each_device
def test_half_precision_overflows_to_infinity(device):
    codes = ops.pack_signs(torch.tensor([[True, True], [False, False], [True, False]])).to(device)
    for rows in (1, 5):
        scores = torch.full((rows, 2), 65504.0, device=device).half()
        logits = triton_expand.expand(scores, codes, "sign")
        assert logits[0].tolist() == [float("inf"), float("-inf"), 0.0]


@each_device
@each_dtype
@pytest.mark.parametrize(
    ("rows", "vocabulary", "num_codebooks", "fine"),
    [(0, 10, 7, 2), (1, 1, 1, 1), (1, 515, 31, 0), (7, 333, 491, 40), (33, 129, 983, 129)],
)
def test_gradients_stay_within_the_error_bound(
    rows, vocabulary, num_codebooks, fine, dtype, device
):
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    ids, fine_codes = second_codes(vocabulary, fine, num_codebooks)
    grad = references.random_scores(rows, vocabulary, seed=5).to(dtype)
    exact = torch.zeros(rows, num_codebooks, dtype=torch.float64, requires_grad=True)
    references.logits(exact, codes, "sign", ids, fine_codes).backward(grad.double())
    given = to(device, grad, codes), to(device, ids, fine_codes)
    got = triton_expand.expand_backward(*given[0], num_codebooks, *given[1])
    assert got.dtype == dtype
    assert got.shape == exact.shape
    error = sum_error(grad, vocabulary, bool(fine))
    # What adds the pieces of the vocabulary, and rounds, is PyTorch.
    allowed = error + torch.finfo(dtype).eps / 2 * (exact.grad.abs() + error)
    assert bool(((got.cpu().double() - exact.grad).abs() <= allowed).all())


@each_device
def test_gradients_in_any_layout(device):
    codes = references.random_sign_codes(100, 70).to(device)
    grad = references.random_scores(7, 100).to(device)
    want = triton_expand.expand_backward(grad, codes, 70)
    assert torch.equal(triton_expand.expand_backward(grad, codes, 70), want)  # in a fixed order
    transposed = grad.T.contiguous().T
    part = torch.cat([grad, grad], 1)[:, :100]
    for strided in (transposed, part):
        assert not strided.is_contiguous()
        assert torch.equal(triton_expand.expand_backward(strided, codes, 70), want)
    ones = torch.ones((), device=device).expand(7, 100)  # as from a sum
    want = triton_expand.expand_backward(ones.contiguous(), codes, 70)
    assert torch.equal(triton_expand.expand_backward(ones, codes, 70), want)


@each_device
def test_gradients_through_the_operation(device, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    ids, fine_codes = to(device, *second_codes(60, 7, 40))
    codes = {"codes": references.random_sign_codes(60, 40).to(device), "code_type": "sign"}
    fine = {"fine_ids": ids, "fine_codes": fine_codes}
    scores = torch.randint(-8, 9, (5, 40), device=device).float().requires_grad_()
    direction, again = (torch.randint(-3, 4, (5, 60), device=device).float() for _ in range(2))
    direction.requires_grad_()
    logits = ops.expand(scores, **codes, **fine)
    (gradient,) = torch.autograd.grad(logits, scores, direction, create_graph=True)
    signs = references.sign_matrix(codes["codes"].cpu(), 40)
    signs[ids.cpu().long()] += references.sign_matrix(fine_codes.cpu(), 40) / 2
    signs = signs.float()
    assert torch.equal(gradient.detach().cpu(), direction.detach().cpu() @ signs)
    # The gradient is linear in the logits' one: its own derivative is the operation.
    twice = torch.autograd.grad(gradient, direction, again @ signs.to(device))[0]
    assert torch.equal(twice.cpu(), again.cpu() @ signs @ signs.T)


@each_device
def test_changed_codes_are_noticed(device):
    codes, scores = references.random_sign_codes(50, 40), references.random_scores(2, 40)
    codes, scores, *fine = to(device, codes, scores, *second_codes(50, 6, 40))
    check_signs(scores, codes, fine)
    fine[1][2] ^= 255
    check_signs(scores, codes, fine)
    codes[:10] ^= codes[10:20]
    check_signs(scores, codes, fine)
    fine[0].copy_(torch.arange(6))
    check_signs(scores, codes, fine)


@pytest.mark.slow
def test_all_kernels_compile_for_gpus():
    """What the interpreter cannot tell: that the compiler takes the kernels, and the chip fits."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


class TestOnGPU:
    pytestmark = on_gpu

    @each_dtype
    @pytest.mark.parametrize("rows", [1, 4, 64, 300])
    def test_a_large_layer(self, rows, dtype):
        """V 128,256 and d 4,096 at 99% by the paper's count: 1,282 bits a token."""
        scores = references.random_scores(rows, 1282).to("cuda", dtype)
        codes = references.random_sign_codes(128_256, 1282).to("cuda")
        check_signs(scores, codes, to("cuda", *second_codes(128_256, 12_825, 1282)))

    def test_the_gradient_of_a_large_layer(self):
        codes = references.random_sign_codes(128_256, 1282).to("cuda")
        grad = references.random_scores(64, 128_256).to("cuda")
        got = triton_expand.expand_backward(grad, codes, 1282)
        signs = ops.unpack_signs(codes, 1282, dtype=torch.float64)
        error = (got.double() - grad.double() @ signs).abs()
        assert bool((error <= sum_error(grad, 128_256)).all())

    def test_auto_chooses_the_kernels(self):
        scores = references.random_scores(2, 40).to("cuda")
        codes = references.random_sign_codes(50, 40).to("cuda")
        assert backends.for_expand(scores, codes, "sign") == "triton"
