import math

import numpy as np
import pytest

from benchmarks.log_log import describe, summarise

SIZES = (100, 1000, 10_000, 100_000)


def errors(power, noise, repetitions=30):
    draw = np.random.default_rng(0)
    return {
        n: [float(n**power * math.exp(noise * one)) for one in draw.standard_normal(repetitions)]
        for n in SIZES
    }


@pytest.mark.parametrize("power", [-0.5, -0.25, 0.0])
def test_an_exact_power_is_its_slope(power):
    slopes = summarise(errors(power, 0.0))["slopes"]
    assert set(slopes) == {"mean", "mean_large_n", "median", "median_large_n"}
    for slope in slopes.values():
        assert slope["value"] == pytest.approx(power, abs=1e-9)
        assert slope["low"] == pytest.approx(slope["high"], abs=1e-9)


def test_bands_hold_the_truth_and_narrow_with_repetitions():
    few, many = (summarise(errors(-0.5, 0.5, count))["slopes"]["mean"] for count in (10, 160))
    for slope in (few, many):
        assert slope["low"] < -0.5 < slope["high"]
    assert many["high"] - many["low"] < 0.6 * (few["high"] - few["low"])


def test_points_are_means_and_medians_with_bands():
    found = summarise({100: [1.0, 2.0, 9.0], 10: [4.0, 4.0, 4.0]})
    first, second = found["points"]
    assert (first["n"], second["n"]) == (10, 100)
    assert first["mean"] == {"value": 4.0, "low": 4.0, "high": 4.0}
    assert second["mean"]["value"] == 4.0
    assert second["median"]["value"] == 2.0
    assert second["mean"]["low"] < 4 < second["mean"]["high"]


def test_what_is_missing_is_left_out():
    found = summarise({10: [1.0, None, math.nan], 100: [0.1, 0.1, 0.1], 1000: [None, None, None]})
    assert [(point["n"], point["repetitions"]) for point in found["points"]] == [(10, 1), (100, 3)]
    assert found["slopes"]["mean"]["value"] == pytest.approx(-1)
    assert found["slopes"]["mean_large_n"] is None
    assert describe(None) == "-"
    assert describe({"value": -0.5, "low": -0.61, "high": -0.39}) == "-0.500 (-0.610, -0.390)"


def test_the_same_seed_gives_the_same_bands():
    assert summarise(errors(-0.5, 1.0)) == summarise(errors(-0.5, 1.0))
