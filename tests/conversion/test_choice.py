import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.conversion.choice import (
    MOST_DISTILLATIONS,
    MOST_FITS,
    TOLERANCE,
    check_choice,
    choose_bits,
    sizes_to_choose_from,
)
from hf_vqlogits.conversion.errors import ConversionError

SIZES = range(8, 2305, 8)
DECAY = 2 * math.log(2) / 576
# SmolLM2-135M by the fit alone (README): growth at 490, 981 and 1,962 bits.
SMOLLM2 = {490: math.log(1.216), 981: math.log(1.044), 1962: math.log(1.005)}


def exponential(level, steepness):
    return lambda bits: level * math.exp(-steepness * DECAY * bits)


def measured(bits):
    """Straight between what was measured on SmolLM2."""
    left, right = (490, 981) if bits < 981 else (981, 1962)
    slope = math.log(SMOLLM2[right] / SMOLLM2[left]) / (right - left)
    return SMOLLM2[left] * math.exp(slope * (bits - left))


class Counted:
    """A curve that knows what it was asked."""

    def __init__(self, curve):
        self.curve, self.asked = curve, []

    def __call__(self, bits):
        self.asked.append(bits)
        return self.curve(bits)


def least(curve, limit, sizes=SIZES):
    """The answer, by trying all."""
    return next((bits for bits in sizes if curve(bits) <= limit), None)


@settings(deadline=None)
@given(
    level=st.floats(0.1, 3.0),
    steepness=st.floats(0.6, 1.6),
    gain=st.floats(0.5, 1.0),
    increase=st.floats(0.003, 0.3),
)
def test_smooth_curves(level, steepness, gain, increase):
    limit = math.log1p(increase)
    fit = Counted(exponential(level, steepness))
    distil = Counted(lambda bits: gain * fit.curve(bits))
    choice = choose_bits(limit, SIZES, [984], decay=DECAY, fit=fit, distil=distil)
    wanted = least(distil.curve, limit)
    assert len(distil.asked) <= MOST_DISTILLATIONS
    assert len(set(fit.asked)) == len(fit.asked) <= 12
    assert set(distil.asked) <= set(fit.asked)
    if wanted is None:
        assert choice.bits is None
        return
    if fit.curve(SIZES[-1]) <= limit:
        assert choice.bits is not None
    if choice.bits is not None:
        assert distil.curve(choice.bits) <= limit
        assert choice.bits - wanted <= max(8, 0.04 * choice.bits)


@settings(deadline=None)
@given(steepness=st.floats(0.6, 1.6), wobble=st.floats(0, 0.05), increase=st.floats(0.005, 0.3))
def test_what_is_chosen_passed_and_is_the_smallest_that_did(steepness, wobble, increase):
    """With noise that bends the curve at will, only what was judged may be claimed."""
    limit = math.log1p(increase)
    fit = exponential(1.0, steepness)

    def distil(bits):
        return 0.9 * fit(bits) * math.exp(wobble * math.sin(bits))

    choice = choose_bits(limit, SIZES, [984], decay=DECAY, fit=fit, distil=distil)
    passed = [bits for bits, growth in choice.judged.items() if growth <= limit]
    assert choice.bits == min(passed, default=None)
    assert all(choice.judged[bits] == distil(bits) for bits in choice.judged)
    if choice.bits is not None and len(choice.judged) < MOST_DISTILLATIONS:
        failed = [b for b, g in choice.judged.items() if g > limit and b < choice.bits]
        assert choice.bits - max(failed, default=0) <= max(8, TOLERANCE * choice.bits)


