"""Loading, checking and initialisation shared by the models of this package."""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from .configuration_vqlogits import VQLogitsConfig
from .embedding import VQEmbedding
from .head import VQLogitsHead
from .loading import (
    as_stored,
    readable_file_errors,
    refuse_incomplete,
    refuse_mismatched,
    refuse_unexpected,
)
from .nested import check_stored
from .refinement import Refinement


class VQLogitsPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models of this package."""

    config_class = VQLogitsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The backbone decides which of these it can do; it refuses by its own name when built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: VQLogitsConfig):
        # `from_pretrained` sets the fields it is given after the configuration was checked.
        config.validate_architecture()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # All else belongs to the backbone, which initialises itself but knows no coded embedding.
        if isinstance(module, PreTrainedModel) and module is self.base_model:
            module = module.get_input_embeddings()
        if isinstance(module, VQLogitsHead | VQEmbedding | Refinement):
            tensors = module.state_dict(keep_vars=True).values()
            loaded = (getattr(t, "_is_hf_initialized", False) for t in tensors)
            if not all(loaded):  # `initialization.copy_` leaves alone those that are
                margins = self.config.output_loss == "squared_hinge"
                if margins and isinstance(module, VQLogitsHead):
                    drawn = module.initial_tensors(common=-1.0 / module.logit_scale)
                else:
                    drawn = module.initial_tensors()
                for name, value in drawn.items():
                    initialization.copy_(getattr(module, name), value)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as [`PreTrainedModel.from_pretrained`] does, and check it.

        With `num_codebooks` one of the checkpoint's `nested_codebooks`, that smaller head is what
        is loaded.

        Raises:
            ValueError: tensors are missing, truncated, of another shape than the configuration
                says, or hold impossible codes, or no head of `num_codebooks` is stored; the message
                says which.
        """
        path, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        keep_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs, smaller = as_stored(path, kwargs, VQLogitsConfig, refuse_others=not keep_mismatched)
        with readable_file_errors(path):
            # Transformers refuses mismatched sizes too, but names them in the log only.
            loaded: Any = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if not keep_mismatched:
            refuse_mismatched(path, info["mismatched_keys"])
        coded = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, VQLogitsHead | VQEmbedding)
        }
        only = tuple(f"{name}." for name in coded)
        # The base model's own tensors are named there as in the file, which is of the whole model.
        of_whole = tuple(f"{cls.base_model_prefix}.{beginning}" for beginning in only)
        refuse_unexpected(path, info["unexpected_keys"], only=only + of_whole)
        if getattr(model, "hf_quantizer", None) is None:
            refuse_incomplete(path, info["missing_keys"])
        else:
            refuse_incomplete(path, info["missing_keys"], only=only)
        for module in coded.values():
            if not module.codes.is_meta:
                module.check_codes()
        refinement = getattr(model, "refinement", None)
        if refinement is not None and refinement.weight is not None:
            refinement.weight.requires_grad_(False)  # Transformers loads what can be trained
        if smaller is not None:
            model.keep_codebooks(smaller)
        return (model, info) if with_info else model

    def keep_codebooks(self, num_codebooks: int) -> None:
        """Become, in place, the model of a smaller head inside; it saves as an ordinary one.

        Codebook and biases are new parameters, so call it before an optimiser is made.

        Args:
            num_codebooks: one of the configuration's `nested_codebooks`, or its own
                `num_codebooks`, which changes nothing.

        Raises:
            ValueError: the size is not stored (the message names those that are), or the head was
                offloaded, where it cannot be cut.
        """
        stored = [*self.config.nested_codebooks, self.config.num_codebooks]
        check_stored(num_codebooks, stored, "the model")
        for head in (module for module in self.modules() if isinstance(module, VQLogitsHead)):
            if head.codebook.is_meta and hasattr(head, "_hf_hook"):
                raise ValueError(
                    f"The head cannot be cut to `num_codebooks` {num_codebooks} where it was "
                    "offloaded; give `lm_head` a device of its own in the `device_map`."
                )
            head.keep_codebooks(num_codebooks)
        self.config.keep_codebooks(num_codebooks)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: these models are initialised as those of Transformers are.

        For custom code Transformers skips modules without parameters of their own, and with them
        buffers that a backbone computes and never stores (Falcon-H1's multipliers).
        """
        return False
