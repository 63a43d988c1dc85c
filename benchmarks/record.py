"""What every results file says: the command, the machine, the versions, and scores in one form."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_vqlogits.conversion.comparison import HeadScore
from hf_vqlogits.conversion.environment import machine, versions
from hf_vqlogits.conversion.report import without_nan

from .protocol import factor


def record(benchmark: str, *packages: str, **figures: Any) -> dict[str, Any]:
    """A result, with what is needed to make it again.

    Args:
        benchmark: name of the module.
        packages: whose versions matter besides the usual ones.
        figures: the result itself.
    """
    words = sys.argv[1:]
    for i, word in enumerate(words[:-1]):
        if word == "--work":
            words[i + 1] = "WORK"  # any folder does, and this one is of this machine
    return {
        "command": f"python -m benchmarks.{benchmark} {shlex.join(words)}".rstrip(),
        "machine": machine(),
        "versions": versions(*packages),
        **figures,
    }


def write(result: dict[str, Any], output: Path) -> None:
    """Write a result as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(result), indent=2, allow_nan=False)
    output.write_text(text + "\n", encoding="utf8")


def score_of(scores: Mapping[str, Mapping[str, HeadScore]], head: str) -> dict[str, Any]:
    """One head's factor, and what it did on each text.

    Args:
        scores: text -> head -> score, of [`protocol.Case.judge`].
        head: its name.
    """
    return {
        "factor": factor(scores, head),
        "texts": {
            text: {
                "dense_perplexity": by_head["dense"].perplexity,
                "perplexity": by_head[head].perplexity,
                "factor": by_head[head].perplexity / by_head["dense"].perplexity,
                "greedy_agreement": by_head[head].agreement,
                "tokens": by_head[head].tokens,
            }
            for text, by_head in scores.items()
        },
    }
