"""How well two classes are told apart: the usual scores, and the ROC curve on a fixed grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np

FALSE_POSITIVE_RATES = np.linspace(0, 1, 201)
SCORES = ("accuracy", "precision", "recall", "f1", "auc")


class Diverged(ValueError):
    """Scores are no numbers."""


def detection_scores(
    labels: np.ndarray, predicted: np.ndarray, decision: np.ndarray
) -> dict[str, Any]:
    """Scores of one classifier; class 1, an attack, is what is to be detected.

    Args:
        labels: 0 and 1 (N,).
        predicted: 0 and 1 (N,).
        decision: numbers (N,), larger for what is rather of class 1.

    Returns:
        `accuracy`, `precision`, `recall` and `f1` of class 1 (0 where nothing is predicted), `auc`,
        `confusion` (a row a true class, a column a predicted one), and `roc`: true positive rates
        at `FALSE_POSITIVE_RATES`, interpolated.

    Raises:
        Diverged: the decisions are not finite.
        ValueError: the labels are of one class.
    """
    # Not at the top: the tables are written without scikit-learn.
    from sklearn import metrics

    if not np.isfinite(decision).all():
        raise Diverged("the scores are not finite: the training diverged; try a smaller rate")
    if len(set(labels.tolist())) != 2:
        raise ValueError("The labels are of one class: there is nothing to tell apart.")
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, average="binary", zero_division=0.0
    )
    false, true, _ = metrics.roc_curve(labels, decision)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "auc": float(metrics.roc_auc_score(labels, decision)),
        "confusion": metrics.confusion_matrix(labels, predicted, labels=[0, 1]).tolist(),
        "roc": np.interp(FALSE_POSITIVE_RATES, false, true).round(5).tolist(),
    }


def mean_curve(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean, least and greatest true positive rates of several curves, point by point."""
    points = np.array(curves)
    return {
        "false_positive_rate": FALSE_POSITIVE_RATES.round(5).tolist(),
        "mean": points.mean(0).round(5).tolist(),
        "least": points.min(0).tolist(),
        "most": points.max(0).tolist(),
    }


def mean_confusion(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """Mean of confusion matrices."""
    mean: list[list[float]] = np.mean(np.array(matrices), axis=0).round(1).tolist()
    return mean
