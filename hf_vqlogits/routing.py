"""The auxiliary loss that mixture-of-experts backbones add when trained."""

import functools
import inspect
import logging
import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What Mixtral's function takes, and the families written after it (Qwen MoE, OLMoE, GPT-OSS, ...).
ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")


def router_loss(
    backbone: PreTrainedModel, router_logits: Any, attention_mask: Any
) -> tuple[Tensor, float] | None:
    """Load-balancing loss by the backbone family's own public function.

    Args:
        backbone: a mixture-of-experts backbone.
        router_logits: its output of that name.
        attention_mask: (batch, positions), positions at 0 do not count; ignored in other shapes.

    Returns:
        The loss (eq. 4 to 6 of Switch Transformer, arXiv 2101.03961) and the factor with which
        the family adds it to the cross-entropy, or None, with one warning, for a family that
        computes it in another way.
    """
    function = getattr(sys.modules[type(backbone).__module__], "load_balancing_loss_func", None)
    config = backbone.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    factor = getattr(config, "router_aux_loss_coef", None)
    known = function is not None and tuple(inspect.signature(function).parameters) == ARGUMENTS
    if function is None or not known or experts is None or top_k is None or factor is None:
        _warn_once(config.model_type)
        return None
    if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
        attention_mask = None
    return function(router_logits, experts, top_k, attention_mask), float(factor)


@functools.cache
def _warn_once(model_type: str) -> None:
    logger.warning(
        "The router's auxiliary loss of %r is not known here: the loss is the cross-entropy alone, "
        "so routers that are trained may drift out of balance.",
        model_type,
    )
