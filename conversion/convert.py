"""The conversion: load, prove, calibrate, fit, judge, write."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.gates import LINEAR

from .assessment import assess
from .calibration import CalibrationStatistics
from .card import PLOT_FILE, model_card, plot
from .checkpoint import (
    check_output,
    check_room,
    output_bytes,
    whole_or_nothing,
    write_checkpoint,
)
from .choice import check_choice, sizes_to_choose_from
from .corpus import prepare_corpus
from .distillation_state import check_state_file, state_files
from .embeddings import check_embeddings, choose_embedding_bits, embedding_bytes
from .errors import ConversionError
from .families import take_apart
from .held_out import check_length, keep_out
from .mixing import check_mixture, mix
from .nested_sizes import check_nested, choose_nested_size
from .nesting import nested_heads
from .options import (
    LAST_SEED,
    REFINE_AGREEMENT,
    check_body_steps,
    check_input_steps,
    check_options,
    check_range,
    check_refinement,
    distillation_steps,
)
from .quantise import LADDER, REREADINGS, Quantiser
from .report import ConversionReport
from .selection import select_head
from .sizes import HeadSize, check_size_options, choose_size
from .source import Source, load_source


def convert_to_vq(
    model_or_path: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
    output: str | os.PathLike[str] | None = None,
    method: str = "signs",
    param_reduction: float | None = None,
    bits: int | None = None,
    bits_per_weight: float | None = None,
    max_perplexity_increase: float | None = None,
    nested: Sequence[float] | None = None,
    num_codebooks: int | None = None,
    codebook_size: int | None = None,
    fine_share: float | None = None,
    calibration_data: str | os.PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    rereadings: int = REREADINGS,
    eval_data: str | os.PathLike[str] | None = None,
    distill_steps: int | None = None,
    distill_state: str | os.PathLike[str] | None = None,
    embeddings: str = "keep",
    embedding_bits: int | None = None,
    input_distill_steps: int | None = None,
    body_distill_steps: int = 0,
    num_mixtures: int = 1,
    gate_activation: str = LINEAR,
    gate_temperature: float = 1.0,
    refine_top_k: int = 0,
    refine_agreement: float = REFINE_AGREEMENT,
    ladder: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Replace the output layer of a causal language model by a vector-quantised one.

    Args:
        model_or_path: hub name, folder, or a loaded model. A loaded model's backbone becomes that
            of the converted one, without a copy, and has its input embedding replaced where
            `embeddings` says so.
        tokenizer: of a loaded model; a folder brings its own.
        gguf_file: load this GGUF file of the folder.
        output: folder to write; None writes nothing.
        method: `"signs"` (sign codes fitted in the metric of the logits), `"residual"` (several
            index codebooks), or the paper's single codebook with one of its initialisations,
            `"kmeans"`, `"random"`, `"contiguous"`, `"frequency"`.
        param_reduction: share of the V d parameters to save; default 0.98.
        bits: R, bits a token, instead (signs).
        bits_per_weight: R / d instead (signs).
        max_perplexity_increase: instead, take the smallest head that raises the perplexity of the
            evaluation text, after its distillation, by at most this share, 0.02 for 2% (signs,
            with `embeddings` `"keep"`). Several heads are fitted and up to four distilled.
        nested: several `param_reduction` instead, of which the smallest is the size that holds the
            others: each is loaded by its `num_codebooks` (signs, not with `embeddings` `"tied"`).
            Each is fitted and distilled, in the time of as many conversions; `input_distill_steps`
            train the input embedding with the largest one.
        num_codebooks: G (index codes).
        codebook_size: K (index codes).
        fine_share: share of the tokens that have a second code, those that count most (signs);
            default 0.1.
        calibration_data: text file, folder, `.gz`, dataset name, or `"self"` for text that the
            model writes. Default: WikiText-2, and `"self"` where that cannot be had.
        calibration_tokens: how many tokens of it to use at most; default 100,000, or 40,000 of text
            that the model writes.
        rereadings: how often the calibration text is read again, each time with half of its tokens
            replaced by others that the model expects.
        eval_data: text to judge by, likewise, of a data set the split `test`; its first 25,000
            tokens count. Default: a held-out fifth of the calibration text.
        distill_steps: steps, of about a thousand positions each, of training codes and codebook
            towards the dense layer; default 256 for signs where the text is long enough, else 0.
        distill_state: file that keeps the state of the distillation, so that the same call goes on
            after an interrupt; removed at the end. With `nested` or `max_perplexity_increase` one
            for each size that is distilled, of this name with the size's bits behind it; where no
            size passes they stay, for the same call with another limit.
        embeddings: `"keep"`: the input embedding stays as it is; `"vq"`: it gets sign codes and a
            codebook of its own; `"tied"`: it takes those of the output layer, in models whose two
            sides are one table.
        embedding_bits: R of the input embedding, with `"vq"`; default that of the output layer.
        input_distill_steps: steps, of about a thousand positions each, of training the codebooks
            of input embedding and output layer together, through the body, with `"vq"` or
            `"tied"`; default 128 for signs where the text is long enough, else 0.
        body_distill_steps: steps, of about a thousand positions each, of training the whole model,
            a copy of the body with what was quantised, towards the original; after all else, 0 for
            none. The copy, the best so far, gradients and what Adam keeps take the memory of five
            bodies in float32. Not with `nested`, `refine_top_k` or `max_perplexity_increase`, which
            know the original body only.
        num_mixtures: M, split the finished head into a mixture of M softmaxes that share its
            codebook and codes, and distil that by as many steps again; 1 for none. Not with
            `nested` or `refine_top_k`.
        gate_activation: of the mixture's gate: `"linear"`, `"sigmoid"`, `"tanh"`, `"gelu"` or
            `"silu"`.
        gate_temperature: of the mixture's gate: large values share every position among all
            components, small ones choose one.
        refine_top_k: score so many tokens of the largest logits again by rows of the dense output
            layer, which stay in the model for it (in tied models with `embeddings` `"keep"` they
            are the input embedding's); 0 for none. Not with `nested`.
        refine_agreement: share of the positions where the dense layer's most likely token is to be
            found, on some calibration text that is kept out of the fit for it; fewer tokens are
            scored for a smaller one.
        ladder: compare 99.5, 99, 98 and 96% on the evaluation text (signs, with `embeddings`
            `"keep"`). It shows the fit alone: `distill_steps` train the head that is written and
            none of these.
        device: where to compute; default a GPU when there is one.
        dtype: type of the weights; default as stored.
        seed: of everything random, 0 to 2^31 - 1; the same seed gives the same bytes.
        overwrite: replace an earlier conversion at `output`.
        push_to_hub: upload the output to this repository.
        progress: show progress bars.

    Returns:
        The report, with the converted model as `.model`.

    Raises:
        ConversionError: a mistake in the options, the model or the text; nothing was written.
    """
    folder = None if output is None else Path(output)
    state_file = None if distill_state is None else Path(distill_state)
    sizes: dict[str, Any] = {
        "param_reduction": param_reduction,
        "bits": bits,
        "bits_per_weight": bits_per_weight,
        "num_codebooks": num_codebooks,
        "codebook_size": codebook_size,
        "fine_share": fine_share,
    }
    choosing = {name: value for name, value in sizes.items() if name != "fine_share"}
    if nested is not None:
        increase = {"max_perplexity_increase": max_perplexity_increase}
        check_nested(nested, method, embeddings, ladder=ladder, **increase, **choosing)
    if max_perplexity_increase is not None:
        check_choice(max_perplexity_increase, method, embeddings, nested=nested, **choosing)
    check_size_options(method, **sizes)
    check_options(embeddings, embedding_bits, ladder, method, folder, push_to_hub)
    input_distill_steps = check_input_steps(input_distill_steps, embeddings)
    if calibration_tokens is not None:
        check_range("calibration_tokens", calibration_tokens, 1)
    check_range("rereadings", rereadings, 0)
    if distill_steps is not None:
        check_range("distill_steps", distill_steps, 0)
    if state_file is not None:
        asked = 0 if distill_steps is None and method != "signs" else distill_steps
        check_state_file(state_file, asked, input_distill_steps, body_distill_steps)
    gate: dict[str, Any] = {
        "num_mixtures": num_mixtures,
        "gate_activation": gate_activation,
        "gate_temperature": gate_temperature,
    }
    check_mixture(
        **gate,
        nested=nested,
        refine_top_k=refine_top_k,
        max_perplexity_increase=max_perplexity_increase,
    )
    check_refinement(refine_top_k, refine_agreement, nested)
    check_body_steps(
        body_distill_steps,
        nested=nested,
        refine_top_k=refine_top_k,
        max_perplexity_increase=max_perplexity_increase,
    )
    check_range("seed", seed, 0, LAST_SEED)
    if folder is not None:
        check_output(folder, overwrite=overwrite, source_name=_name_of(model_or_path))
    source = load_source(
        model_or_path, tokenizer=tokenizer, gguf_file=gguf_file, device=device, dtype=dtype
    )
    parts = take_apart(source.model)
    vocab_size, hidden_size = parts.weight.shape
    check_range("refine_top_k", refine_top_k, 0, vocab_size)
    refine_with_embedding = parts.tied and embeddings == "keep"
    choices = []
    if max_perplexity_increase is not None:
        choices = sizes_to_choose_from(vocab_size, hidden_size, fine_share)
        size = choices[-1]  # the largest that may be written
    elif nested is not None:
        size = choose_nested_size(
            nested, vocab_size=vocab_size, hidden_size=hidden_size, fine_share=fine_share
        )
    else:
        size = choose_size(method, vocab_size=vocab_size, hidden_size=hidden_size, **sizes)
    files = {} if state_file is None else state_files(choices or size.rungs, state_file)
    for file in files.values():
        check_state_file(file, distill_steps, input_distill_steps, body_distill_steps)
    steps = _ladder_sizes(vocab_size, hidden_size, fine_share) if ladder else []
    check_embeddings(embeddings, parts)
    embedding_bits = choose_embedding_bits(embeddings, parts, size, embedding_bits)
    if folder is not None:
        coded_bytes = size.stored_bytes(vocab_size, hidden_size, parts.weight.element_size())
        coded_bytes += embedding_bytes(embeddings, parts, embedding_bits)
        if refine_top_k and not refine_with_embedding:
            coded_bytes += parts.weight.nbytes
        check_room(folder, output_bytes(parts.backbone, coded_bytes, source))
    corpus = prepare_corpus(
        source,
        calibration_data=calibration_data,
        calibration_tokens=calibration_tokens,
        eval_data=eval_data,
        seed=seed,
        show_progress=progress,
    )
    if refine_top_k:
        corpus = keep_out(corpus, seed)
    quantiser = Quantiser(parts, corpus, seed, rereadings=rereadings, show_progress=progress)
    input_distill_steps = distillation_steps(
        "input_distill_steps", input_distill_steps, method, corpus
    )
    distill_steps = distillation_steps("distill_steps", distill_steps, method, corpus)
    if body_distill_steps:
        check_length(corpus.calibration, "body_distill_steps")
    trained = distill_steps + input_distill_steps + body_distill_steps > 0
    with quantiser.timed("calibration"):
        statistics = quantiser.calibrate(to_distill=trained)
    if embeddings == "tied":
        with quantiser.timed("calibration"):
            quantiser.besides = quantiser.input_metric()
    selection = None
    if max_perplexity_increase is not None:
        selection = select_head(
            quantiser,
            statistics,
            max_perplexity_increase,
            choices,
            ladder=steps,
            distill_steps=distill_steps,
            files=files,
        )
        size, head, rungs = selection.size, selection.head, selection.rungs
        files = selection.files
    elif nested is not None:
        rungs = nested_heads(quantiser, size, statistics, distill_steps=distill_steps, files=files)
        head = rungs.pop(size)
    else:
        with quantiser.timed("fit"):
            head, rungs = _fit(quantiser, method, size, steps, statistics)
        if distill_steps:
            with quantiser.timed("distillation"):
                quantiser.distill(head, distill_steps, statistics, state_file=files.get(size))
    if num_mixtures > 1:
        head = mix(
            quantiser,
            head,
            size,
            statistics,
            distill_steps=distill_steps,
            state_file=files.get(size),
            **gate,
        )
    embedding = None
    if embedding_bits is not None:
        with quantiser.timed("input embedding"):
            embedding = quantiser.embedding(embeddings, head, embedding_bits)
    if embedding is not None and input_distill_steps:
        with quantiser.timed("end-to-end distillation"):
            quantiser.distill_end_to_end(
                head, embedding, input_distill_steps, state_file=files.get(size)
            )
    refined = None
    if refine_top_k:  # when the head is finished: it knows the head's errors
        with quantiser.timed("refinement"):
            refined = quantiser.refine(
                head,
                size,
                statistics,
                top_k=refine_top_k,
                agreement=refine_agreement,
                with_embedding=refine_with_embedding,
            )
    body = None
    if body_distill_steps:
        with quantiser.timed("whole-model distillation"):
            body = quantiser.trained_body(
                head, embedding, body_distill_steps, state_file=files.get(size)
            )
    report = assess(
        quantiser,
        source,
        statistics,
        size,
        head,
        embedding,
        refined,
        body,
        method=method,
        embeddings=embeddings,
        rungs=rungs,
    )
    if selection is not None:
        selection.tell(report)
    if folder is not None:
        report.output, report.repository = str(folder), push_to_hub
        # Again: hours have passed, and something may have appeared there.
        check_output(folder, overwrite=overwrite, source_name=_name_of(model_or_path))
        _write(folder, report, source)
    for kept_size, file in files.items():
        if distill_steps or (trained and kept_size == size):  # else it is of another run
            file.unlink(missing_ok=True)
    if push_to_hub is not None:
        _push(folder, push_to_hub)
    return report


