"""What a conversion did, as one object behind terminal, JSON, model card and plot."""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .coverage import NAMES, TextCoverage
from .size_tables import (
    CANDIDATE_COLUMNS,
    LADDER_COLUMNS,
    NESTED_COLUMNS,
    Candidate,
    LadderRung,
    NestedRung,
    candidate_cells,
    ladder_cells,
    nested_cells,
)
from .wording import last_part, megabytes, milliseconds, ratio, speeds

REPORT_FILE = "vq_report.json"


@dataclass
class ConversionReport:
    """Figures of a conversion. Bytes are counted, times are seconds, perplexity is by token.

    Attributes:
        source: the model that was converted: its name on the hub, the last part of its folder's
            path, or its class.
        output: the folder written, or None; `vq_report.json` holds the last part of its path.
        repository: to which that is uploaded, or None.
        method: how codes were made.
        code_type: `"sign"` or `"index"`.
        vocab_size: V.
        padded_tokens: rows of the output layer above the tokenizer's ids.
        hidden_size: d.
        num_codebooks: R for sign codes, G for index codes.
        codebook_size: K.
        num_fine_tokens: tokens with a second sign code.
        num_mixtures: softmaxes over the codebook that the output layer mixes.
        bits_per_token: mean length of a token's code.
        bits_per_weight: that over d.
        param_reduction: 1 - floats of codebook and biases / (V d), as the paper counts.
        head_before: `parameters` and `bytes` of the dense output layer.
        head_after: `parameters`, `bytes`, and of these `codes_bytes`, `codebook_bytes`, and
            `nested_bytes` of the codebooks of smaller heads inside.
        model_parameters: `before` and `after`, of the whole model; codes are none.
        model_bytes: `before` and `after`, of all that a checkpoint stores.
        embeddings: what became of the input embedding: `"keep"`, `"vq"` or `"tied"`.
        tied_before: input and output shared one table.
        embedding_before: `parameters` and `bytes` of the dense input embedding.
        embedding_after: likewise, with codes, of what the embedding does not share with the output
            layer.
        perplexity: `before`, `after` and their ratio `factor`, of the whole model; with a quantised
            input embedding also `head_alone`, what replacing the output layer alone gives. None
            without text.
        perplexity_bound: with one index codebook, the perplexity that no training can go below.
        greedy_agreement: share of positions where the most likely token stayed the same.
        logit_seconds: for one row, `dense_float32`, `dense_bfloat16`, `quantised`, and `refined`
            where the best logits are scored again.
        refinement: with `refine_top_k`: `top_k` and `deviations` of its rule, `bytes` that it adds
            to the model, `perplexity` and `greedy_agreement` of the refined logits, the mean number
            of tokens `scored` a position, and the share of positions where a bound on any error
            `certified` the best one. Else None.
        calibration: `source`, of a local path the last part, `tokens`, and `rereadings` of them.
        evaluation: likewise, and `context`.
        coverage: how well the calibration text covers others, by name: `evaluation`, and `own_text`
            where the model could write some to compare with.
        likely_vocabulary: share of the tokens that the calibration text makes likely.
        fit: what the method tells of itself.
        seconds: time of each step.
        ladder: sizes compared, with `--ladder`.
        nested: sizes that the output layer holds, with `--nested`; the last one is the whole.
        max_perplexity_increase: the option that chose the size, or None.
        candidates: sizes tried for it, smallest first.
        versions: of Python and packages.
        machine: processor or GPU, and threads.
        seed: of everything random.
        notes: what the user should know.
        base_model: the source's name on the hub; None where it did not come from there.
        model: the converted model; not written.
    """

    source: str
    output: str | None
    repository: str | None
    method: str
    code_type: str
    vocab_size: int
    padded_tokens: int
    hidden_size: int
    num_codebooks: int
    codebook_size: int
    num_fine_tokens: int
    bits_per_token: float
    bits_per_weight: float
    param_reduction: float
    head_before: dict[str, int]
    head_after: dict[str, int]
    model_parameters: dict[str, int]
    model_bytes: dict[str, int]
    embeddings: str
    tied_before: bool
    embedding_before: dict[str, int]
    embedding_after: dict[str, int]
    seed: int
    num_mixtures: int = 1
    perplexity: dict[str, float] | None = None
    perplexity_bound: float | None = None
    greedy_agreement: float | None = None
    logit_seconds: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    coverage: dict[str, TextCoverage] = field(default_factory=dict)
    likely_vocabulary: float | None = None
    fit: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ladder: list[LadderRung] = field(default_factory=list)
    nested: list[NestedRung] = field(default_factory=list)
    max_perplexity_increase: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refinement: dict[str, Any] | None = None
    base_model: str | None = None
    model: Any = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, ready for JSON, and for readers elsewhere: no folder above."""
        model, self.model = self.model, None
        try:
            values = asdict(self)
        finally:
            self.model = model
        del values["model"]
        if self.output is not None:
            values["output"] = last_part(self.output)
        return values

    def to_json(self) -> str:
        """The report as JSON, the same for the same figures."""
        values = without_nan(self.to_dict())
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write `vq_report.json` into `folder`."""
        (folder / REPORT_FILE).write_text(self.to_json(), encoding="utf8")

    def rows(self) -> list[tuple[str, str, str]]:
        """Lines of the before/after table: what, before, after."""
        before, after, times = self.head_before, self.head_after, self.logit_seconds
        rows = [
            (
                "output layer, float parameters",
                f"{before['parameters']:,}",
                f"{after['parameters']:,} ({-self.param_reduction:+.2%})",
            ),
            (
                "output layer, bytes (codes counted)",
                megabytes(before["bytes"]),
                f"{megabytes(after['bytes'])} "
                f"({ratio(before['bytes'], after['bytes'], 'smaller', 'larger')})",
            ),
            *self._nested_rows(),
            *self._embedding_rows(),
            (
                "whole model, parameters",
                f"{self.model_parameters['before']:,}",
                f"{self.model_parameters['after']:,}",
            ),
            (
                "whole model, bytes",
                megabytes(self.model_bytes["before"]),
                megabytes(self.model_bytes["after"]),
            ),
        ]
        if self.perplexity is not None:
            rows.append(
                (
                    "perplexity, held-out text",
                    f"{self.perplexity['before']:.2f}",
                    f"{self.perplexity['after']:.2f} (x{self.perplexity['factor']:.3f})",
                )
            )
            if "head_alone" in self.perplexity:
                alone = self.perplexity["head_alone"]
                factor = alone / self.perplexity["before"]
                rows.append(
                    ("with the output layer alone replaced", "", f"{alone:.2f} (x{factor:.3f})")
                )
        if self.greedy_agreement is not None:
            rows.append(("same most likely token", "", f"{self.greedy_agreement:.1%}"))
        if times:
            rows.append(
                (
                    "logits of one row (dense: float32 / bfloat16)",
                    f"{milliseconds(times['dense_float32'])} / "
                    f"{milliseconds(times['dense_bfloat16'])}",
                    f"{milliseconds(times['quantised'])} ({speeds(times)})",
                )
            )
        rows += self._refinement_rows()
        if self.perplexity_bound is not None:
            rows.append(
                ("least perplexity that one codebook allows", "", f"{self.perplexity_bound:.2f}")
            )
        return rows

    def _refinement_rows(self) -> list[tuple[str, str, str]]:
        found = self.refinement
        if found is None:
            return []
        rows = [
            ("with the best logits scored again: bytes added", "", megabytes(found["bytes"])),
            ("same most likely token", "", f"{found['greedy_agreement']:.2%}"),
        ]
        if self.perplexity is not None:
            factor = found["perplexity"] / self.perplexity["before"]
            rows.append(("perplexity", "", f"{found['perplexity']:.2f} (x{factor:.3f})"))
        if "refined" in self.logit_seconds:
            times = self.logit_seconds
            told = f"{milliseconds(times['refined'])} ({speeds(times, 'refined')})"
            rows.append(("logits of one row", "", told))
        return rows

    def _nested_rows(self) -> list[tuple[str, str, str]]:
        if not self.nested:
            return []
        size = megabytes(self.head_after["nested_bytes"])
        return [("of these, codebooks of smaller sizes", "", size)]

    def _embedding_rows(self) -> list[tuple[str, str, str]]:
        before, after = self.embedding_before, self.embedding_after
        if self.embeddings == "keep":
            return []
        own = " of its own" if self.embeddings == "tied" else ""
        return [
            (
                "input embedding, float parameters",
                f"{before['parameters']:,}",
                f"{after['parameters']:,}{own}",
            ),
            (
                "input embedding, bytes (codes counted)",
                megabytes(before["bytes"]),
                f"{megabytes(after['bytes'])}{own}",
            ),
        ]

    @property
    def input_side(self) -> str:
        """What became of the input embedding, in words."""
        if self.embeddings == "tied":
            return "tied: codes and codewords of the output layer, stored once for both"
        if self.embeddings == "vq":
            return "vq: sign codes and a codebook of its own"
        if self.tied_before:
            return "kept dense (it was tied to the output layer, so the model keeps that table)"
        return "kept dense"

    @property
    def distillation(self) -> str | None:
        """How codes and codebook were trained, or None where they were not."""
        return self._told("distillation", "the dense layer", "of each size; of the whole ")

    @property
    def end_to_end(self) -> str | None:
        """How the codebooks of both sides were trained through the body, or None."""
        return self._told("end to end", "the original model", "of the largest size alone: ")

    def _told(self, stage: str, teacher: str, of_several: str) -> str | None:
        done = self.fit.get(stage)
        if done is None:
            return None
        early = f"; ended early: {done['stopped']}" if done["stopped"] else ""
        which = of_several if self.nested else ""
        return (
            f"{which}{done['steps']:,} steps; divergence from {teacher} {done['kl_before']:.3g} -> "
            f"{done['kl_after']:.3g} nats a token, on text kept out of it{early}"
        )

    @property
    def whole_model(self) -> str | None:
        """How the body was trained with all else, or None where it is the original's."""
        return self._told("body", "the original model", "")

    @staticmethod
    def _refinement_rule(found: dict[str, Any]) -> str:
        """Which tokens are scored again, and what is certain of them, in words."""
        rule = f"of the {found['top_k']} best"
        if found["deviations"] is not None:
            rule += f" those within {found['deviations']:.2f} deviations of the errors"
        return (
            f"{rule}: {found['scored']:.1f} tokens a position on evaluation text; certain of the "
            f"most likely token, by a bound on any error, at {found['certified']:.1%} of positions"
        )

    def facts(self) -> list[tuple[str, str]]:
        """Lines about the head and how it was made."""
        if self.code_type == "sign":
            codes = f"sign, R = {self.num_codebooks:,}"
            if self.num_fine_tokens:
                codes += f", a second code for {self.num_fine_tokens:,} tokens"
            if self.nested:
                inside = ", ".join(f"{rung.num_codebooks:,}" for rung in self.nested[:-1])
                codes += f"; inside it R = {inside}"
        else:
            codes = f"index, G = {self.num_codebooks:,}, K = {self.codebook_size:,}"
        if self.num_mixtures > 1:
            codes += f", a mixture of {self.num_mixtures} softmaxes"
        vocabulary = f"V = {self.vocab_size:,}, d = {self.hidden_size:,}"
        if self.padded_tokens:
            vocabulary += f" ({self.padded_tokens:,} rows above the tokenizer's ids)"
        facts = [
            ("method, codes", f"{self.method}; {codes}"),
            ("vocabulary, hidden size", vocabulary),
            (
                "code",
                f"{self.bits_per_token:,.0f} bits a token, {self.bits_per_weight:.2f} a weight",
            ),
            ("input embedding", self.input_side),
        ]
        for name, text in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if text is not None:
                again = text.get("rereadings")
                often = f", read again {again}x with tokens redrawn" if again else ""
                facts.append((name, f"{text['source']}, {text['tokens']:,} tokens{often}"))
        if self.likely_vocabulary is not None:
            facts.append(
                ("tokens that the calibration text makes likely", f"{self.likely_vocabulary:.1%}")
            )
        for name, found in self.coverage.items():
            facts.append((f"coverage of {NAMES[name]}", str(found)))
        if self.distillation is not None:
            facts.append(("distillation", self.distillation))
        mixture = self._told("mixture", "the dense layer", "")
        if mixture is not None:
            facts.append(("distillation of the mixture", mixture))
        if self.end_to_end is not None:
            facts.append(("end-to-end distillation", self.end_to_end))
        if self.whole_model is not None:
            facts.append(("whole-model distillation", self.whole_model))
        if self.refinement is not None:
            facts.append(("best logits scored again", self._refinement_rule(self.refinement)))
        times = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return [*facts, ("time", times), ("seed", str(self.seed))]

    def print(self, console: Console | None = None) -> None:
        """Print the tables to the terminal."""
        console = console or Console()
        table = Table(title=f"{self.source} -> {self.output or 'VQ-Logits'}", title_justify="left")
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        for name, value in self.facts():
            console.print(f"[bold]{name}[/bold]: {value}", highlight=False)
        if self.ladder:
            rungs = [ladder_cells(rung) for rung in self.ladder]
            console.print(_grid("sizes to choose from", LADDER_COLUMNS, rungs))
        if self.nested:
            rungs = [nested_cells(rung) for rung in self.nested]
            console.print(_grid("sizes inside", NESTED_COLUMNS, rungs))
            console.print(f"load one of them: {self.loading_of_a_size()}", highlight=False)
        if self.candidates:
            tried = [candidate_cells(candidate) for candidate in self.candidates]
            console.print(_grid(self.search_title, CANDIDATE_COLUMNS, tried))
        for note in self.notes:
            console.print(f"[yellow]note[/yellow]: {note}", highlight=False)

    def loading_of_a_size(self) -> str:
        """A call that loads the smallest size inside."""
        bits = self.nested[0].num_codebooks
        return f'AutoModelForCausalLM.from_pretrained("{self.name}", num_codebooks={bits})'

    @property
    def name(self) -> str:
        """By which the model is loaded: its repository, or the last part of its folder."""
        return self.repository or last_part(self.output or "model")

    @property
    def search_title(self) -> str:
        """What the candidates were tried for."""
        allowed = 100 * (self.max_perplexity_increase or 0)
        return f"sizes tried for a perplexity of at most {allowed:+.4g}%"


def _grid(title: str, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        header = textwrap.fill(name, 7, break_long_words=False)  # within 80 columns
        table.add_column(header, justify="right", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def without_nan(value: Any) -> Any:
    """Plain data with None for figures that are not finite, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return value
