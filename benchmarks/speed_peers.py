"""Other ways to logits, or to the best tokens, that the speed of ours is measured beside.

Each is checked before it is timed: by the product that it stands for, or, where it computes
something else (the tokens of some clusters, a few best tokens, tiers of its own), by what that
should be. All work on the same random weights and hidden states.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops.backends import VARIABLE

from .losses import adaptive_cutoffs

GROUP = 64  # columns that share a scale, of 4-bit integers
FAISS_TRAINING_ROWS = 8192
BEST = 64  # tokens that a search for the best ones returns
Calls = dict[str, Callable[[], Any]]


def dense(hidden: Tensor, weight: Tensor) -> Calls:
    """Plain products."""
    low_hidden, low_weight = hidden.bfloat16(), weight.bfloat16()
    return {
        "dense_float32": lambda: hidden @ weight.T,
        "dense_bfloat16": lambda: low_hidden @ low_weight.T,
    }


def integers(hidden: Tensor, weight: Tensor) -> Calls:
    """Weight-only integers: PyTorch's own kernels for processors, which torchao's layouts call."""
    low = hidden.bfloat16()
    vocab_size, size = weight.shape
    pad = -vocab_size % 64  # what the packed layout asks for
    rows = nn.functional.pad(weight, (0, 0, 0, pad))

    scale = rows.abs().amax(1).clamp_min(1e-6) / 127
    int8 = (rows / scale[:, None]).round().to(torch.int8)
    low_scale = scale.bfloat16()

    grouped = rows.view(len(rows), size // GROUP, GROUP)
    least, most = grouped.amin(-1), grouped.amax(-1)
    step = (most - least).clamp_min(1e-6) / 15
    middle = least + 8 * step
    codes = ((grouped - least[..., None]) / step[..., None]).round().clamp(0, 15).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(len(rows), size), 1)
    scales = torch.stack([step, middle], -1).bfloat16().transpose(0, 1).contiguous()
    return {
        "int8": lambda: torch.ops.aten._weight_int8pack_mm(low, int8, low_scale)[:, :vocab_size],
        f"int4, groups of {GROUP}": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            low, packed, GROUP, scales
        )[:, :vocab_size],
    }


def torchao_int8(hidden: Tensor, weight: Tensor) -> Calls:
    """Torchao's own call, as a user makes it; nothing where it is not installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    low = hidden.bfloat16()
    linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    holder = nn.Sequential(linear)  # quantize_ looks for layers inside of a module
    quantize_(holder, Int8WeightOnlyConfig())
    return {"torchao int8": lambda: holder(low)}


