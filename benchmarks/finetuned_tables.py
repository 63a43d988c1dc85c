"""Tables of models that were fine-tuned as the dense one was."""

from collections.abc import Iterable
from typing import Any

from .markdown import is_there, results, table, times

HEADS = {
    "signs": "sign codes",
    "residual": "index codes, K = 4",
    "kmeans": "the paper's k-means, G = 1",
}
# The results of `benchmarks.finetuned`, by its number of steps.
LEARNING_CURVE = ("finetuned_25", "finetuned", "finetuned_400")


def finetuned() -> str:
    """Factors against the dense model fine-tuned equally; nothing where they are not measured."""
    if not is_there("finetuned"):
        return ""
    found = results("finetuned")
    rows = found["rows"]
    texts = list(rows[0]["texts"])
    header = (
        "head | not fine-tuned | same greedy token | learning rate | fine-tuned, mean | "
        f"least to most | {' / '.join(texts)} | same greedy token as the fine-tuned dense model | "
        "as the original"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield finetuned_name(row)
        untuned = row["untuned"]
        yield times(untuned["factor"])
        yield " / ".join(f"{untuned['texts'][t]['agreement_untuned_dense']:.1%}" for t in texts)
        yield f"{row['learning_rate']:g}"
        yield f"**{times(row['factor']['mean'])}**"
        yield " to ".join(times(row["factor"][end]) for end in ("least", "most"))
        figures = [row["texts"][text] for text in texts]
        if row["method"] is None:
            perplexity = (f"{one['perplexity']['mean']:.2f}" for one in figures)
            yield f"perplexity {' / '.join(perplexity)}"
        else:
            yield " / ".join(times(one["factor"]["mean"]) for one in figures)
        for kind in ("agreement_tuned_dense", "agreement_untuned_dense"):
            yield " / ".join(f"{one[kind]['mean']:.1%}" for one in figures)

    bounds = [
        f"No perplexity of {finetuned_name(row)} can be below "
        + " / ".join(f"{row['perplexity_bound'][text]:.1f}" for text in texts)
        + ".\n"
        for row in rows
        if "perplexity_bound" in row
    ]
    return table(header, map(cells, rows)) + "".join(f"\n{bound}" for bound in bounds)


def finetuned_name(row: dict[str, Any]) -> str:
    """Of a row, for readers."""
    if row["method"] is None:
        return "dense"
    tied = ["input tied"] if row["embeddings"] == "tied" else []
    whole = ["whole model distilled"] if row["whole"] else []
    return ", ".join([HEADS[row["method"]], f"{row['reduction']:.0%}", *tied, *whole])


def learning_curve() -> str:
    """Factors of sign codes at 99% by the number of steps; nothing where there are none."""
    found = [results(name) for name in LEARNING_CURVE if is_there(name)]
    if not found:
        return ""
    texts = list(found[0]["rows"][0]["texts"])

    def cells(run: dict[str, Any]) -> Iterable[str]:
        rows = {row["name"]: row for row in run["rows"]}
        dense, signs = rows["dense"], rows["signs-99"]
        yield f"{run['steps']:,}"
        yield f"{run['steps'] * run['tokens_per_step']:,}"
        yield " / ".join(f"{row['learning_rate']:g}" for row in (dense, signs))
        yield " / ".join(f"{dense['texts'][text]['perplexity']['mean']:.2f}" for text in texts)
        yield f"**{times(signs['factor']['mean'])}**"
        yield " / ".join(times(signs["texts"][text]["factor"]["mean"]) for text in texts)
        for text in texts:
            yield f"{signs['texts'][text]['agreement_tuned_dense']['mean']:.1%}"
        yield str(len(signs["seeds"]))

    header = (
        "steps | tokens | learning rate, dense / sign codes | dense perplexity, "
        f"{' / '.join(texts)} | factor | {' / '.join(texts)} | "
        + " | ".join(f"same greedy token, {text}" for text in texts)
        + " | seeds"
    )
    return table(header, map(cells, found))
