"""Judging heads and putting the figures into a report."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead, VQLogitsMixtureHead
from hf_vqlogits.embedding import VQEmbedding

from .calibration import CalibrationStatistics
from .codebooks import perplexity_bound
from .comparison import HeadScore, Logits, compare_heads, judge_model
from .coverage import EVALUATION_TEXT, OWN_TEXT, CoverageMeter, TextCoverage, warnings_of
from .environment import machine, versions
from .families import SourceParts, assemble
from .quantise import Quantiser
from .refining import FittedRefinement
from .report import ConversionReport
from .size_tables import LadderRung, NestedRung
from .sizes import HeadSize
from .source import Source
from .streaming import hidden_states
from .timing import logit_times
from .wording import last_part

QUANTISED = "quantised"
HEAD_ALONE = "head alone"
REFINED = "refined"


def assess(
    quantiser: Quantiser,
    source: Source,
    statistics: CalibrationStatistics,
    size: HeadSize,
    head: VQLogitsHead,
    embedding: VQEmbedding | None = None,
    refined: FittedRefinement | None = None,
    body: PreTrainedModel | None = None,
    *,
    method: str,
    embeddings: str = "keep",
    rungs: dict[HeadSize, VQLogitsHead],
) -> ConversionReport:
    """Assemble the converted model, judge it on the evaluation text and report.

    Args:
        quantiser: that made the heads.
        source: the original.
        statistics: of the calibration text.
        size: of the head.
        head: the chosen head; it is put into the type of the original's output layer.
        embedding: the quantised input embedding, likewise; None where the dense one stays.
        refined: refinement of the head, in that type as well; None where there is none.
        body: the trained one, with the embedding; None where the original's stays.
        method: that made the head.
        embeddings: how the embedding was made.
        rungs: heads of other sizes to compare with; where `size` holds smaller ones, these.

    Returns:
        The report, with the model.
    """
    parts, corpus = quantiser.parts, quantiser.corpus
    dtype = parts.weight.dtype
    before = model_size(source.model)
    table: Any = parts.backbone.get_input_embeddings().weight
    for one in (head, *rungs.values()):
        one.to(dtype)
    fields: dict[str, Any] = {"embeddings": embeddings}
    if isinstance(head, VQLogitsMixtureHead):
        fields["num_mixtures"] = head.num_mixtures
        fields["gate_activation"] = head.gate_activation
        fields["gate_temperature"] = head.gate_temperature
    input_tensors = [table]
    if embedding is not None:
        embedding.to(table.dtype)
        input_tensors = [*embedding.state_dict(keep_vars=True).values()]
    if embeddings == "vq" and embedding is not None:
        fields["embedding_codebooks"] = embedding.num_codebooks
    also: dict[str, Logits] = {}
    if refined is not None:
        refined.refinement.to(dtype)
        fields["refine_top_k"] = refined.refinement.top_k
        fields["refine_deviations"] = refined.refinement.deviations
        fields["refine_with_embedding"] = refined.refinement.weight is None
        also[REFINED] = refined.logits(parts, head)
    others: dict[str, Logits] = {**{str(s): h for s, h in rungs.items()}, **also}
    meter = CoverageMeter(statistics, corpus.calibration)
    coverage: dict[str, TextCoverage] = {}
    with quantiser.timed("evaluation"):
        # With a quantised embedding the sizes inside are judged behind that, below.
        alone = others if embedding is None else {}
        scores = _scores(quantiser, {QUANTISED: head, **alone}, meter, coverage)
        if corpus.own is not None:
            own = hidden_states(parts.backbone, corpus.own, skip=corpus.own_unscored)
            coverage |= meter.measure(own, OWN_TEXT)
    refinement = None if refined is None else refined.refinement
    converted = parts if body is None else replace(parts, backbone=body)
    model = assemble(converted, quantiser.config(size, **fields), head, embedding, refinement)
    model.generation_config = source.model.generation_config
    with quantiser.timed("evaluation"):
        if embedding is not None and body is None:
            scores[HEAD_ALONE] = scores[QUANTISED]
        behind: dict[str, Logits] = {} if embedding is None else others
        if embedding is not None or body is not None:
            behind = {**behind, QUANTISED: head}
        for name, layer in behind.items():
            scores[name] = _converted_score(quantiser, converted, layer, scores["dense"])
        times = logit_times(parts.weight, parts.bias, head, also)
        rung_times = {s: logit_times(parts.weight, parts.bias, h) for s, h in rungs.items()}
    vocab_size, hidden_size = parts.weight.shape
    storage, after = head.storage(), model_size(model)
    dense_parameters = vocab_size * hidden_size
    bias_parameters = 0 if parts.bias is None else vocab_size
    dense, quantised = scores["dense"], scores[QUANTISED]
    perplexity = {
        "before": dense.perplexity,
        "after": quantised.perplexity,
        "factor": quantised.perplexity / dense.perplexity,
    }
    if HEAD_ALONE in scores:
        perplexity["head_alone"] = scores[HEAD_ALONE].perplexity
    report = ConversionReport(
        source=source.hub_name or last_part(source.name),
        base_model=source.hub_name,
        output=None,
        repository=None,
        method=method,
        code_type=size.code_type,
        vocab_size=vocab_size,
        padded_tokens=source.padded_tokens,
        hidden_size=hidden_size,
        num_codebooks=size.num_codebooks,
        codebook_size=size.codebook_size,
        num_fine_tokens=size.num_fine_tokens,
        num_mixtures=head.num_mixtures,
        bits_per_token=storage["bits_per_token"],
        bits_per_weight=storage["bits_per_weight"],
        param_reduction=1 - storage["float_parameters"] / dense_parameters,
        head_before={
            "parameters": dense_parameters + bias_parameters,
            "bytes": (dense_parameters + bias_parameters) * dtype.itemsize,
        },
        head_after={
            "parameters": storage["float_parameters"],
            "bytes": storage["total_bytes"],
            "codes_bytes": storage["codes_bytes"],
            "codebook_bytes": storage["codebook_bytes"],
            "nested_bytes": storage["nested_bytes"],
        },
        model_parameters={"before": before[0], "after": after[0]},
        model_bytes={"before": before[1], "after": after[1]},
        embeddings=embeddings,
        embedding_before={"parameters": table.numel(), "bytes": table.nbytes},
        embedding_after=_own_size(input_tensors, head.state_dict(keep_vars=True).values()),
        tied_before=parts.tied,
        perplexity=perplexity,
        greedy_agreement=quantised.agreement,
        logit_seconds=times,
        calibration={
            "source": corpus.calibration_source,
            "tokens": corpus.calibration.numel(),
            "rereadings": quantiser.rereadings,
        },
        evaluation={
            "source": corpus.evaluation_source,
            "tokens": quantised.tokens,
            "context": corpus.context,
        },
        fit=quantiser.details,
        seconds=quantiser.seconds,
        versions=versions(),
        machine=machine(parts.weight.device),
        seed=quantiser.seed,
        coverage=coverage,
        likely_vocabulary=meter.likely_vocabulary,
        notes=[*warnings_of(coverage), *_notes(quantiser, head, embeddings)],
        model=model,
    )
    if refined is not None:
        batches = (hidden for hidden, _ in evaluation_batches(quantiser))
        with quantiser.timed("evaluation"):
            found = refined.judge(parts, head, batches)
        report.refinement = {
            "top_k": refined.refinement.top_k,
            "deviations": refined.refinement.deviations,
            "bytes": model_size(refined.refinement)[1],
            "perplexity": scores[REFINED].perplexity,
            "greedy_agreement": scores[REFINED].agreement,
            **vars(found),
        }
    if size.code_type == "index" and size.num_codebooks == 1:
        report.perplexity_bound = perplexity_bound(
            head.codes, corpus.evaluation[:, 1 + corpus.unscored :]
        )
    compared = [
        _rung(h, scores[str(s)], dense, rung_times[s][QUANTISED], dense_parameters)
        for s, h in rungs.items()
    ]
    if size.nested_codebooks:
        compared.append(_rung(head, quantised, dense, times[QUANTISED], dense_parameters))
        bits = (*size.nested_codebooks, size.num_codebooks)
        report.nested = [
            NestedRung(**vars(rung), num_codebooks=r)
            for rung, r in zip(compared, bits, strict=True)
        ]
    else:
        report.ladder = compared
    return report


def _scores(
    quantiser: Quantiser,
    heads: dict[str, Logits],
    meter: CoverageMeter,
    coverage: dict[str, TextCoverage],
) -> dict[str, HeadScore]:
    return compare_heads(
        meter.watch(evaluation_batches(quantiser), coverage, EVALUATION_TEXT),
        in_own_type(quantiser, quantiser.parts.logits),
        {name: in_own_type(quantiser, h) for name, h in heads.items()},
    )


def _converted_score(
    quantiser: Quantiser, converted: SourceParts, head: Logits, dense: HeadScore
) -> HeadScore:
    """Score of the head on the hidden states of the converted model's own backbone."""
    batches = evaluation_batches(quantiser, converted.backbone)
    return judge_model(batches, in_own_type(quantiser, head), dense.choices)


