import pytest

from benchmarks.gru_svm_claims import accuracy_claim, time_claim, verdict


def test_verdicts():
    assert verdict([0.1, 0.2]) == "holds"
    assert verdict([-0.1, 0.0]) == "does not hold"
    assert verdict([-0.1, 0.2]) == "not decided"
    assert verdict([0.1]) == "not decided"


def test_seeds_are_paired():
    svm = [{"seed": 0, "accuracy": 0.8, "s": 2.0}, {"seed": 1, "accuracy": 0.7, "s": 3.0}]
    softmax = [{"seed": 1, "accuracy": 0.6, "s": 4.5}, {"seed": 0, "accuracy": 0.5, "s": 2.2}]
    found = accuracy_claim("tuned", svm, softmax)
    assert found["measured"]["least"] == pytest.approx(0.1)
    assert found["measured"]["most"] == pytest.approx(0.3)
    assert found["paper"] == pytest.approx(0.134)
    assert found["verdict"] == "holds"
    found = time_claim("faster", "here", svm, softmax, seconds="s")
    assert found["measured"]["least"] == pytest.approx(1.1)
    assert found["measured"]["most"] == pytest.approx(1.5)
    assert found["paper"] == pytest.approx(100 / 82)
    with pytest.raises(ValueError, match="no seed in common"):
        accuracy_claim("tuned", svm[:1], softmax[:1])
