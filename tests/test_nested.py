import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_vqlogits.nested import check_stored, cut_codes


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_cut_codes_are_the_first_bits(tokens, stored, data):
    bits = data.draw(st.integers(1, stored))
    signs = np.random.default_rng(stored).integers(0, 2, (tokens, stored), dtype=np.uint8)
    codes = torch.from_numpy(np.packbits(signs, axis=1, bitorder="little"))
    before = codes.clone()
    cut = cut_codes(codes, bits)
    assert torch.equal(codes, before)
    assert cut.shape == (tokens, -(-bits // 8))
    assert cut.is_contiguous()
    unpacked = np.unpackbits(cut.numpy(), axis=1, bitorder="little")
    assert (unpacked[:, :bits] == signs[:, :bits]).all()
    assert not unpacked[:, bits:].any()


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ([19], "there is 19 alone in x"),
        ([7, 19], "there are 7 and 19 in x"),
        ([7, 9, 19], "there are 7, 9 and 19 in x"),
    ],
)
def test_sizes_that_are_not_stored(stored, told):
    check_stored(19, stored, "x")
    with pytest.raises(ValueError, match=f"^`num_codebooks` 8 is not stored: {told}. Sizes are"):
        check_stored(8, stored, "x")
