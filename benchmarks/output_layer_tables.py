"""Tables of the other output layers: GRU-SVM, margins, mixtures, and the gates of experts."""

from collections.abc import Iterable
from statistics import mean
from typing import Any

from .markdown import is_there, results, table, times


def _rate(rate: float, at_edge: bool, *, of: str = "") -> str:
    return f"{of}{rate:g}" + (" (first or last of those tried)" if at_edge else "")


def gru_svm() -> str:
    """GRU-SVM beside GRU-softmax and others; nothing where they are not measured."""
    if not is_there("gru_svm"):
        return ""
    found = results("gru_svm")
    scores = ("accuracy", "precision", "recall", "f1", "auc")
    header = (
        "model | learning rate | accuracy | least to most | precision | recall | F1 | AUC | "
        "normal: right / alarm | attacks: missed / found | training | prediction"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield row["name"]
        yield _rate(row["rate"], row["rate_at_edge"]) if row["network"] else ""
        yield f"**{row['accuracy']['mean']:.2%}**"
        yield " to ".join(f"{row['accuracy'][end]:.2%}" for end in ("least", "most"))
        for score in scores[1:]:
            yield f"{row[score]['mean']:.3f}"
        for counts in row["confusion"]:
            yield " / ".join(f"{count:,.0f}" for count in counts)
        yield f"{row['training_seconds']['mean']:.1f} s"
        yield f"{row['prediction_seconds']['mean']:.2f} s"

    return table(header, map(cells, found["rows"]))


def gru_svm_claims() -> str:
    """The paper's claims and what became of them; nothing where they are not measured."""
    if not is_there("gru_svm"):
        return ""

    def cells(claim: dict[str, Any]) -> Iterable[str]:
        percent = claim["unit"] == "difference of accuracies"

        def told(value: float) -> str:
            return f"{100 * value:+.2f} points" if percent else times(value)

        yield f"{claim['claim']}, {claim['setting']}"
        yield told(claim["paper"])
        yield told(claim["measured"]["mean"])
        yield " to ".join(told(claim["measured"][end]) for end in ("least", "most"))
        yield f"**{claim['verdict']}**"

    header = "GRU-SVM against GRU-softmax | in the paper | here, mean | least to most | claim"
    return table(header, map(cells, results("gru_svm")["claims"]))


def margins() -> str:
    """The squared hinge loss beside cross-entropy; nothing where they are not measured."""
    if not is_there("margins"):
        return ""
    rows = results("margins")["rows"]
    texts = list(rows[0]["untrained"]["texts"])
    header = (
        "loss | learning rate | of the head | best by | "
        f"right tokens, {' / '.join(texts)}: fitted | trained | least to most | "
        "perplexity: fitted | trained | of scaled logits: fitted | trained"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        def each(name: str) -> list[list[float]]:
            return [[made["texts"][text][name] for made in row["runs"]] for text in texts]

        def before(name: str) -> list[float]:
            return [row["untrained"]["texts"][text][name] for text in texts]

        yield row["output_loss"]
        yield _rate(row["runs"][0]["learning_rate"], row["rate_at_edge"])
        yield f"x{row['runs'][0]['head_factor']:g}"
        yield ", ".join(row["chosen_by"])
        yield " / ".join(f"{one:.2%}" for one in before("right"))
        yield " / ".join(f"**{mean(one):.2%}**" for one in each("right"))
        yield " / ".join(f"{min(one):.2%} to {max(one):.2%}" for one in each("right"))
        for name in ("perplexity", "perplexity_scaled"):
            yield " / ".join(f"{one:,.2f}" for one in before(name))
            yield " / ".join(f"{mean(one):,.2f}" for one in each(name))

    return table(header, map(cells, rows))


def mixtures() -> str:
    """Mixtures of softmaxes beside one; nothing where they are not measured."""
    if not is_there("mixtures"):
        return ""
    rows = results("mixtures")["rows"]
    texts = list(rows[0]["untrained"])
    header = (
        "softmaxes | gate | R | float parameters | learning rate | of the layer | "
        "of what only a mixture has | "
        f"perplexity, {' / '.join(texts)}: fitted | trained | least to most | largest share | "
        "factors differ by, before and after | one row's logits | loss"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        one = row["num_mixtures"] == 1
        found = [[made["perplexity"][text] for made in row["runs"]] for text in texts]
        yield str(row["num_mixtures"])
        yield "" if one else row["gate_activation"]
        yield str(row["num_codebooks"])
        yield f"{row['float_parameters']:,}"
        yield _rate(row["runs"][0]["learning_rate"], row["rate_at_edge"])
        edge = row["factor_at_edge"]  # of the one that this row has searched
        yield _rate(row["runs"][0]["layer_factor"], one and edge, of="x")
        yield "" if one else _rate(row["runs"][0]["mixture_factor"], edge, of="x")
        yield " / ".join(f"{row['untrained'][text]:.3f}" for text in texts)
        yield " / ".join(f"**{mean(runs):.3f}**" for runs in found)
        yield " / ".join(f"{min(runs):.3f} to {max(runs):.3f}" for runs in found)
        yield "" if one else f"{mean(made['shares']['largest'] for made in row['runs']):.2f}"
        if one:
            yield ""
        else:
            after = mean(made["differences"]["factors"] for made in row["runs"])
            yield f"{row['untrained_differences']['factors']:.3f}, {after:.3f}"
        for name in ("logits", "loss"):
            yield times(row["seconds"][name] / row["seconds"][f"{name}_of_one_softmax"])

    return table(header, map(cells, rows))


def gate_rates(over: bool) -> str:
    """Slopes of the errors of both gates, with as many components as the truth or one more."""
    gates = {"plain": "plain", "gelu": "GELU"}

    def slope(row: dict[str, Any], over_n: str) -> str:
        found = row["slopes"][over_n]
        return f"{found['value']:.2f} ({found['low']:.2f}, {found['high']:.2f})"

    def rows() -> Iterable[Iterable[str]]:
        for row in results("gate_rates")["rows"]:
            gate, components = row["setting"].split("-")
            if (components == "over") == over:
                expected = row["expected_slope"]
                theory = "none" if expected is None else f"{expected:g}"
                slopes = (slope(row, name) for name in ("median", "median_large_n"))
                yield gates[gate], row["quantity"], theory, *slopes

    return table("gate | error of | theory | slope over all n | over the upper half", rows())
