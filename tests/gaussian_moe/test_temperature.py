from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vqlogits.gaussian_moe import TemperatureSchedule


@given(
    end=st.floats(0.01, 1),
    ratio=st.floats(1, 100),
    share=st.floats(0.05, 1),
    progress=st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_falls_from_start_to_end_and_stays(end, ratio, share, progress):
    schedule = TemperatureSchedule(end * ratio, end, share)
    assert schedule(0) == pytest.approx(end * ratio)
    assert schedule(share) == pytest.approx(end)
    assert schedule(1) == pytest.approx(end)
    values = [schedule(one) for one in sorted(progress)]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(values))


def test_halfway_is_the_geometric_mean():
    assert TemperatureSchedule(4.0, 1.0)(0.5) == pytest.approx(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0), "`start` must be positive and finite, got 0.0"),
        ((1.0, -1.0), "`end` must be positive and finite, got -1.0"),
        ((1.0, 2.0), "`end` must not be above `start`, got 2.0 and 1.0"),
        ((2.0, 1.0, 0.0), "`share` must be above 0 and at most 1, got 0.0"),
        ((2.0, 1.0, 1.5), "`share` must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(*values)
