"""What the GRU-SVM paper says of its model, beside what was measured here.

Agarap (2017) compares GRU-SVM with GRU-softmax on honeypot records of Kyoto University, one
training each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .pairing import spread

PAPER = {
    "accuracy": {"squared_hinge": 0.8415, "cross_entropy": 0.7075},
    "training_seconds": {"squared_hinge": 1003.0, "cross_entropy": 1031.0},
    "prediction_seconds": {"squared_hinge": 82.0, "cross_entropy": 100.0},
}
NO_FASTER = 0.01  # a time that is shorter by less than this share is no shorter

Run = Mapping[str, Any]


def verdict(differences: Sequence[float]) -> str:
    """Whether a claim holds, of which each seed's difference is above 0 where it holds.

    Returns:
        `"holds"` or `"does not hold"` where all seeds agree and there are several, else
        `"not decided"`.
    """
    if len(differences) < 2:
        return "not decided"
    if all(difference > 0 for difference in differences):
        return "holds"
    return "does not hold" if all(d <= 0 for d in differences) else "not decided"


def accuracy_claim(setting: str, svm: Sequence[Run], softmax: Sequence[Run]) -> dict[str, Any]:
    """That GRU-SVM is more accurate on the test records, seed by seed.

    Args:
        setting: in which both were trained, for readers.
        svm: runs with `seed` and `accuracy`.
        softmax: likewise, of the same seeds.
    """
    differences = [one["accuracy"] - other["accuracy"] for one, other in _pairs(svm, softmax)]
    paper = PAPER["accuracy"]
    return {
        "claim": "more accurate than GRU-softmax",
        "setting": setting,
        "paper": paper["squared_hinge"] - paper["cross_entropy"],
        "unit": "difference of accuracies",
        "measured": spread(differences),
        "verdict": verdict(differences),
    }


def time_claim(
    what: str, setting: str, svm: Sequence[Run], softmax: Sequence[Run]
) -> dict[str, Any]:
    """That GRU-SVM takes less time, seed by seed.

    Args:
        what: `"training"` or `"prediction"`.
        setting: for readers.
        svm: times with `seed` and `milliseconds`.
        softmax: likewise, of the same seeds, each taken in turns with the other.
    """
    ratios = [other["milliseconds"] / one["milliseconds"] for one, other in _pairs(svm, softmax)]
    paper = PAPER[f"{what}_seconds"]
    return {
        "claim": f"faster {what}",
        "setting": setting,
        "paper": paper["cross_entropy"] / paper["squared_hinge"],
        "unit": "times as fast",
        "measured": spread(ratios),
        "verdict": verdict([ratio - 1 - NO_FASTER for ratio in ratios]),
    }


def _pairs(svm: Sequence[Run], softmax: Sequence[Run]) -> list[tuple[Run, Run]]:
    others = {run["seed"]: run for run in softmax}
    pairs = [(run, others[run["seed"]]) for run in svm if run["seed"] in others]
    if not pairs:
        raise ValueError("The two have no seed in common.")
    return pairs
