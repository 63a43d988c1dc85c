import gc
import weakref

import pytest
import references
import torch

from hf_vqlogits.ops import triton_layout


def signs_of_words(words, vocabulary, num_codebooks):
    """The matrix of signs (V, R) that words (W, V) hold."""
    bits = (words.long().unsqueeze(-1) >> torch.arange(32)) & 1  # (W, V, 32)
    signs = 2.0 * bits.permute(1, 0, 2).flatten(1).double() - 1
    return signs[:vocabulary, :num_codebooks]


@pytest.mark.parametrize(("vocabulary", "num_codebooks"), [(1, 1), (77, 31), (300, 33), (256, 64)])
def test_words_hold_the_signs(vocabulary, num_codebooks):
    codes = references.random_sign_codes(vocabulary, num_codebooks)
    layout = triton_layout.sign_layout(codes, None, None)
    assert layout.words.dtype == torch.int32
    assert layout.words.is_contiguous()
    assert layout.words.shape[0] % triton_layout.WORDS_MULTIPLE == 0
    assert layout.words.shape[1] % triton_layout.COLUMNS_MULTIPLE == 0
    assert layout.num_fine == 0
    got = signs_of_words(layout.words, vocabulary, num_codebooks)
    assert torch.equal(got, references.sign_matrix(codes, num_codebooks))


def test_tokens_with_a_second_code_come_first():
    codes, fine_codes = (references.random_sign_codes(v, 37, seed=v) for v in (50, 4))
    ids = torch.tensor([44, 0, 17, 3], dtype=torch.int32)
    layout = triton_layout.sign_layout(codes, ids, fine_codes)
    tokens = layout.tokens.long()
    assert layout.num_fine == 4
    assert tokens[:4].tolist() == [0, 3, 17, 44]
    assert tokens[4:].tolist() == [v for v in range(50) if v not in (0, 3, 17, 44)]
    assert torch.equal(layout.columns[tokens], torch.arange(50))
    got = signs_of_words(layout.words, 50, 37)
    assert torch.equal(got, references.sign_matrix(codes, 37)[tokens])
    got = signs_of_words(layout.fine_words, 4, 37)
    assert torch.equal(got, references.sign_matrix(fine_codes, 37)[torch.tensor([1, 3, 2, 0])])


def test_no_token_with_a_second_code():
    codes = references.random_sign_codes(50, 37)
    layout = triton_layout.sign_layout(codes, torch.zeros(0).int(), codes[:0])
    assert layout.num_fine == 0


def test_layouts_are_kept_until_a_tensor_changes():
    codes, fine_codes = references.random_sign_codes(50, 37), references.random_sign_codes(4, 37)
    ids = torch.tensor([44, 0, 17, 3])
    given = (codes, ids, fine_codes)
    layout = triton_layout.sign_layout(*given)
    assert triton_layout.sign_layout(*given) is layout
    for tensor in given:
        tensor[0] ^= 1
        assert triton_layout.sign_layout(*given) is not layout
        layout = triton_layout.sign_layout(*given)
        assert triton_layout.sign_layout(*given) is layout


@pytest.mark.parametrize("shape", [(50, 37), (256, 64), (1, 1)])
def test_layouts_do_not_keep_their_codes_alive(shape):
    codes = references.random_sign_codes(*shape)
    triton_layout.sign_layout(codes, None, None)
    triton_layout.index_layout(codes, 256)
    gone = weakref.ref(codes)
    del codes
    gc.collect()
    assert gone() is None


def test_codes_that_count_no_edits_are_read_every_time():
    with torch.inference_mode():
        codes = references.random_sign_codes(50, 37)
        layout = triton_layout.sign_layout(codes, None, None)
        codes ^= 1
        assert not torch.equal(triton_layout.sign_layout(codes, None, None).words, layout.words)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_index_codes_are_transposed(dtype):
    codes = references.random_index_codes(50, 3, 7).to(dtype)
    got = triton_layout.index_layout(codes, 7)
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert torch.equal(got, codes.T)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_index_out_of_range_is_refused(wrong):
    codes = references.random_index_codes(50, 2, 3).int()
    codes[9, 1] = wrong
    with pytest.raises(IndexError, match=f"`codes` holds {wrong}, but .* run from 0 to 2"):
        triton_layout.index_layout(codes, 3)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 50], IndexError, r"holds 3 and 50, but must lie in 0\.\.49"),
        ([-1, 3], IndexError, "holds -1 and 3, but must lie in"),
        ([3, 3], ValueError, "names a token twice"),
    ],
)
def test_impossible_tokens_of_second_codes_are_refused(ids, error, message):
    codes = references.random_sign_codes(50, 37)
    with pytest.raises(error, match=message):
        triton_layout.sign_layout(codes, torch.tensor(ids), codes[:2].clone())