def _ladder_sizes(vocab_size: int, hidden_size: int, fine_share: float | None) -> list[HeadSize]:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "fine_share": fine_share,
    }
    try:
        return [choose_size("signs", param_reduction=reduction, **common) for reduction in LADDER]
    except ConversionError as error:
        raise ConversionError(
            f"`ladder` compares {', '.join(map(str, LADDER))}, but: {error} Convert without it."
        ) from error


def _fit(
    quantiser: Quantiser,
    method: str,
    size: HeadSize,
    steps: list[HeadSize],
    statistics: CalibrationStatistics,
) -> tuple[VQLogitsHead, dict[HeadSize, VQLogitsHead]]:
    """The head, and those of the ladder's sizes."""
    if method != "signs":
        return quantiser.index_head(size, method, statistics), {}
    heads = quantiser.sign_heads(list(dict.fromkeys([size, *steps])), statistics)
    # A copy: where the ladder holds the size, distillation must not reach its rung.
    return copy.deepcopy(heads[size]), {step: heads[step] for step in steps}


def _name_of(model_or_path: str | os.PathLike[str] | PreTrainedModel) -> str:
    if isinstance(model_or_path, PreTrainedModel):
        return model_or_path.config.name_or_path or ""
    return os.fspath(model_or_path)


def _write(folder: Path, report: ConversionReport, source: Source) -> None:
    with whole_or_nothing(folder) as partial:
        write_checkpoint(partial, report.model, source)
        report.save(partial)
        plot(report, partial / PLOT_FILE)
        (partial / "README.md").write_text(model_card(report), encoding="utf8")


def _push(folder: Path | None, repository: str) -> None:
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConversionError(
            f"The model is in {str(folder)!r}, but uploading it to {repository!r} failed: {error}"
        ) from error
