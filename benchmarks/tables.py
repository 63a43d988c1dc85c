"""Write the tables of the documents from `benchmarks/results/`: no figure is copied by hand.

    python -m benchmarks.tables            # rewrite README.md and documents beside it
    python -m benchmarks.tables --check    # fail if they are not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, NAME one of `TABLES`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .ablation_table import ablation
from .finetuned_tables import HEADS, finetuned, learning_curve
from .markdown import is_there, precise, results, table, times
from .output_layer_tables import gate_rates, gru_svm, gru_svm_claims, margins, mixtures
from .speed_tables import generation, loss, memory, refined, rounding, speed, speed_peers
from .target_tables import bounds, targets

README = Path(__file__).parent.parent / "README.md"
DOCUMENTS = (
    README,
    *(
        README.parent / "docs" / name
        for name in (
            "ablation.md",
            "fitting.md",
            "gaussian_moe.md",
            "gru_svm.md",
            "kernels.md",
            "output_layers.md",
            "peers.md",
        )
    ),
)
SECTION = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def quality(model: str) -> str:
    """Factors of the heads of one model, fitted and distilled."""
    rows = [row for row in results("quality_fit")["rows"] if row["model"] == model]
    dense = rows[0]["dense_bytes_bfloat16"] / 1e6
    texts = list(rows[0]["texts"])
    before = " / ".join(f"{rows[0]['texts'][text]['dense_perplexity']:.2f}" for text in texts)
    header = (
        "head | bits a token | a weight | bytes (float32 codewords) | factor | "
        f"{' / '.join(texts)} | same greedy token | minutes"
    )
    seconds = {row["head"]: row["seconds"] for row in rows}

    def cells(row: dict[str, Any]) -> Iterable[str]:
        method, share, *distilled = row["head"].split()
        yield ", ".join([HEADS[method], share.replace(".0%", "%"), *distilled])
        yield f"{row['bits_per_token']:,.0f}"
        yield f"{row['bits_per_weight']:.2f}"
        yield f"{row['total_bytes'] / 1e6:.1f} MB"
        yield f"**{times(row['factor'])}**"
        yield " / ".join(times(row["texts"][text]["factor"]) for text in texts)
        yield " / ".join(f"{row['texts'][text]['greedy_agreement']:.1%}" for text in texts)
        fit = seconds[f"{method} {share}"] if distilled else 0  # what is distilled was fitted
        yield f"{(row['calibration_seconds'] + fit + row['seconds']) / 60:.0f}"

    first = ["dense, bfloat16", "", "16", f"{dense:.1f} MB", "1", f"perplexity {before}", "", ""]
    return table(header, [first, *map(cells, rows)])


def peers(model: str) -> str:
    """Heads of one model beside those of other methods, by bytes; nothing where not measured."""
    if not is_there("quality"):
        return ""
    rows = [row for row in results("quality")["rows"] if row["model"] == model]
    if not rows:
        return ""
    texts = list(rows[0]["texts"])
    header = "method | setting | MB | bits a weight | factor | same greedy token, " + " / ".join(
        texts
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        ours = row["peer"] == "sign codes"
        yield "**sign codes**" if ours else row["peer"]
        yield row["setting"]
        yield f"{row['bytes'] / 1e6:.2f}"
        yield f"{row['bits_per_weight']:.2f}"
        yield f"**{precise(row['factor'])}**" if ours else precise(row["factor"])
        yield " / ".join(f"{row['texts'][text]['greedy_agreement']:.1%}" for text in texts)

    return table(header, map(cells, sorted(rows, key=lambda row: row["bytes"])))


def finetuning() -> str:
    """Perplexity before and after equal fine-tuning."""
    found = results("finetuning")
    texts = list(found["rows"][0]["texts"])
    examples = {None: "before", "Trainer": "Trainer", "Accelerate": "Accelerate"}
    columns = [(text, example) for text in texts for example in examples]
    by_key = {(row["model"], row["example"]): row["texts"] for row in found["rows"]}
    names = {"dense": "dense", "vq": f"VQ-Logits, {found['param_reduction']:.0%}"}

    def cells(model: str) -> Iterable[str]:
        yield names[model]
        for text, example in columns:
            yield f"{by_key[model, example][text]:.2f}"

    ratios = (by_key["vq", e][text] / by_key["dense", e][text] for text, e in columns)
    header = "model | " + " | ".join(f"{text}, {examples[example]}" for text, example in columns)
    rows = [cells("dense"), cells("vq"), ["factor", *map(times, ratios)]]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "quality smollm2": lambda: quality("smollm2"),
    "quality gpt2-novels": lambda: quality("gpt2-novels"),
    "peers smollm2": lambda: peers("smollm2"),
    "peers gpt2-novels": lambda: peers("gpt2-novels"),
    "ablation size": lambda: ablation("size"),
    "ablation initialisation": lambda: ablation("initialisation"),
    "ablation mapping": lambda: ablation("mapping"),
    "ablation training": lambda: ablation("training"),
    "finetuning": finetuning,
    "finetuned": finetuned,
    "learning curve": learning_curve,
    "targets": targets,
    "bounds": bounds,
    "speed": speed,
    "speed amx": lambda: speed("speed_amx"),
    "speed peers": speed_peers,
    "loss": loss,
    "memory": memory,
    "refined": refined,
    "generation": generation,
    "rounding": rounding,
    "gru-svm": gru_svm,
    "gru-svm claims": gru_svm_claims,
    "margins": margins,
    "gate rates, exact": lambda: gate_rates(over=False),
    "gate rates, over": lambda: gate_rates(over=True),
    "mixtures": mixtures,
}


def rewrite(text: str) -> str:
    """The text with every table as the results have it.

    Raises:
        KeyError: a table of an unknown name.
    """
    return SECTION.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> int:
    """Rewrite or check the documents."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--check", action="store_true")
    options = p.parse_args()
    wrong = 0
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf8")
        after = rewrite(before)
        if not options.check:
            document.write_text(after, encoding="utf8")
        elif after != before:
            print(
                f"{document.name} is not what the results say: run `python -m benchmarks.tables`."
            )
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