@pytest.mark.parametrize("increase", [0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("start", [[981], [490, 981, 1962]], ids=["alone", "ladder"])
def test_the_curve_of_smollm2(increase, start):
    limit = math.log1p(increase)
    fit = Counted(measured)

    def distil(bits):
        return 0.85 * measured(bits)

    choice = choose_bits(limit, SIZES, start, decay=DECAY, fit=fit, distil=distil)
    assert choice.bits - least(distil, limit) <= TOLERANCE * choice.bits
    assert len(choice.judged) <= MOST_DISTILLATIONS
    assert len(fit.asked) <= len(start) + 6


@settings(deadline=None)
@given(level=st.floats(0.1, 3.0), steepness=st.floats(0.6, 1.6), increase=st.floats(0.003, 0.3))
def test_by_the_fit_alone(level, steepness, increase):
    limit, fit = math.log1p(increase), Counted(exponential(level, steepness))
    choice = choose_bits(limit, SIZES, [981], decay=DECAY, fit=fit)
    wanted = least(fit.curve, limit)
    assert len(fit.asked) <= MOST_FITS + 1
    assert (choice.bits is None) == (wanted is None)
    if wanted is not None:
        assert fit.curve(choice.bits) <= limit
        assert choice.bits - wanted <= max(8, TOLERANCE * choice.bits)


def test_distillations_that_disappoint_end_at_a_size_that_needs_none():
    """The first three gain nothing; the fourth is of a size whose fit alone passes."""
    limit, fit = math.log1p(0.02), exponential(1.0, 1.0)
    asked = []

    def distil(bits):
        asked.append(bits)
        return max(1.2 * limit, fit(bits)) if len(asked) < MOST_DISTILLATIONS else fit(bits)

    choice = choose_bits(limit, SIZES, [984], decay=DECAY, fit=fit, distil=distil)
    assert len(asked) == MOST_DISTILLATIONS
    assert choice.bits == asked[-1]
    assert fit(choice.bits) <= limit


def test_what_no_distillation_can_save_is_not_distilled():
    distil = Counted(lambda bits: 0.0)
    choice = choose_bits(0.01, SIZES, [984], decay=DECAY, fit=lambda bits: 0.5, distil=distil)
    assert choice.bits is None
    assert distil.asked == []
    assert 2304 in choice.fitted


def test_the_largest_is_distilled_before_giving_up():
    distil = Counted(lambda bits: 0.011)
    choice = choose_bits(0.01, SIZES, [984], decay=DECAY, fit=lambda bits: 0.02, distil=distil)
    assert choice.bits is None
    assert max(distil.asked) == 2304


def test_the_smallest_of_all():
    choice = choose_bits(0.1, SIZES, [984], decay=DECAY, fit=lambda b: 0.01, distil=lambda b: 0.0)
    assert choice.bits == 8
    assert set(choice.judged) == {8}


def test_perplexity_that_fell():
    """Noise takes small growths below zero, where there is no logarithm."""
    choice = choose_bits(0.1, SIZES, [984], decay=DECAY, fit=lambda bits: -1e-3)
    assert choice.bits == 8


def test_sizes_are_whole_bytes_up_to_four_bits_a_weight():
    sizes = sizes_to_choose_from(49_152, 576, None)
    assert [size.num_codebooks for size in sizes] == [*SIZES]
    assert {size.num_fine_tokens for size in sizes} == {4_915}
    assert {size.num_fine_tokens for size in sizes_to_choose_from(49_152, 576, 0.0)} == {0}


def test_sizes_of_a_narrow_layer_are_every_number():
    assert [s.num_codebooks for s in sizes_to_choose_from(400, 8, None)] == [*range(1, 33)]


def test_sizes_are_smaller_than_the_dense_layer():
    """2,560 bits a token of 160 tokens: 2,560 codewords are more than there are tokens."""
    sizes = sizes_to_choose_from(160, 640, None)
    assert sizes[-1].num_codebooks < 160
    assert sizes[-1].stored_bytes(160, 640, 4) <= 160 * 640 * 4


def test_a_vocabulary_too_small_for_any_size():
    with pytest.raises(ConversionError, match="`bits` 8 makes codes and 8 codewords .* larger"):
        sizes_to_choose_from(6, 640, None)


OPTIONS = {"method": "signs", "embeddings": "keep"}


@pytest.mark.parametrize(
    ("increase", "options", "message"),
    [
        (0.0, {}, "must lie above 0 and be at most 1, got 0.0; 0.02 allows 2%"),
        (-0.1, {}, "must lie above 0 and be at most 1, got -0.1"),
        (2.0, {}, "must lie above 0 and be at most 1, got 2.0"),
        (math.nan, {}, "must lie above 0 and be at most 1, got nan"),
        (0.02, {"bits": 5}, "0.02 chooses the size, and `bits` 5 as well; give one of them"),
        (0.02, {"param_reduction": 0.9}, "`param_reduction` 0.9 as well"),
        (0.02, {"nested": [0.9, 0.8]}, r"and `nested` \[0.9, 0.8\] as well; give one of them"),
        (
            0.02,
            {"bits_per_weight": 1.0, "num_codebooks": 2, "codebook_size": 3, "method": "kmeans"},
            "`bits_per_weight` 1.0 and `num_codebooks` 2 and `codebook_size` 3 as well",
        ),
        (0.02, {"method": "kmeans"}, "among sign codes; it does not apply to 'kmeans'"),
        (0.02, {"embeddings": "tied"}, "`embeddings` 'tied' changes more; choose with 'keep'"),
    ],
)
def test_options_that_contradict(increase, options, message):
    with pytest.raises(ConversionError, match=message):
        check_choice(increase, **{**OPTIONS, **options})


def test_options_that_do_not():
    check_choice(0.02, **OPTIONS, bits=None, param_reduction=None)
    check_choice(1.0, **OPTIONS)
