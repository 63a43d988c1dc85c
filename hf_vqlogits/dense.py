"""Back to the original architecture: a quantised model as an ordinary dense one."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .embedding import VQEmbedding


@dataclass
class DenseModel:
    """What [`VQLogitsForCausalLM.to_dense`] returns.

    Attributes:
        model: the original architecture with an untied `nn.Linear` output layer.
        bias_folded: the layer has no bias, so the head's was folded into the weights.
        logit_error: root mean square over tokens and calibration positions of what the folding
            changed in a logit (a constant over all tokens apart, which changes nothing); 0 when
            nothing was folded.
        bias_deviation: root mean square of the bias over the vocabulary, the constant apart:
            what `logit_error` would be had the bias been dropped instead.
    """

    model: PreTrainedModel
    bias_folded: bool
    logit_error: float
    bias_deviation: float


@torch.no_grad()
def to_dense(quantised: PreTrainedModel) -> DenseModel:
    """Build the dense model of the original architecture that computes the same logits.

    Most families' output layers have no bias. There the head's bias b is folded into the weights:
    the D that minimises E[(D . h - b)^2] over the calibration text is b u with
    u = E[h h^T]^-1 E[h] (least squares), and it leaves the share 1 - u . E[h] of b^2.

    Args:
        quantised: a [`VQLogitsForCausalLM`] whose backbone's weights are ordinary tensors.

    Returns:
        The dense model, untied, and what it costs.

    Raises:
        ValueError: the backbone is itself quantised, or the original architecture scales or caps
            its logits in another way than the head.
    """
    if getattr(quantised, "hf_quantizer", None) is not None:
        raise ValueError(
            "`to_dense` needs a backbone of ordinary weights, but this one was loaded with a "
            "`quantization_config`; load the checkpoint without it first."
        )
    head, backbone = quantised.lm_head, quantised.model.backbone
    config = copy.deepcopy(quantised.config.get_text_config())
    config.tie_word_embeddings = False
    config.architectures = None
    dense = AutoModelForCausalLM.from_config(config, dtype=quantised.dtype)
    dense.base_model.load_state_dict(_dense_state(backbone))
    linear = dense.get_output_embeddings()
    weight, bias = (t.float() for t in head.to_linear())
    folded = linear.bias is None
    if folded and _shift_is_free(head):
        bias = bias - bias.mean()
    left = 0.0
    if folded:
        direction, mean = head.fold_direction.float(), head.hidden_mean.float()
        weight = weight + bias[:, None] * direction
        left = float((1 - direction @ mean).clamp(min=0.0).sqrt())
    else:
        linear.bias.copy_(bias)
    linear.weight = nn.Parameter(weight.to(linear.weight))
    dense.to(quantised.device)
    _refuse_other_logits(quantised, dense)
    dense.generation_config = copy.deepcopy(quantised.generation_config)
    deviation = float(bias.square().mean().sqrt())
    return DenseModel(dense.train(quantised.training), folded, deviation * left, deviation)


def _dense_state(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The backbone's tensors by name, those of a quantised input embedding as its table."""
    state = backbone.state_dict()
    embedding = backbone.get_input_embeddings()
    if isinstance(embedding, VQEmbedding):
        name = next(name for name, module in backbone.named_modules() if module is embedding)
        for tensor in embedding.state_dict():
            del state[f"{name}.{tensor}"]
        state[f"{name}.weight"] = embedding.weight.to(embedding.codebook.dtype)
    return state


def _shift_is_free(head: nn.Module) -> bool:
    """A constant added to all logits changes no probability, unless a soft-cap follows."""
    return head.final_logit_softcapping is None


def _refuse_other_logits(quantised: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Prove on a few tokens that scale and soft-cap of the architecture are those of the head."""
    head, linear = quantised.lm_head, dense.get_output_embeddings()
    dense.eval()
    ids = torch.arange(min(8, head.out_features), device=quantised.device).unsqueeze(0)
    hidden = dense.base_model(ids).last_hidden_state
    weight = linear.weight.clone()
    # A soft-cap at 30 shows on logits of 20, and hardly on the small ones of a fresh model.
    linear.weight.mul_(20 / linear(hidden).std().clamp(min=1e-6))
    wanted, given = head.postprocess(linear(hidden)), dense(ids).logits
    linear.weight.copy_(weight)
    difference = float((wanted - given).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not difference <= 64 * torch.finfo(weight.dtype).eps:
        raise ValueError(
            f"{type(dense).__name__} computes other logits from the same output layer (difference "
            f"{difference:.2g} of the largest): `logit_scale` {head.logit_scale} and "
            f"`final_logit_softcapping` {head.final_logit_softcapping} are not what its "
            "configuration says. Set them as the family does."
        )