def other_backends(head: VQLogitsHead, hidden: Tensor, *names: str) -> Calls:
    """The quantised head by other implementations of its own."""

    def by(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with _backend(name):
                return head(hidden)

        return call

    return {f"quantised, {name}": by(name) for name in names}


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def adaptive_softmax(hidden: Tensor, vocab_size: int) -> Calls:
    """`torch.nn.AdaptiveLogSoftmaxWithLoss`, all log-probabilities; its tiers are of its own."""
    layer = nn.AdaptiveLogSoftmaxWithLoss(hidden.shape[1], vocab_size, adaptive_cutoffs(vocab_size))
    return {"adaptive softmax": lambda: layer.log_prob(hidden)}


def clustered_embedder(hidden: Tensor, weight: Tensor) -> Calls:
    """Transformers' Gemma 4 drafter: dense logits of the tokens of the best clusters, defaults."""
    from transformers import Gemma4AssistantConfig, Gemma4TextConfig
    from transformers.models.gemma4_assistant.modeling_gemma4_assistant import (
        Gemma4AssistantMaskedEmbedder,
    )

    clusters = Gemma4AssistantConfig.num_centroids
    vocab_size = len(weight) - len(weight) % clusters  # it has clusters of equal size
    text_config = Gemma4TextConfig(
        vocab_size=vocab_size,
        hidden_size=weight.shape[1],
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        num_kv_shared_layers=Gemma4TextConfig.num_hidden_layers,
    )
    config = Gemma4AssistantConfig(text_config=text_config)
    embedder = Gemma4AssistantMaskedEmbedder(config)
    embedder.token_ordering = torch.arange(vocab_size)
    per_cluster = vocab_size // clusters
    with torch.no_grad():
        means = weight[:vocab_size].view(clusters, per_cluster, -1).mean(1)
        embedder.centroids.weight.copy_(means)
    rows, batch = weight[:vocab_size], hidden.unsqueeze(0)
    return {
        f"Gemma 4's clustered embedder, {config.centroid_intermediate_top_k} of {clusters}": (
            lambda: embedder(batch, rows)[0]
        )
    }


def fast_scan(hidden: Tensor, weight: Tensor, bits: int) -> Calls:
    """Faiss: product-residual codes of 4 bits a step, searched for the `BEST` tokens alone."""
    import faiss

    size = weight.shape[1]
    splits = next(s for s in (16, 8, 4, 2, 1) if size % s == 0)
    steps = max(1, round(bits / 4 / splits))
    index = faiss.IndexProductResidualQuantizerFastScan(
        size,
        splits,
        steps,
        4,
        faiss.METRIC_INNER_PRODUCT,
        faiss.AdditiveQuantizer.ST_LUT_nonorm,
    )
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, queries = weight.numpy(), hidden.numpy()
    index.train(rows[:FAISS_TRAINING_ROWS])
    index.add(rows)
    name = f"Faiss fast-scan, {4 * splits * steps} bits, the {BEST} best"
    return {name: lambda: index.search(queries, BEST)}


def best_tokens(head: VQLogitsHead, hidden: Tensor) -> Calls:
    """Ours, without the logits of all tokens."""
    return {f"quantised, the {BEST} best": lambda: head.topk(hidden, BEST)}


def check(calls: Calls, exact: Tensor, head: VQLogitsHead, head_exact: Tensor) -> dict[str, float]:
    """What each call computes, against what it should.

    Args:
        calls: by name.
        exact: dense logits (N, V), float32.
        head: the quantised one.
        head_exact: exact logits (N, V) of that.

    Returns:
        The largest error of each in standard deviations of the logits, where that says something.

    Raises:
        ValueError: a call computes something else.
    """
    errors: dict[str, float] = {}
    for name, call in calls.items():
        found = call()
        if "best" in name:
            _check_best(name, found, exact if name.startswith("Faiss") else head_exact)
            continue
        if name == "adaptive softmax":
            total = found.logsumexp(-1).abs().max()
            _require(float(total) < 1e-2, name, f"its log-probabilities sum to exp({total:.2g})")
            continue
        wanted = head_exact if name.startswith("quantised") else exact[:, : found.shape[1]]
        if name.startswith("Gemma"):
            scored = found > found.amin(-1, keepdim=True)
            _require(bool(scored.any()), name, "no token is scored")
            wanted = torch.where(scored, wanted, found)
        error = float((found.float() - wanted).abs().max() / wanted.std())
        errors[name] = error
        allowed = 1.0 if name.startswith("int4") else 0.2
        _require(error < allowed, name, f"it is off by {error:.3g} deviations of the logits")
    return errors


def _check_best(name: str, found: Any, exact: Tensor) -> None:
    values, tokens = (torch.as_tensor(part) for part in found)
    _require(values.shape == (len(exact), BEST), name, f"it returns {tuple(values.shape)}")
    # Its codes are rougher than ours, on noise that no code can know: most, not all, are large.
    mean = float(exact.gather(1, tokens.long()).mean() / exact.std())
    _require(mean > 0.5, name, f"what it finds lies only {mean:.2f} deviations above the mean")


def _require(holds: bool, name: str, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{name} does not compute what it should: {otherwise}.")
