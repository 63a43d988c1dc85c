"""Results files, and how their figures are written in Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def is_there(name: str) -> bool:
    """Whether a results file is there: it is not while nobody has run the benchmark in full."""
    return (RESULTS / f"{name}.json").exists()


def results(name: str) -> dict[str, Any]:
    """A results file."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf8"))
    return loaded


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; columns of the header are parted by |."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|---" * columns + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def times(factor: float) -> str:
    """A factor, with four digits or one decimal."""
    return f"x{factor:.3f}" if factor < 10 else f"x{factor:.1f}"


def precise(factor: float) -> str:
    """A factor, with five digits where it is near to one."""
    return f"x{factor:.4f}" if factor < 2 else times(factor)
