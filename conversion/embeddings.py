"""Sign codes for the input embedding: the head's own, or such as are fitted to its table.

Letters: V vocabulary, d width of the embedding, R bits a token, N positions.

An embedding of its own codes has no second ones: what they gain here has not been measured.

An error e of an input vector changes the model's predictions by about 1/2 e^T F e in KL divergence,
F being the Fisher information of the embedding's output: the covariance of the gradient of
log p(y | text), y drawn from the predictions. So codes are fitted in coordinates that are stretched
by F, though by less than that says, as the errors of few bits are not small; and every token counts
by a power of how often the text reads it. The codes of a tied model are fitted to the logits and,
by a share, to this metric as well.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.coded import score_scale
from hf_vqlogits.embedding import VQEmbedding, family_scale

from .errors import ConversionError
from .families import SourceParts
from .metric import TokenMetric
from .signs import Progress, SignFitter
from .sizes import DEFAULT_REDUCTION, HeadSize, choose_size
from .streaming import frozen

# Tuned on SmolLM2-135M during development (R = 490, one alternation, 30,000 tokens of WikiText-2,
# the input side alone replaced), perplexity factor on 4,096 tokens kept out of it. POWER 0 (plain
# distances), 0.35, 0.5, 1 at FLATTENING 0.7: 2.09, 1.48, 1.475, 1.88. FLATTENING 0.5, 0.7, 0.9 at
# POWER 0.5: 2.03, 1.475, 1.447. Counts times the mean square of a token's gradient: 1.71.
POWER = 0.5  # of the Fisher information, as a metric
FLATTENING = 0.8
TIED_WEIGHT = 0.3  # trace of the metric of input vectors over that of output vectors
SMOOTHING = 0.1  # added to the count of every token
FISHER_TOKENS = 8192  # of the text, read forwards and backwards
LEAST_EIGENVALUE = 1e-2  # of the mean one: what few texts show no use of has some
CHUNK_ROWS = 512  # of hidden states, whose V-wide logits are there at once
PROBE = 32  # tokens on which the family's scale is proved


def check_embeddings(mode: str, parts: SourceParts) -> None:
    """Check, before hours of work, that the input side can become what is asked for.

    Args:
        mode: `"keep"`, `"vq"` or `"tied"`.
        parts: of the source.

    Raises:
        ConversionError: it cannot; the message says why.
    """
    if mode == "keep":
        return
    if mode == "tied" and not parts.tied:
        raise ConversionError(
            "`embeddings` 'tied' needs a model whose input and output embeddings are one table, "
            f"and this {parts.config.model_type!r} has two; use 'vq', which fits codes of its own, "
            "or 'keep'."
        )
    dense = parts.backbone.get_input_embeddings()
    try:
        scale = family_scale(dense)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    _prove_scale(dense, scale)


@torch.no_grad()
def _prove_scale(dense: nn.Module, scale: float | None) -> None:
    """Prove on some tokens that rows are the table's times the scale."""
    table = _table(dense)
    ids = torch.arange(min(PROBE, len(table)), device=table.device)
    wanted, rows = dense(ids), table[ids] if scale is None else table[ids] * scale
    difference = (rows - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    if not difference <= 4 * torch.finfo(table.dtype).eps:
        raise ConversionError(
            f"The input embedding, a {type(dense).__name__}, gives other rows than its table times "
            f"{scale} (difference {float(difference):.3g} of the largest); use `embeddings` 'keep'."
        )


def choose_embedding_bits(
    mode: str, parts: SourceParts, size: HeadSize, bits: int | None
) -> int | None:
    """R of the input embedding.

    Args:
        mode: `"keep"`, `"vq"` or `"tied"`.
        parts: of the source.
        size: of the head.
        bits: R as asked for; None takes the head's, and beside index codes the default size of
            sign codes.

    Returns:
        R, or None with `"keep"`.

    Raises:
        ConversionError: the embedding would be larger than the dense one.
    """
    if mode == "keep":
        return None
    if mode == "tied":
        return size.num_codebooks
    vocab_size, width = _table(parts.backbone.get_input_embeddings()).shape
    shape = {"vocab_size": vocab_size, "hidden_size": width}
    if bits is None and size.code_type == "index":
        return choose_size("signs", param_reduction=DEFAULT_REDUCTION, **shape).num_codebooks
    bits = size.num_codebooks if bits is None else bits
    try:
        return choose_size("signs", bits=bits, **shape).num_codebooks
    except ConversionError as error:
        raise ConversionError(f"`embedding_bits` {bits}: {error}") from error


def embedding_bytes(mode: str, parts: SourceParts, bits: int | None) -> int:
    """What a quantised input embedding adds to the bytes of the model, less those of its table."""
    if bits is None:
        return 0
    table = _table(parts.backbone.get_input_embeddings())
    vocab_size, width = table.shape
    floats = width + (0 if mode == "tied" else bits * width)
    codes = 0 if mode == "tied" else vocab_size * -(-bits // 8)
    return codes + (floats - table.numel()) * table.element_size()


def _table(dense: nn.Module) -> Tensor:
    """The weight (V, d) of a dense embedding."""
    table = dense.weight
    assert isinstance(table, Tensor)
    return table.detach()


def input_information(
    parts: SourceParts,
    blocks: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Fisher information of the input embedding's output, averaged over positions.

    Args:
        parts: the model; nothing of it is changed.
        blocks: token ids (rows, context + 1) of the calibration text, of which `FISHER_TOKENS` are
            used, from all parts of it.
        seed: of the tokens drawn.
        progress: wraps the iteration over rows.

    Returns:
        (d, d) float64.
    """
    backbone, device = parts.backbone, parts.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    outputs: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    rows = max(1, FISHER_TOKENS // (blocks.shape[1] - 1))
    chosen = blocks[:: -(-len(blocks) // rows)]
    hook = backbone.get_input_embeddings().register_forward_hook(catch)
    information = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with frozen(backbone):
            for row in progress(chosen):
                with torch.enable_grad():
                    hidden = backbone(row[None, :-1].to(device), use_cache=False).last_hidden_state
                    hidden.backward(_gradient_of_predictions(parts, hidden, generator))
                gradient = outputs.pop().grad
                assert gradient is not None
                exact = gradient.flatten(0, -2).double()
                information = information + exact.T @ exact
    finally:
        hook.remove()
    return information / chosen[:, 1:].numel()


def _gradient_of_predictions(
    parts: SourceParts, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient, in hidden states (..., d), of the log-likelihood of tokens drawn from the model."""
    rows = hidden.detach().flatten(0, -2).requires_grad_()
    for some in rows.split(CHUNK_ROWS):
        logits = parts.logits(some.to(parts.weight.dtype)).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    assert rows.grad is not None
    return rows.grad.view_as(hidden)


def token_weights(blocks: Tensor, vocab_size: int) -> Tensor:
    """How much each input vector counts: by how often a text reads it.

    Args:
        blocks: token ids (rows, context + 1) of the calibration text.
        vocab_size: V.

    Returns:
        (V,) float32, positive, sums to 1.
    """
    counts = blocks[:, :-1].flatten().bincount(minlength=vocab_size).double()
    weights = (counts + SMOOTHING) ** FLATTENING
    return (weights / weights.sum()).float()


@torch.no_grad()
def fit_embedding(
    dense: nn.Module,
    weights: Tensor,
    information: Tensor,
    *,
    num_codebooks: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[VQEmbedding, dict[str, Any]]:
    """An embedding with sign codes and a codebook fitted to the dense one's table.

    Args:
        dense: the family's embedding, (V, d).
        weights: (V,), how much each token counts.
        information: (d, d), of the embedding's output.
        num_codebooks: R.
        seed: of everything random.
        progress: `progress(what)` wraps an iterable.

    Returns:
        The embedding, in float32, and what the fit tells of itself.
    """
    table = _table(dense).float()
    weights = weights.to(table.device)
    mean = weights @ table
    values, vectors = _metric_of(information)
    lengths = values.sqrt()
    whiten = (vectors * lengths).to(table)
    unwhiten = (vectors / lengths).T.to(table).contiguous()
    # The fitter takes the last coordinate for a bias, which a row has not.
    rows = nn.functional.pad((table - mean) @ whiten, (0, 1))
    metric = TokenMetric(rows, weights, torch.zeros_like(rows), unwhiten, torch.zeros_like(mean))
    fit = SignFitter(metric, seed=seed, progress=progress).fit(num_codebooks)
    codebook = nn.Parameter(fit.codebook / score_scale(num_codebooks))
    return _embedding(dense, weights, codebook, fit.codes), fit.details


def beside_the_logits(information: Tensor) -> Tensor:
    """What the errors of a table that serves both sides count for besides those of the logits.

    Args:
        information: (d, d), of the embedding's output.

    Returns:
        (d, d) float64, for [`token_metric`].
    """
    values, vectors = _metric_of(information)
    return (vectors * (TIED_WEIGHT * values / values.sum())) @ vectors.T


def _metric_of(information: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) and vectors (d, d), as columns, of the metric of input vectors."""
    # On the processor: eigh of float64 is slow or missing on some accelerators.
    values, vectors = torch.linalg.eigh(information.double().cpu())
    level = values.mean()
    values = values / level if level > 0 else torch.ones_like(values)
    return values.clamp_min(LEAST_EIGENVALUE).pow(POWER), vectors


@torch.no_grad()
def tie_embedding(dense: nn.Module, weights: Tensor, head: VQLogitsHead) -> VQEmbedding:
    """An embedding of the head's codes and codewords, the same objects.

    Its own is the offset alone: the head's rows lack what they have in common with all others.

    Args:
        dense: the family's embedding, whose table (V, d) the head was fitted to.
        weights: (V,), how much each token counts.
        head: of sign codes.
    """
    return _embedding(dense, weights, head.codebook, head.codes, head.fine_ids, head.fine_codes)


def _embedding(
    dense: nn.Module,
    weights: Tensor,
    codebook: nn.Parameter,
    codes: Tensor,
    fine_ids: Tensor | None = None,
    fine_codes: Tensor | None = None,
) -> VQEmbedding:
    """An embedding of these very tensors; its offset is the mean of what they lack."""
    with torch.device("meta"):  # no random tensors that are replaced at once
        embedding = VQEmbedding.in_place_of(dense, len(codebook)).train(dense.training)
    embedding.codebook, embedding.codes = codebook, codes
    embedding.fine_ids, embedding.fine_codes = fine_ids, fine_codes
    table = _table(dense).float()
    embedding.offset = nn.Parameter(torch.zeros_like(table[0]))
    embedding.offset.copy_(weights.to(table.device) @ (table - embedding.weight))
    embedding.check_codes()
    return embedding