def evaluation_batches(
    quantiser: Quantiser, backbone: PreTrainedModel | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states (n, d) of the evaluation text and the tokens that follow (n,), in batches.

    Args:
        quantiser: of the model.
        backbone: default the original's.
    """
    return hidden_states(
        quantiser.parts.backbone if backbone is None else backbone,
        quantiser.corpus.evaluation,
        skip=quantiser.corpus.unscored,
        progress=quantiser.progress("evaluating"),
    )


def in_own_type(quantiser: Quantiser, layer: Logits) -> Logits:
    """The layer on hidden states in the type of the original's output weights."""
    dtype = quantiser.parts.weight.dtype
    return lambda hidden: layer(hidden.to(dtype))


def model_size(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of all that a checkpoint stores: these and persistent buffers.

    A tensor of several names (a tied embedding) counts once.
    """
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    size = sum(t.numel() * t.element_size() for t in stored.values())
    return sum(p.numel() for p in model.parameters()), size


def _own_size(tensors: Iterable[Tensor], of_head: Iterable[Tensor]) -> dict[str, int]:
    """Parameters, and bytes with codes, of tensors that are not the head's."""
    own = [t for t in tensors if not any(t is other for other in of_head)]
    floats = [t for t in own if t.is_floating_point()]
    return {"parameters": sum(t.numel() for t in floats), "bytes": sum(t.nbytes for t in own)}


def _notes(quantiser: Quantiser, head: VQLogitsHead, embeddings: str) -> list[str]:
    notes = list(quantiser.corpus.notes)
    if quantiser.parts.tied and embeddings == "keep":
        notes.append(
            "input and output shared one table; the input side keeps it, so the model's file does "
            "not shrink: memory traffic and time of the logits do; `--embeddings tied` shrinks it"
        )
    if head.code_type == "index" and head.num_codebooks == 1:
        notes.append(
            "with one codebook all tokens of a code get the same logit: sampling is uniform among "
            "them, and greedy decoding takes the one with the lowest id"
        )
    return notes


def _rung(
    head: VQLogitsHead, score: HeadScore, dense: HeadScore, seconds: float, dense_parameters: int
) -> LadderRung:
    storage = head.storage()
    return LadderRung(
        param_reduction=1 - storage["float_parameters"] / dense_parameters,
        bits_per_token=storage["bits_per_token"],
        bits_per_weight=storage["bits_per_weight"],
        bytes=storage["total_bytes"],
        perplexity=score.perplexity,
        perplexity_factor=score.perplexity / dense.perplexity,
        greedy_agreement=score.agreement,
        logit_seconds=seconds,
    )
