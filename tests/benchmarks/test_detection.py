import numpy as np
import pytest

from benchmarks.detection import FALSE_POSITIVE_RATES, detection_scores, mean_confusion, mean_curve

pytest.importorskip("sklearn")

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
DECISION = np.array([-3.0, -2, -1, 2, -2.5, 0.5, 1, 1.5, 3, 4])


def test_scores_by_hand():
    found = detection_scores(LABELS, (DECISION > 0).astype(int), DECISION)
    assert found["confusion"] == [[3, 1], [1, 5]]
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(5 / 6)
    pairs = [(one > other) for one in DECISION[LABELS == 1] for other in DECISION[LABELS == 0]]
    assert found["auc"] == pytest.approx(np.mean(pairs))
    assert len(found["roc"]) == len(FALSE_POSITIVE_RATES)
    assert (found["roc"][0], found["roc"][-1]) == (pytest.approx(2 / 6, abs=1e-5), 1)
    assert (np.diff(found["roc"]) >= 0).all()


def test_nothing_detected():
    found = detection_scores(LABELS, np.zeros(10, dtype=int), DECISION)
    assert found["precision"] == found["recall"] == found["f1"] == 0
    assert found["confusion"] == [[4, 0], [6, 0]]


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="diverged"):
        detection_scores(LABELS, LABELS, np.full(10, np.nan))
    with pytest.raises(ValueError, match="of one class"):
        detection_scores(np.ones(10, dtype=int), LABELS, DECISION)


def test_means():
    curve = mean_curve([[0.0, 1.0], [0.5, 1.0]])
    assert (curve["mean"], curve["least"], curve["most"]) == ([0.25, 1], [0, 1], [0.5, 1])
    assert mean_confusion([[[1, 2], [3, 4]], [[2, 2], [3, 4]]]) == [[1.5, 2], [3, 4]]
