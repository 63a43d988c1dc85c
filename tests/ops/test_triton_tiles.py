import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from hf_vqlogits.ops import triton_tiles


def test_three_parts_are_the_number_exactly():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 127, (9, 500), generator=generator)
    scores = torch.randn(9, 500, generator=generator) * 2.0**exponents
    found = triton_tiles.parts(scores, 16, 512)
    assert found.shape == (3, 16, 512)
    assert torch.equal(found.bfloat16().to(found.dtype), found)
    assert torch.equal(found.double().sum(0)[:9, :500], scores.double())
    assert not bool(found[:, 9:].any())
    assert not bool(found[:, :, 500:].any())


def test_what_is_not_finite_stays_so():
    scores = torch.tensor([[float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38]])
    found = triton_tiles.parts(scores, 1, 5).float().sum(0)
    torch.testing.assert_close(found, scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_part(dtype):
    scores = torch.randn(3, 5).to(dtype)
    found = triton_tiles.parts(scores, 4, 8)
    assert found.shape == (1, 4, 8)
    assert torch.equal(found[0, :3, :5].to(dtype), scores)


@pytest.mark.parametrize(
    ("vocabulary", "programs", "pieces", "tiles"),
    [(1, 1, 1, 1), (129, 1, 2, 1), (128_256, 1, 126, 8), (128_256, 128, 1, 1002), (700, 64, 2, 3)],
)
def test_pieces_cover_the_vocabulary(vocabulary, programs, pieces, tiles):
    assert triton_tiles.pieces_of_vocabulary(vocabulary, 128, programs) == (pieces, tiles)
    assert (pieces - 1) * tiles * 128 < vocabulary <= pieces * tiles * 128
