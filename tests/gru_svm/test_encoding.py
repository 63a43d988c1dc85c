import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.gru_svm.encoding import (
    encode,
    fit_categories,
    fit_quantiles,
    fit_standardisation,
    is_constant,
    unknown,
)

NUMBERS = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=60
).map(np.array)


def test_categories_are_indexed_and_unknown_ones_have_an_index_of_their_own():
    fitted = fit_categories(np.array(["udp", "tcp", "udp", "icmp"], dtype=object))
    assert fitted == {"categories": ["icmp", "tcp", "udp"]}
    values = np.array(["tcp", "sctp", "icmp", "udp"], dtype=object)
    np.testing.assert_allclose(encode(values, fitted), [2 / 3, 0, 1 / 3, 1])
    assert unknown(values, fitted).tolist() == [False, True, False, False]


def test_deciles_hold_as_many_values_each():
    fitted = fit_quantiles(np.random.default_rng(0).permutation(1000).astype(float), 10)
    assert len(fitted["edges"]) == 9
    found = encode(np.arange(1000.0), fitted)
    bins, counts = np.unique(found, return_counts=True)
    np.testing.assert_allclose(bins, np.arange(10) / 9, rtol=1e-6)
    assert counts.min() >= 99
    assert counts.max() <= 101
    assert encode(np.array([-5.0, 5000.0]), fitted).tolist() == [0, 1]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95, 0.999])
def test_two_values_stay_two(share):
    values = np.zeros(1000)
    values[: int(1000 * share)] = 1
    assert sorted(set(encode(values, fit_quantiles(values, 10)))) == [0, 1]


def test_standardisation():
    values = np.random.default_rng(0).normal(40, 3, 500)
    found = encode(values, fit_standardisation(values))
    assert found.dtype == np.float32
    wanted = (values - values.mean()) / np.sqrt(((values - values.mean()) ** 2).mean())
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(NUMBERS, st.integers(2, 12))
def test_bins_keep_the_order_and_the_extremes_apart(values, bins):
    fitted = fit_quantiles(values, bins)
    found = encode(values, fitted)
    assert len(fitted["edges"]) < bins
    assert found.min() >= 0
    assert found.max() <= 1
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    if values.min() < values.max():
        assert (found[values.argmin()], found[values.argmax()]) == (0, 1)
    else:
        assert is_constant(fitted)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e300])
def test_a_constant_tells_nothing_and_never_will(value):
    values = np.full(7, value)
    for fitted in (fit_quantiles(values, 10), fit_standardisation(values)):
        assert is_constant(fitted)
        assert encode(np.array([value, 1e9, -5.0]), fitted).tolist() == [0, 0, 0]
    assert is_constant(fit_categories(np.array(["a", "a"], dtype=object)))
    assert not is_constant(fit_categories(np.array(["a", "b"], dtype=object)))


def test_extremes_stay_finite():
    fitted = fit_standardisation(np.array([0.0, 1e-200]))
    assert np.isfinite(encode(np.array([1e300, -1e300]), fitted)).all()
    with pytest.raises(ValueError, match="up to 1e.308 are too large.*use quantile bins"):
        fit_standardisation(np.array([1e308, -1e308]))
    fitted = fit_quantiles(np.array([1e308, -1e308]), 10)
    assert encode(np.array([1e308, -1e308]), fitted).tolist() == [1, 0]
