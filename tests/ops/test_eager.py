import hypothesis
import pytest
import references
import torch
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from hf_vqlogits import ops
from hf_vqlogits.ops import eager


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_inverts_packing(vocabulary, num_codebooks, seed):
    chance = torch.rand(vocabulary, num_codebooks, generator=torch.Generator().manual_seed(seed))
    signs = chance < 0.5
    codes = ops.pack_signs(signs)
    assert codes.shape == (vocabulary, -(-num_codebooks // 8))
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(ops.unpack_signs(codes, num_codebooks), 2.0 * signs - 1)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_inverts_unpacking(vocabulary, num_codebooks, seed):
    codes = references.random_sign_codes(vocabulary, num_codebooks, seed)
    signs = ops.unpack_signs(codes, num_codebooks, dtype=torch.int8)
    assert signs.dtype == torch.int8
    assert torch.equal(ops.pack_signs(signs), codes)


@pytest.mark.parametrize("shape", [(5,), (3, 4)], ids=["sign", "index"])
def test_scores_are_a_scaled_linear_layer(shape):
    generator = torch.Generator().manual_seed(0)
    hidden, codebook = (torch.randn(s, generator=generator) for s in ((7, 6), (*shape, 6)))
    bias = torch.randn(shape, generator=generator)
    wanted = torch.einsum("nd,...d->n...", hidden.double(), codebook.double()) + bias
    given = ops.scores(hidden, codebook, bias, scale=0.25)
    torch.testing.assert_close(given.double(), 0.25 * wanted, atol=1e-6, rtol=1e-5)


def test_scores_are_scaled_before_they_are_rounded():
    hidden, codebook = torch.full((1, 4), 200.0).half(), torch.full((2, 4), 200.0).half()
    scores = ops.scores(hidden, codebook, torch.zeros(2).half(), scale=2.0**-10)
    assert scores.tolist() == [[156.25, 156.25]]  # unscaled 160,000, beyond float16


def test_bits_are_little_endian_and_padding_is_zero():
    signs = torch.tensor([[1, -1, -1, -1, -1, -1, -1, -1, -1, 1], [1] * 10])
    assert ops.pack_signs(signs).tolist() == [[1, 2], [255, 3]]


def test_leading_dimensions_are_kept():
    signs = torch.rand(2, 3, 4, 11) < 0.5
    codes = ops.pack_signs(signs)
    assert codes.shape == (2, 3, 4, 2)
    assert torch.equal(ops.unpack_signs(codes, 11), 2.0 * signs - 1)


@pytest.mark.parametrize("signs", [torch.zeros(2, 3), torch.tensor([[1.0, float("nan")]])])
def test_numbers_that_are_no_signs_are_refused(signs):
    with pytest.raises(ValueError, match=r"neither \+1 nor -1; compare first"):
        ops.pack_signs(signs)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_nothing_to_pack_is_refused(shape):
    with pytest.raises(ValueError, match="`signs` has shape .* R >= 1 signs"):
        ops.pack_signs(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("num_codebooks", [0, 8, 17])
def test_codes_of_another_width_are_refused(num_codebooks):
    with pytest.raises(ValueError, match=r"`codes` has shape \(5, 2\), but .* signs a token"):
        ops.unpack_signs(torch.zeros(5, 2, dtype=torch.uint8), num_codebooks)


@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks"), references.SIGN_SHAPES)
@pytest.mark.parametrize("piece_bytes", [1 << 14, 4 << 20])
def test_signs_follow_their_equation(rows, vocabulary, num_codebooks, piece_bytes, monkeypatch):
    monkeypatch.setattr(eager, "_PIECE_BYTES", piece_bytes)
    scores = references.random_scores(rows, num_codebooks)
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    want = references.logits(scores, codes, "sign")
    got = eager.expand(scores, codes, "sign")
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(eager.expand(scores.double(), codes, "sign"), want)


@pytest.mark.parametrize(("rows", "vocabulary", "books", "size"), references.INDEX_SHAPES)
def test_indices_follow_their_equation(rows, vocabulary, books, size):
    scores = references.random_scores(rows, books, size)
    codes = references.random_index_codes(vocabulary, books, size)
    want = references.logits(scores, codes, "index")
    torch.testing.assert_close(eager.expand(scores, codes, "index"), want.float())
    torch.testing.assert_close(eager.expand(scores.double(), codes, "index"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code_type", ["sign", "index"])
def test_half_precision_sums_are_rounded_once(dtype, code_type):
    if code_type == "sign":
        scores = references.random_scores(5, 200).to(dtype)
        codes = references.random_sign_codes(90, 200)
    else:
        scores = references.random_scores(5, 200, 3).to(dtype)
        codes = references.random_index_codes(90, 200, 3)
    got = eager.expand(scores, codes, code_type)
    want = references.logits(scores, codes, code_type)
    assert got.dtype == dtype
    # Half a unit in the last place, and what float32 sums may add to it.
    bound = torch.finfo(dtype).eps / 2 * want.abs() + 1e-4
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("code_type", ["sign", "index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_transpose(code_type, dtype, monkeypatch):
    monkeypatch.setattr(eager, "_PIECE_BYTES", 1 << 14)  # 124 of the 301 tokens
    if code_type == "sign":
        shape, codes = (4, 33), references.random_sign_codes(301, 33)
    else:
        shape, codes = (4, 3, 6), references.random_index_codes(301, 3, 6)
    grad = references.random_scores(4, 301).to(dtype)
    scores = references.random_scores(*shape).double().requires_grad_()
    references.logits(scores, codes, code_type).backward(grad.double())
    got = eager.expand_backward(grad, codes, code_type, shape)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), scores.grad, atol=tolerance, rtol=tolerance)


def test_nothing_larger_than_the_logits_or_a_piece_is_made(monkeypatch):
    monkeypatch.setattr(eager, "_PIECE_BYTES", 4 * 100 * 64)
    rows, vocabulary = 3, 5000
    with LargestTensor() as largest:
        scores = references.random_scores(rows, 100)
        codes = references.random_sign_codes(vocabulary, 100)
        largest.elements = 0
        eager.expand(scores, codes, "sign")
        eager.expand_backward(
            references.random_scores(rows, vocabulary), codes, "sign", (rows, 100)
        )
        assert largest.elements == rows * vocabulary
        scores = references.random_scores(rows, 20, 6)
        codes = references.random_index_codes(vocabulary, 20, 6)
        largest.elements = 0
        eager.expand(scores, codes, "index")
        assert largest.elements == rows * vocabulary


def test_an_index_out_of_range_is_refused():
    codes = torch.tensor([[0], [3]], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="out of DATA bounds"):
        eager.expand(torch.zeros(2, 1, 3), codes, "index")
