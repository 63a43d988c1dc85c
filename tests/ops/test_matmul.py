import pytest
import references
import torch

from hf_vqlogits.ops import matmul


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    matrices = matmul.TensorCache()
    monkeypatch.setattr(matmul, "_matrices", matrices)
    return matrices


@pytest.mark.parametrize(("rows", "vocabulary", "num_codebooks"), references.SIGN_SHAPES)
def test_the_product_follows_the_equation(rows, vocabulary, num_codebooks):
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    scores = references.random_scores(rows, num_codebooks).double()
    want = references.logits(scores, codes, "sign")
    torch.testing.assert_close(matmul.expand(scores, codes), want)
    grad = references.random_scores(rows, vocabulary).double()
    want = grad @ references.sign_matrix(codes, num_codebooks)
    torch.testing.assert_close(matmul.expand_backward(grad, codes, num_codebooks), want)


def test_the_matrix_is_kept_for_each_type(kept):
    codes, scores = references.random_sign_codes(50, 20), references.random_scores(2, 20)
    for _ in range(3):
        assert matmul.expand(scores, codes).dtype == torch.float32
        assert matmul.expand(scores.bfloat16(), codes).dtype == torch.bfloat16
    assert len(kept) == 2


def test_edits_of_the_codes_are_noticed():
    codes, scores = references.random_sign_codes(50, 16), references.random_scores(2, 16)
    before = matmul.expand(scores, codes)
    codes ^= 255
    torch.testing.assert_close(matmul.expand(scores, codes), -before)


def test_codes_whose_edits_cannot_be_noticed_are_unpacked_every_time(kept):
    scores = references.random_scores(2, 16)
    with torch.inference_mode():
        codes = references.random_sign_codes(50, 16)
        before = matmul.expand(scores, codes)
        codes ^= 255
        torch.testing.assert_close(matmul.expand(scores, codes), -before)
    assert len(kept) == 0
