"""Rows of the ablation as text, for the terminal and for the documents."""

from collections.abc import Iterable, Mapping
from typing import Any

from .markdown import is_there, precise, results, table

COLUMNS = (
    "head",
    "distilled",
    "trained",
    "R or G x K",
    "bits",
    "MB",
    "factor",
    "perplexity",
    "bound",
    "same greedy token",
)


def cells(row: Mapping[str, Any]) -> Iterable[str]:
    """What `COLUMNS` say of one condition."""
    texts, bounds = row["texts"].values(), row.get("perplexity_bound", {}).values()
    quantised = row["method"] is not None
    yield row["method"] or "dense"
    yield row["distilled"]
    yield row["trained"]
    yield codewords(row)
    yield f"{row['bits_per_token']:,.0f}" if quantised else ""
    yield f"{row['total_bytes'] / 1e6:.2f}" if quantised else ""
    yield precise(row["factor"])
    yield " / ".join(f"{text['perplexity']:.2f}" for text in texts)
    yield " / ".join(f"{bound:.1f}" for bound in bounds)
    yield " / ".join(f"{text['greedy_agreement']:.1%}" for text in texts)


def codewords(row: Mapping[str, Any]) -> str:
    """How many codewords: R, or G x K."""
    if row["method"] is None:
        return ""
    if row["code_type"] == "sign":
        return f"{row['num_codebooks']:,}"
    return f"{row['num_codebooks']:,} x {row['codebook_size']:,}"


def ablation(section: str) -> str:
    """The conditions of a section; nothing where they are not measured."""
    if not is_there("ablation"):
        return ""
    rows = [row for row in results("ablation")["rows"] if section in row["sections"]]
    return table(" | ".join(COLUMNS), map(cells, rows))
