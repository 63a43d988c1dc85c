import pytest

from benchmarks.gru_svm_claims import accuracy_claim, time_claim, verdict


def test_verdicts():
    assert verdict([0.1, 0.2]) == "holds"
    assert verdict([-0.1, 0.0]) == "does not hold"
    assert verdict([-0.1, 0.2]) == "not decided"
    assert verdict([0.1]) == "not decided"


def test_seeds_are_paired():
    svm = [
        {"seed": 0, "accuracy": 0.8, "milliseconds": 2.0},
        {"seed": 1, "accuracy": 0.7, "milliseconds": 3.0},
    ]
    softmax = [
        {"seed": 1, "accuracy": 0.6, "milliseconds": 4.5},
        {"seed": 0, "accuracy": 0.5, "milliseconds": 2.2},
    ]
    found = accuracy_claim("tuned", svm, softmax)
    assert found["measured"]["least"] == pytest.approx(0.1)
    assert found["measured"]["most"] == pytest.approx(0.3)
    assert found["paper"] == pytest.approx(0.134)
    assert found["verdict"] == "holds"
    found = time_claim("prediction", "here", svm, softmax)
    assert found["claim"] == "faster prediction"
    assert found["verdict"] == "holds"
    assert found["measured"]["least"] == pytest.approx(1.1)
    assert found["measured"]["most"] == pytest.approx(1.5)
    assert found["paper"] == pytest.approx(100 / 82)
    with pytest.raises(ValueError, match="no seed in common"):
        accuracy_claim("tuned", svm[:1], softmax[:1])


def test_a_time_that_is_hardly_shorter_is_no_shorter():
    def times(*milliseconds):
        return [{"seed": seed, "milliseconds": each} for seed, each in enumerate(milliseconds)]

    for softmax, told in (
        ((1.02, 1.05), "holds"),
        ((1.02, 1.005), "not decided"),
        ((1.005, 0.9), "does not hold"),
    ):
        assert time_claim("training", "here", times(1, 1), times(*softmax))["verdict"] == told
