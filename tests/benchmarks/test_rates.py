import math

import pytest

from benchmarks.rates import FURTHER, at_edge, best, search


def test_the_rate_of_the_least_loss_is_the_best():
    found = {1e-4: 3.0, 3e-4: 2.9, 1e-3: math.nan, 3e-3: math.inf}
    assert best(found, float) == 3e-4
    with pytest.raises(ValueError, match=r"No training stayed finite .*0\.001, 0\.003"):
        best({1e-3: math.nan, 3e-3: math.inf}, float)


def test_edges():
    assert [at_edge(rate, [3, 1, 2]) for rate in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize(
    ("optimum", "rates", "tried"),
    [
        (4.0, [1, 4, 16], [1, 4, 16]),
        (64.0, [1, 4, 16], [1, 4, 16, 64, 256]),
        (0.25, [4, 1], [1 / 16, 1 / 4, 1, 4]),
        (7.0, [5], [5]),
    ],
)
def test_the_search_goes_on_while_the_last_rate_is_the_best(optimum, rates, tried):
    made = []

    def run(rate):
        made.append(rate)
        return abs(math.log(rate / optimum))

    found = search(run, rates, float)
    assert list(found) == pytest.approx(tried)
    assert sorted(made) == pytest.approx(tried)  # each once


def test_the_search_ends():
    found = search(lambda rate: -rate, [1, 2], float)
    assert list(found) == [2**i for i in range(2 + FURTHER)]
    # What diverges ends it as well.
    found = search(lambda rate: -rate if rate < 5 else math.nan, [1, 2], float)
    assert list(found) == [1, 2, 4, 8]
