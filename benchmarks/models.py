"""The models that benchmarks train: the dense one and quantised ones, each with weights of its own.

What is made here may be trained without the case it comes from changing.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.families import SourceParts, assemble
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize

from .work_folder import WorkFolder


def fit_head(
    quantiser: Quantiser, method: str, size: HeadSize, statistics: CalibrationStatistics
) -> VQLogitsHead:
    """A head of one size by any of the converter's methods, before distillation."""
    if method == "signs":
        return quantiser.sign_heads([size], statistics)[size]
    return quantiser.index_head(size, method, statistics)


def kept_head(
    work: WorkFolder,
    name: str,
    quantiser: Quantiser,
    size: HeadSize,
    make: Callable[[], VQLogitsHead],
) -> VQLogitsHead:
    """A head that a work folder keeps: made once, as a fit made anew may have other digits.

    Args:
        work: the folder.
        name: under which the head is kept there.
        quantiser: of the case.
        size: of the head.
        make: makes it, where the folder has none.
    """
    state = work.tensors(name, lambda: make().state_dict())
    head = VQLogitsHead(quantiser.config(size))
    head.load_state_dict(state)
    return head.to(quantiser.parts.weight.device)


@torch.no_grad()
def dense_model(parts: SourceParts) -> PreTrainedModel:
    """A copy of the original model."""
    config = copy.deepcopy(parts.config)  # building a model writes into its configuration
    dense: Any = AutoModelForCausalLM.from_config(config)
    dense.base_model.load_state_dict(parts.backbone.state_dict())
    dense.tie_weights()
    layer = dense.get_output_embeddings()
    layer.weight.copy_(parts.weight)
    if parts.bias is not None:
        layer.bias.copy_(parts.bias)
    moved: PreTrainedModel = dense.to(parts.weight.device)
    return moved


def quantised_model(
    quantiser: Quantiser,
    size: HeadSize,
    head: VQLogitsHead,
    *,
    embeddings: str = "keep",
    body_steps: int = 0,
    state_file: Path | None = None,
) -> PreTrainedModel:
    """The converted model, with copies of backbone and head.

    Args:
        quantiser: of the case.
        size: of the head.
        head: the output layer; `"tied"` needs sign codes.
        embeddings: `"keep"` or `"tied"`.
        body_steps: of the distillation of the whole model; 0 leaves it out.
        state_file: where that is kept if it is interrupted.
    """
    head = copy.deepcopy(head)
    embedding = None
    if embeddings == "tied":
        embedding = quantiser.embedding("tied", head, size.num_codebooks)
    if body_steps:
        body = quantiser.trained_body(head, embedding, body_steps, state_file=state_file)
    else:
        body = copy.deepcopy(quantiser.parts.backbone)
    parts = replace(quantiser.parts, backbone=body)
    return assemble(parts, quantiser.config(size, embeddings=embeddings), head, embedding)
