"""Tables of time and memory, and of what the kernels' rounding and the refinement do."""

from collections.abc import Iterable, Mapping
from typing import Any

from .markdown import is_there, precise, results, table
from .warm_cold import TEMPERATURES


def codes_of(row: Mapping[str, Any]) -> str:
    """What the codes of a row of `benchmarks.speed` are."""
    if row["codebook_size"] is None:
        return f"R = {row['num_codebooks']:,}"
    return f"G = {row['num_codebooks']:,}, K = {row['codebook_size']:,}"


def speed(name: str = "speed") -> str:
    """Time of the logits beside dense layers, and what no kernel could go below.

    Args:
        name: of the results file; the table is empty where it is not there.
    """
    if not is_there(name):
        return ""
    header = (
        "V x d | rows | codes | warm | faster than float32 / bfloat16 | "
        "cold | faster than float32 / bfloat16 | by look-ups | by bytes"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield f"{row['vocab_size']:,} x {row['hidden_size']}"
        yield str(row["rows"])
        yield codes_of(row)
        for state in (row["warm"], row["cold"]):
            yield _milliseconds(state["milliseconds"]["quantised"])
            yield _times_faster(state)
        limits = row["limit_milliseconds"]
        yield _milliseconds(limits["lookups"]) if limits["lookups"] else ""
        yield _milliseconds(limits["bytes"])

    return table(header, map(cells, results(name)["rows"]))


def speed_peers() -> str:
    """All that was timed at a size, warm and cold, a column a number of rows."""
    rows = [row for row in results("speed")["rows"] if len(row["warm"]["milliseconds"]) > 3]
    header = " | ".join(["", *(f"N = {row['rows']}" for row in rows)])
    names = dict.fromkeys(name for row in rows for name in row["warm"]["milliseconds"])

    def cells(name: str) -> Iterable[str]:
        yield _in_words(name)
        for row in rows:
            times = [row[state]["milliseconds"].get(name) for state in ("warm", "cold")]
            yield " / ".join(_milliseconds(t) for t in times) if all(times) else ""

    return table(header, map(cells, names))


def loss() -> str:
    """Time of the training loss, forward and backward."""
    header = "layer | time | times that of VQ-Logits"

    def rows() -> Iterable[Iterable[str]]:
        for row in results("speed")["loss"]:
            times = row["milliseconds"]
            for name, value in times.items():
                yield (
                    _in_words(name),
                    f"{value:,.0f} ms",
                    f"{value / times['quantised']:.1f}",
                )

    return table(header, rows())


def _in_words(name: str) -> str:
    return name.replace("quantised", "VQ-Logits").replace("_", " ")


def _milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def _times_faster(figures: Mapping[str, Any]) -> str:
    return " / ".join(
        f"{figures[f'times_faster_than_{kind}']:.1f}x" for kind in ("float32", "bfloat16")
    )


def memory() -> str:
    """Memory of the training loss beside other layers; nothing where it is not measured."""
    if not is_there("memory"):
        return ""
    names = {
        "quantised": "VQ-Logits",
        "quantised_bfloat16": "under autocast",
        "dense_float32": "dense float32",
        "dense_bfloat16": "dense bfloat16",
        "adaptive softmax": "adaptive softmax",
    }

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield f"{row['rows']:,}"
        yield from (f"{row['bytes'][name] / 1e6:,.0f} MB" for name in names)
        yield " / ".join(
            f"{row[f'times_less_than_{kind}']:.1f}x" for kind in ("float32", "bfloat16")
        )

    rows = results("memory")["rows"]
    names = {name: words for name, words in names.items() if name in rows[0]["bytes"]}
    header = f"rows | {' | '.join(names.values())} | less than float32 / bfloat16"
    return table(header, map(cells, rows))


def refined() -> str:
    """What scoring the best logits again does to one model; nothing where it is not measured."""
    if not is_there("refined"):
        return ""
    rows = [row for row in results("refined")["rows"] if row["model"] == "smollm2"]
    texts = list(rows[0]["texts"])
    both = " / ".join(texts)
    header = (
        f"head | T, rule | same most likely token, {both} | tokens scored | certain | factor | "
        "one row, warm / cold | faster than float32 / bfloat16, warm | cold"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        figures = [row["texts"][text] for text in texts]
        plain = row["scored_again"] == "none"
        yield f"{row['reduction']:.0%}" if plain else ""
        yield "" if plain else row["scored_again"].removeprefix("T = ")
        yield " / ".join(f"**{one['greedy_agreement']:.2%}**" for one in figures)
        yield "" if plain else " / ".join(f"{one['scored']:.1f}" for one in figures)
        yield "" if plain else " / ".join(f"{one['certified']:.1%}" for one in figures)
        yield precise(row["factor"])
        times, faster = zip(*(times_of(row, key) for key in TEMPERATURES), strict=True)
        yield f"{' / '.join(times)} ms"
        yield from faster

    return table(header, map(cells, rows))


def times_of(row: Mapping[str, Any], temperature: str) -> tuple[str, str]:
    """Milliseconds of a row's logits, and how often they go into the dense layers' times."""
    faster = (row[f"faster_than_{dtype}"][temperature] for dtype in ("float32", "bfloat16"))
    return f"{row['milliseconds'][temperature]:.2f}", " / ".join(f"{one:.1f}x" for one in faster)


def generation() -> str:
    """Whole models that generate, dense and quantised; nothing where they are not measured."""
    if not is_there("generate_speed"):
        return ""
    header = (
        "model | R | | dense, tokens a second | quantised | faster | bound | share of the bound"
    )

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield row["model"]
        yield f"{row['bits']:,}"
        yield "compiled" if row["compiled"] else "eager"
        yield from (f"{row['tokens_per_second'][name]:.1f}" for name in ("dense", "quantised"))
        yield f"**{row['times_faster']:.2f}x**"
        yield f"{row['bound']:.2f}x"
        yield f"{row['share_of_the_bound']:.0%}"

    return table(header, map(cells, results("generate_speed")["rows"]))


def rounding() -> str:
    """What the CPU kernels' rounding does; nothing where it is not measured."""
    if not is_there("rounding"):
        return ""
    header = (
        "model | R | path | perplexity, worst text | same greedy token | largest error | "
        "largest logit"
    )

    def rows() -> Iterable[Iterable[str]]:
        for row in results("rounding")["rows"]:
            for path, texts in row["paths"].items():
                figures = texts.values()
                change = max((one["perplexity_change"] for one in figures), key=abs)
                yield (
                    row["model"],
                    f"{row['num_codebooks']:,}",
                    f"`{path}`",
                    f"{change:+.4%}",
                    f"{min(one['same_token'] for one in figures):.2%}",
                    f"{max(one['largest_error'] for one in figures):.4f}",
                    f"{max(one['largest_logit'] for one in figures):.1f}",
                )

    return table(header, rows())
