"""LoRA on the body of a VQ-Logits model with its head trained in full, through PEFT.

Everything else in PEFT (saving, loading, merging, prompt tuning, several adapters) works on these
models as on any other. The head is not a linear layer that LoRA could wrap, and with a codebook of
R x d there is nothing to gain by it: PEFT's `modules_to_save` trains and saves it whole, with its
codes, so that an adapter holds all that its head needs.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..head import VQLogitsHead

if TYPE_CHECKING:
    from peft import LoraConfig

# The fused kernels of state-space blocks read these layers' weights without calling the layers: an
# adapter on them would never get a gradient, or act in training and not in inference.
UNCALLED_LAYERS = ("x_proj", "dt_proj", "out_proj", "conv1d")


def lora_config(model: PreTrainedModel, **kwargs: Any) -> "LoraConfig":
    """Configure LoRA for the body of a model, with its head trained and saved whole.

    PEFT looks default target modules up by model type and knows none for `vqlogits`; this takes
    those of the backbone's type, or all linear layers of the body where PEFT has none for it.

    Args:
        model: the model to be adapted. A dense one gets the same targets, for comparison. Its
            output layer stays frozen, as does a head that is tied to the input embedding.
        **kwargs: fields of `peft.LoraConfig`; they go before the defaults chosen here.

    Returns:
        A configuration for `peft.get_peft_model(model, ...)`, or for `model.add_adapter(...)`,
        which needs PEFT 0.22 with Transformers 5.24.

    Example:
        >>> from peft import get_peft_model
        >>> from hf_vqlogits.integrations.peft import lora_config
        >>> model = get_peft_model(model, lora_config(model, r=16))  # doctest: +SKIP
    """
    # PEFT takes seconds to import; only those who call this should wait for it.
    from peft import LoraConfig, TaskType
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    backbone = model.config.get_text_config().model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(backbone, "all-linear")
    state_space = any(name.endswith(".conv1d") for name, _ in model.named_modules())
    own_head = isinstance(model.get_output_embeddings(), VQLogitsHead)
    # PEFT would train a copy of a tied head, and merging it would untie the model.
    own_head = own_head and model.config.embeddings != "tied"
    defaults = {
        "task_type": TaskType.CAUSAL_LM,
        "target_modules": targets,
        "exclude_modules": list(UNCALLED_LAYERS) if state_space else None,
        "modules_to_save": ["lm_head"] if own_head else None,
    }
    return LoraConfig(**{**defaults, **kwargs})
