"""Whether the calibration text covers what the model is used for.

Two measures of another text against the calibration text: the share of its tokens that never occur
in it, whose contexts the fit does not know, and the mean square of its hidden states, a dimension,
in coordinates where those of the calibration text have mean 0 and covariance I, for errors of the
output vectors are weighed by that covariance. The other text is the one that judges and, since a
held-out part of the calibration text is like it whatever it is, a little that the model writes by
itself.

Measured: tokens never seen and mean square, calibration texts by rows; "the same" is further on in
the text calibrated on. gpt2-novels (d 256, trained on novels; 39,936 tokens of calibration, 5,888
of each other text, 2,048 of its own):

|          | the same | its own  | novels   | wikitext | Python   | German   | manual   |
|----------|----------|----------|----------|----------|----------|----------|----------|
| novels   |  8% 1.07 | 15% 1.31 |          | 42% 1.26 | 27% 2.40 | 44% 1.54 | 42% 1.70 |
| wikitext | 14% 1.10 | 31% 3.53 | 28% 3.96 |          | 32% 2.34 | 63% 2.11 | 44% 1.94 |
| Python   | 10% 1.13 | 44% 6.12 | 44% 7.44 | 49% 3.80 |          | 46% 2.55 | 20% 2.17 |
| German   |  8% 1.09 | 46% 5.28 | 48% 6.47 | 44% 3.28 | 18% 3.60 |          | 42% 2.73 |
| French   |  7% 1.11 | 43% 5.36 | 44% 6.71 | 45% 3.13 | 15% 2.78 | 23% 1.33 | 38% 2.55 |

SmolLM2-135M-Instruct (d 576; 13,824, 2,048 and 2,048 tokens):

| wikitext | 20% 1.65 | 55% 3.55 | 42% 2.75 |          | 65% 3.56 | 77% 3.84 | 56% 3.60 |
| novels   | 14% 1.12 | 45% 4.18 |          | 47% 2.99 | 59% 5.09 | 59% 4.48 | 42% 5.51 |
| German   | 14% 1.05 | 44% 3.32 | 49% 4.00 | 41% 3.33 | 47% 2.36 |          | 50% 2.26 |

Python is source code of the standard library, German and French are translated manual pages, which
share commands and names, so that French covers German within the limits: the one miss. Manual is
CPython's language reference. A longer calibration text lowers the share of SmolLM2's own tokens
that is never seen, wikitext of 100,000 tokens to 39%, but a model trained on much writes what no
text of one kind covers, German no less than English: its own text tells that the calibration text
is narrow, not which language it is of. Hence a warning for the text that judges, and milder words
for the model's own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import CalibrationStatistics

EVALUATION_TEXT, OWN_TEXT = "evaluation", "own_text"
NAMES = {EVALUATION_TEXT: "the evaluation text", OWN_TEXT: "what the model writes by itself"}
UNSEEN_LIMIT = 0.25
HIDDEN_LIMIT = 2.0
LIKELY = 1.0  # positions of Fisher weight


@dataclass(frozen=True)
class TextCoverage:
    """How well the calibration text covers another one.

    Attributes:
        tokens: positions of the other text.
        unseen: share of its tokens that never occur in the calibration text.
        hidden: mean squared length of its hidden states, a dimension, where those of the
            calibration text have mean 0 and covariance I; 1 where both are alike.
    """

    tokens: int
    unseen: float
    hidden: float

    @property
    def bad(self) -> bool:
        """Whether a limit is passed."""
        return self.unseen > UNSEEN_LIMIT or self.hidden > HIDDEN_LIMIT

    def __str__(self) -> str:
        return (
            f"{self.unseen:.1%} of its tokens never occur in the calibration text, mean square of "
            f"its hidden states x{self.hidden:.2f}"
        )


class CoverageMeter:
    """Measures other texts against the calibration text.

    Args:
        statistics: of the calibration text.
        blocks: its token ids (rows, context + 1).
    """

    def __init__(self, statistics: CalibrationStatistics, blocks: Tensor):
        covariance = statistics.regularised_covariance().cpu()
        size = len(covariance)
        whiten = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), torch.eye(size, dtype=torch.float64), upper=False
        )
        self._mean = statistics.mean
        self._whiten = whiten.to(self._mean.device, torch.float32)  # (d, d)
        self._seen = torch.zeros(len(statistics.fisher), dtype=torch.bool)
        self._seen[blocks[:, 1:].flatten().cpu()] = True
        self.likely_vocabulary = float((statistics.fisher >= LIKELY).double().mean())

    def watch(
        self, batches: Iterable[tuple[Tensor, Tensor]], found: dict[str, TextCoverage], name: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass hidden states (n, d) and labels (n,) on, and put their coverage into `found`.

        Args:
            batches: of a text; where there are none, nothing is put.
            found: complete when the last batch has been taken.
            name: of the text in `found`.
        """
        tokens, unseen, length = 0, 0, 0.0
        for hidden, labels in batches:
            centred = (hidden - self._mean.to(hidden.dtype)).float()
            length += float((centred @ self._whiten.T).square().mean(1).double().sum())
            unseen += int((~self._seen[labels.cpu()]).sum())
            tokens += len(labels)
            yield hidden, labels
        if tokens:
            found[name] = TextCoverage(tokens, unseen / tokens, length / tokens)

    def measure(
        self, batches: Iterable[tuple[Tensor, Tensor]], name: str
    ) -> dict[str, TextCoverage]:
        """Coverage by `name` of a text given as in [`watch`]; empty where it is."""
        found: dict[str, TextCoverage] = {}
        for _ in self.watch(batches, found, name):
            pass
        return found


def warnings_of(coverage: dict[str, TextCoverage]) -> list[str]:
    """What a user should know about texts that the calibration text does not cover.

    Args:
        coverage: of texts, by name.

    Returns:
        A note for each that it does not cover.
    """
    limits = f"like texts have up to {UNSEEN_LIMIT:.0%} and x{HIDDEN_LIMIT:g}"
    notes = []
    evaluation, own = coverage.get(EVALUATION_TEXT), coverage.get(OWN_TEXT)
    if evaluation is not None and evaluation.bad:
        notes.append(
            f"the calibration text does not cover {NAMES[EVALUATION_TEXT]} ({evaluation}; "
            f"{limits}): it is of another language or domain, or too short, and the fit does not "
            "know what it is judged by; give --calibration-data more text, like what the model "
            "will read and write"
        )
    if own is not None and own.bad:
        notes.append(
            f"the calibration text covers only a part of {NAMES[OWN_TEXT]} ({own}; {limits}): the "
            "figures hold for use on text like the calibration text and may be worse elsewhere; "
            "for other or wider use give --calibration-data such text, or `self` for text that "
            "the model writes"
        )
    return notes
