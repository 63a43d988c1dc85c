import math

import pytest

from benchmarks.pairing import pair, paired, spread


def run(rate=1e-3, held=1.0, **texts):
    return {
        "rate": rate,
        "held_out_nats": held,
        "texts": {name: {"nats": nats, "choices": list(c)} for name, (nats, c) in texts.items()},
    }


def test_a_pair():
    found = pair(
        run(a=(2.0, [1, 2, 3, 4]), b=(3.0, [5, 5])),
        run(a=(1.9, [1, 2, 3, 0]), b=(3.1, [5, 5])),
        run(a=(2.5, [1, 0, 0, 0]), b=(3.5, [5, 6])),
    )
    assert found["factor"] == pytest.approx(1.0)  # exp of the mean of 0.1 and -0.1
    assert found["texts"]["a"] == pytest.approx(
        {
            "dense_perplexity": math.exp(1.9),
            "perplexity": math.exp(2.0),
            "factor": math.exp(0.1),
            "agreement_tuned_dense": 0.75,
            "agreement_untuned_dense": 0.25,
        }
    )
    assert found["texts"]["b"]["agreement_untuned_dense"] == 0.5


def test_seeds_are_paired_with_themselves():
    runs = {0: run(a=(2.2, [1])), 1: run(a=(2.6, [1])), 7: run(a=(9.0, [1]))}
    dense = {1: run(a=(2.5, [1])), 0: run(a=(2.0, [2]))}
    found = paired(runs, dense, run(a=(3.0, [1])))
    assert [one["seed"] for one in found["seeds"]] == [0, 1]
    one, two = math.exp(0.2), math.exp(0.1)
    assert found["factor"] == pytest.approx(
        {
            "mean": (one + two) / 2,
            "least": two,
            "most": one,
            "deviation": (one - two) / math.sqrt(2),
        }
    )
    assert found["texts"]["a"]["perplexity"]["most"] == pytest.approx(math.exp(2.6))
    assert found["texts"]["a"]["agreement_tuned_dense"]["mean"] == 0.5
    with pytest.raises(ValueError, match=r"No seed in common: \[7\] and \[0, 1\]"):
        paired({7: runs[7]}, dense, run(a=(3.0, [1])))


def test_spread():
    assert spread([2.0]) == {"mean": 2.0, "least": 2.0, "most": 2.0, "deviation": 0.0}
    assert spread([1.0, 2.0, 6.0])["deviation"] == pytest.approx(math.sqrt(7))
