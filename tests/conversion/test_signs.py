import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sign_problems import fit_signs, hidden_states, problem, random_signs, sign_fitter
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vqlogits.conversion import sign_codebook, sign_greedy, signs
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.ops import unpack_signs


class LargestFloats(TorchDispatchMode):
    """Records the largest number of floats that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                if 0 not in tensor.stride():  # not spread out in memory
                    self.elements = max(self.elements, tensor.numel())
        return result


def levels(fit):
    """What multiplies the codewords, (V, R)."""
    bits = len(fit.codebook)
    signs = unpack_signs(fit.codes, bits)
    if fit.fine_ids is not None:
        signs[fit.fine_ids.long()] += unpack_signs(fit.fine_codes, bits) / 2
    return signs


def logits(fit, hidden):
    return (hidden @ fit.codebook.T + fit.codebook_bias) @ levels(fit).T


def divergence(fit, weight, bias, hidden):
    """KL from the dense layer's distribution to the fit's, nats a position."""
    dense = (hidden @ weight.T + bias).log_softmax(-1)
    return float((dense.exp() * (dense - logits(fit, hidden).log_softmax(-1))).sum(-1).mean())


def test_more_bits_come_closer_to_the_dense_layer():
    weight, bias, statistics = problem(vocab=200, size=12)
    hidden = hidden_states(300, 12, seed=9)
    fits = [fit_signs(weight, statistics, bias=bias, num_codebooks=r) for r in (6, 24, 72)]
    found = [divergence(fit, weight, bias, hidden) for fit in fits]
    assert found[0] > 4 * found[1] > 16 * found[2]
    assert found[2] < 0.01


def test_second_codes_are_of_the_tokens_that_count_most():
    weight, bias, statistics = problem(vocab=200, size=12)
    importance = token_metric(weight, statistics, bias=bias).weight
    fit = fit_signs(weight, statistics, bias=bias, num_codebooks=13, num_fine_tokens=20)
    assert fit.fine_ids.dtype == torch.int32
    assert sorted(fit.fine_ids.tolist()) == fit.fine_ids.tolist()
    assert set(fit.fine_ids.tolist()) == set(importance.topk(20).indices.tolist())
    assert fit.fine_codes.shape == (20, 2)
    assert not (fit.fine_codes[:, 1] >> 5).any()  # padding


def test_second_codes_come_closer_to_the_dense_layer():
    weight, bias, statistics = problem(vocab=200, size=12)
    hidden = hidden_states(300, 12, seed=9)
    found = []
    for fine in (0, 40, 200):
        fit = fit_signs(weight, statistics, bias=bias, num_codebooks=24, num_fine_tokens=fine)
        found.append(divergence(fit, weight, bias, hidden))
    assert found[0] > 1.2 * found[1] > 1.2**2 * found[2]


def test_second_codes_start_towards_what_the_first_ones_miss():
    weight, bias, statistics = problem(vocab=200, size=12)
    metric = token_metric(weight, statistics, bias=bias)
    first = random_signs(200, 6)
    codebook = sign_codebook.solve_codebook(metric, first, 0.1 * torch.randn(6, 13), iterations=8)
    fine = signs._first_fine_signs(metric, first, codebook)
    errors = [
        sign_codebook.error_of(metric, first + 0.01 * side * fine, codebook) for side in (-1, 0, 1)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("fine", [-1, 51])
def test_second_codes_of_more_tokens_than_there_are(fine):
    weight, bias, statistics = problem(vocab=50, size=6)
    with pytest.raises(ValueError, match=f"must lie between 0 and 50, got {fine}"):
        fit_signs(weight, statistics, bias=bias, num_codebooks=3, num_fine_tokens=fine)


def test_formats_and_details():
    weight, bias, statistics = problem(vocab=50, size=6)
    fit = fit_signs(weight.bfloat16(), statistics, bias=bias, num_codebooks=11)
    assert fit.codes.shape == (50, 2)
    assert fit.codes.dtype == torch.uint8
    assert not (fit.codes[:, 1] >> 3).any()  # padding
    assert fit.codebook.shape == (11, 6)
    assert fit.codebook_bias.shape == (11,)
    assert fit.codebook.dtype == fit.codebook_bias.dtype == torch.float32
    assert 0 < fit.details["error"] < fit.details["error_greedy"] < 1
    assert set(fit.details["seconds"]) == {"greedy", "codebook", "search"}


@pytest.mark.parametrize("fine", [0, 9, 50])
def test_error_is_the_one_of_the_logits(fine):
    """The product form on raw hidden states has the error that the fit reports."""
    weight, bias, statistics = problem(vocab=50, size=6)
    fit = sign_fitter(weight, statistics, bias=bias).fit(11, fine)
    metric = token_metric(weight, statistics, bias=bias)
    signs = levels(fit)
    vectors, offsets = signs @ fit.codebook, signs @ fit.codebook_bias
    # Back to whitened coordinates.
    whitened = torch.cat(
        [
            torch.linalg.solve(metric.unwhiten.T, vectors.T).T,
            (offsets + vectors @ metric.mean)[:, None],
        ],
        1,
    )
    error = metric.error(metric.rows - whitened).sum() / metric.error(metric.rows).sum()
    assert fit.details["error"] == pytest.approx(float(error), rel=1e-3)


def test_sizes_share_the_greedy_prefix_and_are_refined_alone():
    weight, bias, statistics = problem(vocab=80, size=8)
    fitter = sign_fitter(weight, statistics, bias=bias, seed=3)
    fitter.greedy(40)
    prefix = fitter._codebook.clone()
    large, small = fitter.fit(40), fitter.fit(20)
    assert torch.equal(fitter._codebook, prefix)
    again = sign_fitter(weight, statistics, bias=bias, seed=3)
    again.greedy(40)
    assert torch.equal(again.fit(20).codes, small.codes)
    assert large.details["error"] < small.details["error"] < small.details["error_greedy"]


def test_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone():
    weight, bias, statistics = problem(vocab=80, size=8)
    state = torch.get_rng_state()
    first = fit_signs(weight, statistics, bias=bias, num_codebooks=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = fit_signs(weight, statistics, bias=bias, num_codebooks=20, seed=1)
    other = fit_signs(weight, statistics, bias=bias, num_codebooks=20, seed=2)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook, second.codebook)
    assert torch.equal(first.codebook_bias, second.codebook_bias)
    assert not torch.equal(first.codes, other.codes)


def test_tiles_and_blocks_of_large_layers_give_equal_quality(monkeypatch):
    weight, bias, statistics = problem(vocab=2000, size=24)
    errors = []
    for tile, block in ((10_000, 1), (300, 16)):
        monkeypatch.setattr(sign_codebook, "TILE", tile)
        monkeypatch.setattr(sign_greedy, "BLOCK", block)
        fit = fit_signs(weight, statistics, bias=bias, num_codebooks=32)
        errors.append(fit.details["error"])
    assert errors[1] < 1.05 * errors[0]


def test_memory_grows_neither_with_the_text_nor_with_vocabulary_times_bits(monkeypatch):
    """Beside the codes, which are bytes: no float matrix N x V, and none V x R."""
    vocab, size, bits, positions = 20_000, 64, 200, 10_000
    monkeypatch.setattr(signs, "ALTERNATIONS", 1)  # each uses the same memory
    weight = torch.randn(vocab, size, generator=torch.Generator().manual_seed(0))
    hidden = hidden_states(positions, size)
    with LargestFloats() as calibration:
        accumulator = StatisticsAccumulator(weight)
        accumulator.update(hidden)
        statistics = accumulator.finish()
    with LargestFloats() as fit:
        sign_fitter(weight, statistics).fit(bits)
    assert vocab * size <= calibration.elements < vocab * positions / 2
    assert vocab * size <= fit.elements < vocab * bits


def test_nested_fits_take_no_more_memory(monkeypatch):
    monkeypatch.setattr(signs, "ALTERNATIONS", 1)
    vocab, size, bits = 20_000, 32, 100
    weight, bias, statistics = problem(vocab=vocab, size=size)
    fitter = sign_fitter(weight, statistics, bias=bias)
    small = fitter.fit(bits)
    with LargestFloats() as fit:
        fitter.fit(2 * bits, inside=small)
    assert vocab * size <= fit.elements < vocab * bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fit_on_a_gpu_is_as_good_as_on_the_processor():
    weight, bias, statistics = problem(vocab=2_000, size=24)
    errors = {}
    for device in ("cpu", "cuda"):
        fit = sign_fitter(weight, statistics, bias=bias, device=device).fit(48)
        assert fit.codes.device.type == fit.codebook.device.type == device
        errors[device] = fit.details["error"]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


@settings(max_examples=20, deadline=None)
@given(
    vocab=st.integers(1, 20),
    size=st.integers(1, 6),
    bits=st.integers(1, 40),
    positions=st.integers(1, 8),
    zeros=st.booleans(),
)
# Codewords without end, and a search that drowned in their rounding.
@example(vocab=4, size=1, bits=14, positions=1, zeros=False)
@example(vocab=17, size=1, bits=19, positions=1, zeros=False)
def test_degenerate_layers_give_finite_fits(vocab, size, bits, positions, zeros):
    weight, bias, statistics = problem(vocab=vocab, size=size, positions=positions)
    if zeros:
        weight, bias = weight * 0, bias * 0
    fit = fit_signs(weight, statistics, bias=bias, num_codebooks=bits)
    assert torch.isfinite(fit.codebook).all()
    assert torch.isfinite(fit.codebook_bias).all()
    assert 0 <= fit.details["error"] <= 1
    assert fit.codes.shape == (vocab, -(-bits // 8))


def test_equal_rows_get_equal_logits():
    weight, bias, statistics = problem(vocab=30, size=6)
    weight[:], bias[:] = weight[0], bias[0]
    fit = fit_signs(weight, statistics, bias=bias, num_codebooks=8)
    found = logits(fit, hidden_states(20, 6))
    assert (found - found.mean(1, keepdim=True)).abs().max() < 1e-3


def test_progress_sees_every_stage():
    weight, bias, statistics = problem(vocab=30, size=6)
    seen = []

    def progress(what):
        seen.append(what)
        return iter

    fit_signs(weight, statistics, bias=bias, num_codebooks=8, progress=progress)
    assert seen == ["greedy codes", "refining 8 bits"]


def test_wrong_input_is_refused():
    weight, bias, statistics = problem(vocab=30, size=6)
    with pytest.raises(ValueError, match="`num_codebooks` must be at least 1, got 0"):
        fit_signs(weight, statistics, num_codebooks=0)
    weight[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 30 rows \(4\)"):
        sign_fitter(weight, statistics, bias=bias)


def signs_of(fit):
    """First and second signs, (V, R) and (F, R)."""
    bits = len(fit.codebook)
    second = torch.empty(0, bits) if fit.fine_codes is None else unpack_signs(fit.fine_codes, bits)
    return unpack_signs(fit.codes, bits), second


@pytest.mark.parametrize("fine", [0, 20, 200])
def test_a_fit_holds_the_bits_of_a_smaller_one(fine):
    weight, bias, statistics = problem(vocab=200, size=24)
    fitter = sign_fitter(weight, statistics, bias=bias)
    small, alone = fitter.fit(12, fine), fitter.fit(29, fine)
    # A codebook that was trained meanwhile does not matter to the bits.
    small.codebook, small.codebook_bias = 1.1 * small.codebook, 1.1 * small.codebook_bias
    fit = fitter.fit(29, fine, inside=small)
    for held, found in zip(signs_of(small), signs_of(fit), strict=True):
        assert torch.equal(found[:, :12], held)
    assert fine == 0 or torch.equal(fit.fine_ids, small.fine_ids)
    assert fit.codebook.shape == (29, 24)
    assert fit.details["error"] < 0.9 * fit.details["error_greedy"]
    assert fit.details["error"] < 1.5 * alone.details["error"]
    assert fit.details["error"] < 0.5 * small.details["error"]
    again = sign_fitter(weight, statistics, bias=bias).fit(29, fine, inside=small)
    assert torch.equal(again.codes, fit.codes)


@settings(max_examples=10, deadline=None)
@given(
    vocab=st.integers(1, 20),
    size=st.integers(1, 6),
    bits=st.lists(st.integers(1, 40), min_size=2, max_size=3, unique=True).map(sorted),
    share=st.floats(0, 1),
)
def test_nested_fits_of_degenerate_layers(vocab, size, bits, share):
    weight, bias, statistics = problem(vocab=vocab, size=size, positions=8)
    fitter, fit = sign_fitter(weight, statistics, bias=bias), None
    for count in bits:
        larger = fitter.fit(count, int(share * vocab), inside=fit)
        assert torch.isfinite(larger.codebook).all()
        if fit is not None:
            for held, found in zip(signs_of(fit), signs_of(larger), strict=True):
                assert torch.equal(found[:, : held.shape[1]], held)
        fit = larger


def test_a_fit_that_cannot_hold_the_smaller_one():
    weight, bias, statistics = problem(vocab=30, size=6)
    fitter = sign_fitter(weight, statistics, bias=bias)
    small = fitter.fit(8, 5)
    with pytest.raises(ValueError, match="`num_codebooks` 8 must be above the 8 of the fit that"):
        fitter.fit(8, 5, inside=small)
    with pytest.raises(ValueError, match="`num_fine_tokens` 4 must name .*to be held, which has 5"):
        fitter.fit(9, 4, inside=small)
