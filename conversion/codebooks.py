"""Fit of index codes: every output vector named by codewords of one or several codebooks.

With one codebook this is the paper's form: tokens are put into K groups, by one of four methods,
and a group's codeword is the mean of its output vectors. All tokens of a group then have the same
logit, which bounds the perplexity from below: see [`perplexity_bound`].

Letters: V vocabulary, d hidden size, G codebooks, K codewords each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calibration import CalibrationStatistics
from .clustering import cluster_means, kmeans
from .metric import TokenMetric, check_weights, token_metric
from .residual import fit_residual, reconstruct
from .sizes import INDEX_METHODS

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


@dataclass(frozen=True)
class IndexFit:
    """Index codes of an output layer.

    logits[n, v] = sum_g (h[n] . codebook[g, k] + codebook_bias[g, k]) with k = codes[v, g].

    Attributes:
        codes: (V, G), uint8 if K <= 256, else int32.
        codebook: (G, K, d) float32.
        codebook_bias: (G, K) float32.
        details: `error`, the squared error as a share of that of no codes at all; in the metric of
            the logits for `residual`, in that of the weights otherwise.
    """

    codes: Tensor
    codebook: Tensor
    codebook_bias: Tensor
    details: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def fit_index(
    weight: Tensor,
    *,
    method: str,
    num_codebooks: int,
    codebook_size: int,
    bias: Tensor | None = None,
    statistics: CalibrationStatistics | None = None,
    seed: int = 0,
    progress: Progress = lambda _: iter,
) -> IndexFit:
    """Fit codes and codebook to an output layer.

    One codebook with as many codewords as tokens is lossless, whatever the method: every token
    is its own code.

    Args:
        weight: (V, d) dense output weights, of any floating type.
        method: with one codebook, how tokens are put into groups: `"kmeans"` (of the rows),
            `"random"`, `"contiguous"` (ranges of token ids) or `"frequency"` (ranges of the
            tokens' ranks by frequency), the last three in groups of equal size. With any number of
            codebooks `"residual"`, see [`residual.fit_residual`].
        num_codebooks: G.
        codebook_size: K.
        bias: (V,) or None. A group's is the mean; `residual` quantises it along with the weights.
        statistics: of calibration text; `frequency` and `residual` need them.
        seed: of everything random; the same seed and number of threads give the same bytes.
        progress: makes a wrapper for an iteration from what it does, `tqdm` for example.

    Returns:
        The codes, on the weight's device.

    Raises:
        ValueError: unknown method, impossible or contradictory sizes, `statistics` missing or of
            another shape, or weights that are not finite.
    """
    check_weights(weight, bias=bias)
    _check_sizes(len(weight), method, num_codebooks, codebook_size)
    if num_codebooks == 1 and codebook_size == len(weight):
        return _fit_groups(weight, bias, torch.arange(len(weight), device=weight.device))
    if method == "residual":
        if statistics is None:
            raise ValueError("Method 'residual' needs `statistics` of calibration text.")
        return _fit_residual(
            token_metric(weight, statistics, bias=bias),
            num_codebooks,
            codebook_size,
            seed=seed,
            progress=progress,
        )
    if method == "kmeans":
        groups, _ = kmeans(weight, codebook_size, seed=seed, progress=progress("k-means"))
    else:
        order = _token_order(method, len(weight), statistics, seed).to(weight.device)
        groups = torch.empty_like(order)
        groups[order] = torch.arange(len(order), device=order.device) * codebook_size // len(order)
    return _fit_groups(weight, bias, groups)


def perplexity_bound(codes: Tensor, labels: Tensor) -> float:
    """Least perplexity that one codebook allows on a text, whatever the rest of the model does.

    The n tokens of a code have the same logit, so none gets more than 1 / n of the probability:
    perplexity >= exp(mean over labels of log n(code of the label)).

    Args:
        codes: (V,) or (V, 1), of one codebook.
        labels: token ids of the text, any shape.

    Raises:
        ValueError: several codebooks, or no labels.
    """
    if codes.numel() != len(codes) or not labels.numel():
        raise ValueError(
            f"The bound is for `codes` of one codebook, (V, 1), and at least one label; got "
            f"{tuple(codes.shape)} and {labels.numel()} labels."
        )
    groups = codes.flatten().long().cpu()
    crowd = groups.bincount()[groups].double().log()  # (V,)
    return float(crowd[labels.flatten().cpu()].mean().exp())


def _check_sizes(vocab_size: int, method: str, num_codebooks: int, codebook_size: int) -> None:
    if method not in INDEX_METHODS:
        raise ValueError(f"`method` must be one of {', '.join(INDEX_METHODS)}; got {method!r}.")
    if num_codebooks < 1 or codebook_size < 1:
        raise ValueError(
            "`num_codebooks` and `codebook_size` must be at least 1, got "
            f"{num_codebooks} and {codebook_size}."
        )
    if codebook_size > vocab_size:
        raise ValueError(
            f"`codebook_size` {codebook_size} is larger than the vocabulary {vocab_size}: more "
            f"codewords than tokens cannot all be used. At most {vocab_size} can."
        )
    if method != "residual" and num_codebooks > 1:
        raise ValueError(
            f"Method {method!r} has one codebook, but `num_codebooks` is {num_codebooks}; use "
            "method 'residual' for several."
        )


def _token_order(
    method: str, vocab_size: int, statistics: CalibrationStatistics | None, seed: int
) -> Tensor:
    """Token ids, (V,), in the order in which runs of them form groups."""
    if method == "random":
        return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    if method == "contiguous":
        return torch.arange(vocab_size)
    if statistics is None:
        raise ValueError("Method 'frequency' needs `statistics` of calibration text.")
    return statistics.probability.argsort(descending=True, stable=True)


def _fit_groups(weight: Tensor, bias: Tensor | None, groups: Tensor) -> IndexFit:
    """One codebook of the groups' means."""
    size = int(groups.max()) + 1
    codebook = cluster_means(weight, groups, size)
    if bias is None:
        codebook_bias = torch.zeros(size, device=weight.device)
    else:
        codebook_bias = cluster_means(bias, groups, size)
    lost = (weight.float() - codebook[groups]).square().sum()
    spread = (weight.float() - weight.float().mean(0)).square().sum()
    details = {"error": float(lost / spread) if spread > 0 else 0.0}
    return IndexFit(_stored(groups[:, None], size), codebook[None], codebook_bias[None], details)


def _fit_residual(
    metric: TokenMetric, num_codebooks: int, codebook_size: int, *, seed: int, progress: Progress
) -> IndexFit:
    codes, words = fit_residual(metric, num_codebooks, codebook_size, seed=seed, progress=progress)
    vectors, biases = metric.product_form(words.flatten(0, 1))
    lost = metric.error(metric.rows - reconstruct(codes, words)).sum()
    scale = metric.error(metric.rows).sum()
    return IndexFit(
        _stored(codes, codebook_size),
        vectors.view(num_codebooks, codebook_size, -1),
        biases.view(num_codebooks, codebook_size),
        {"error": float(lost / scale) if scale > 0 else 0.0},
    )


def _stored(codes: Tensor, codebook_size: int) -> Tensor:
    return codes.to(torch.uint8 if codebook_size <= 256 else torch.int32)
