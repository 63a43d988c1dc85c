"""Taking a model apart: backbone, output layer, and what its family does to the logits.

Families scale or soft-cap their logits under different names. What is found in the configuration
is only a guess; it counts once the dense layer, run through our model, gives the original's
logits on a probe batch.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsHead, ops
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.refinement import Refinement

from .errors import ConversionError

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, RecurrentGemma
# Sub-configurations of towers whose output the family mixes into that of the text.
TOWERS = ("vision_config", "audio_config", "audio_encoder_config")
# Families with a cache that `generate` only knows by the name of their own class.
UNSUPPORTED = ("rwkv", "xlstm", "reformer", "xlnet", "ctrl", "cpmant", "xlm", "flaubert")


@dataclass(frozen=True)
class LogitTransform:
    """Final logits = softcap(scale * raw logits)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Final logits of raw ones, any shape."""
        return ops.final_logits(raw, self.scale, self.softcap)


@dataclass
class SourceParts:
    """A source model, taken apart; nothing is copied.

    Attributes:
        backbone: what `AutoModel` would build for the configuration.
        weight: dense output weight (V, d).
        bias: (V,), or None.
        transform: what the family does to the logits, proved on a probe batch.
        tied: the output weight is the input embedding's.
    """

    backbone: PreTrainedModel
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    tied: bool

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        return self.backbone.config

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """Dense logits (N, V) before scale and soft-cap, from hidden states (N, d)."""
        return nn.functional.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The original model's logits (N, V) from hidden states (N, d)."""
        return self.transform(self.raw_logits(hidden))


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Refuse configurations that cannot become a quantised decoder, by name.

    Raises:
        ConversionError: the message names the model type and the reason.
    """
    name = config.model_type
    if name == VQLogitsConfig.model_type:
        raise ConversionError("The model already has a VQ-Logits head; convert the original one.")
    if config.is_encoder_decoder:
        raise ConversionError(
            f"{name!r} is an encoder-decoder model; only decoders (causal language models) are "
            "supported."
        )
    towers = any(getattr(config, tower, None) is not None for tower in TOWERS)
    if towers or config.get_text_config() is not config:
        raise ConversionError(
            f"{name!r} is a multimodal or composite model; only plain text decoders are supported. "
            "Convert its language model alone if it is published separately."
        )
    if any(name == family or name.startswith(family + "-") for family in UNSUPPORTED):
        raise ConversionError(
            f"{name!r} keeps its state in a form that `generate` ties to its own class; the family "
            "is not supported."
        )


def take_apart(model: PreTrainedModel) -> SourceParts:
    """Find backbone and output layer of a causal language model and prove them.

    Args:
        model: any decoder-only model of Transformers with an output embedding.

    Returns:
        The parts, sharing the model's tensors.

    Raises:
        ConversionError: the family is not supported, or our model with the dense layer does not
            reproduce the original's logits; the message says by how much they differ.
    """
    config = model.config
    refuse_unsupported(config)
    name = config.model_type
    layer = model.get_output_embeddings()
    if layer is None:
        raise ConversionError(
            f"{type(model).__name__} ({name!r}) has no output embedding to quantise; a causal "
            "language model is needed."
        )
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ConversionError(
            f"The output layer of {type(model).__name__} is a {type(layer).__name__} without a "
            "dense V x d weight, which is needed."
        )
    backbone: Any = model.base_model
    expected = MODEL_MAPPING.get(type(config), None)
    allowed = expected if isinstance(expected, tuple) else (expected,)
    if type(backbone) not in allowed:
        raise ConversionError(
            f"{type(model).__name__} ({name!r}) wraps a {type(backbone).__name__}, which AutoModel "
            "would not build for its configuration; the family is not supported."
        )
    sizes = VQLogitsConfig(text_config=copy.deepcopy(config))
    expected_shape = (sizes.vocab_size, sizes.hidden_size)
    if tuple(weight.shape) != expected_shape:
        raise ConversionError(
            f"The output layer of {type(model).__name__} is {tuple(weight.shape)}, but its "
            f"configuration says {expected_shape}; the checkpoint and its config.json differ."
        )
    parts = SourceParts(
        backbone=backbone,
        weight=weight.detach(),
        bias=None if getattr(layer, "bias", None) is None else layer.bias.detach(),
        transform=LogitTransform(),
        tied=weight is getattr(model.get_input_embeddings(), "weight", None),
    )
    parts.transform = _proved_transform(model, parts)
    return parts


def assemble(
    parts: SourceParts,
    config: VQLogitsConfig,
    head: VQLogitsHead,
    embedding: VQEmbedding | None = None,
    refinement: Refinement | None = None,
) -> VQLogitsForCausalLM:
    """Our model around the source's own backbone, without a copy of its weights.

    Args:
        parts: the source; where there is an `embedding`, its backbone takes it in place of its own.
        config: says what head and embedding are.
        head: the output layer.
        embedding: the quantised input embedding, or None for the dense one.
        refinement: of the head, if the configuration says that there is one.
    """
    with torch.device("meta"):
        model = VQLogitsForCausalLM(config)
    if embedding is not None:
        parts.backbone.set_input_embeddings(embedding)
    model.model.backbone = parts.backbone
    model.config.text_config = parts.config  # one object, as in a model built the ordinary way
    model.lm_head, model.refinement = head, refinement
    return model.train(parts.backbone.training)


def head_config(parts: SourceParts, **fields: Any) -> VQLogitsConfig:
    """Configuration of a head for these parts; `fields` are those of [`VQLogitsConfig`].

    With a copy of the backbone's own: composing configurations resets a live one's attention.
    """
    return VQLogitsConfig(
        text_config=copy.deepcopy(parts.config),
        logit_scale=parts.transform.scale,
        final_logit_softcapping=parts.transform.softcap,
        **fields,
    )


def _candidates(config: PreTrainedConfig) -> Iterator[LogitTransform]:
    """Transforms that the configuration may mean.

    What it declares comes before the identity: where logits are small, both fit the probe.
    """
    scales = [float(v) for n in MULTIPLIERS if (v := getattr(config, n, None))]
    scales += [1 / float(v) for n in DIVISORS if (v := getattr(config, n, None))]
    scales.append(1.0)
    caps: list[float | None] = [float(v) for n in SOFT_CAPS if (v := getattr(config, n, None))]
    caps.append(None)
    for cap in caps:
        for scale in dict.fromkeys(scales):
            yield LogitTransform(scale, cap)


@torch.no_grad()
def _proved_transform(model: PreTrainedModel, parts: SourceParts) -> LogitTransform:
    """The transform with which the parts reproduce the model's logits on random tokens."""
    was_training = model.training
    model.eval()
    vocab_size = parts.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (2, 12), generator=generator).to(model.device)
    wanted = model(input_ids=ids).logits
    probe = head_config(parts, code_type="index", num_codebooks=1, codebook_size=1)
    with torch.device("meta"):
        ours = VQLogitsForCausalLM(probe)
    ours.model.backbone = parts.backbone
    hidden = ours.model.eval()(ids).last_hidden_state
    raw = parts.raw_logits(hidden.to(parts.weight.dtype))
    model.train(was_training)
    name = f"{type(model).__name__} ({parts.config.model_type!r})"
    if raw.shape != wanted.shape:
        raise ConversionError(
            f"{name} gives logits of shape {tuple(wanted.shape)}, its output layer alone "
            f"{tuple(raw.shape)}; the family is not supported."
        )
    _check_finite_logits(name, wanted, raw)
    # Both come from the same operations in the same type, so that most logits agree to the bit;
    # left are a division in place of a product, and another order of summation in float32.
    tolerance = torch.finfo(raw.dtype).eps + 16 * torch.finfo(torch.float32).eps
    errors = {t: _difference(t(raw), wanted) for t in _candidates(parts.config)}
    best = min(errors, key=lambda t: errors[t])
    proved = next((t for t, error in errors.items() if error <= tolerance), None)
    if proved is None:
        raise ConversionError(
            f"{name} does something to its logits that is not known here: with scale {best.scale} "
            f"and soft-cap {best.softcap} they still differ by {errors[best]:.3g} of their size "
            f"(allowed: {tolerance:.3g}). The family is not supported."
        )
    return proved


def _difference(logits: Tensor, wanted: Tensor) -> float:
    """How far logits (..., V) are from those wanted, relative to these.

    The root mean square of the difference, which shows a wrong scale even where every logit is
    rounded, or a quarter of the largest, which shows a single wrong logit.
    """
    difference, size = logits.double() - wanted.double(), wanted.double()
    least = torch.finfo(torch.float64).tiny
    typical = difference.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(least)
    largest = difference.abs().max() / size.abs().max().clamp_min(least)
    return float(max(typical, largest / 4))


def _check_finite_logits(name: str, wanted: Tensor, raw: Tensor) -> None:
    if bool(torch.isfinite(wanted).all() and torch.isfinite(raw).all()):
        return
    used = str(wanted.dtype).removeprefix("torch.")
    if wanted.dtype == torch.float16:
        advice = "that type ends at 65,504. Convert with `dtype` (`--dtype`) float32 or bfloat16."
    else:
        advice = "its weights or its family cannot be converted."
    raise ConversionError(
        f"On a probe of random tokens {name} gives logits in {used} that are not finite: {advice}"
    )
