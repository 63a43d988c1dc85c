"""What `generate` has to be told about the backbone, of which it sees the outer class only."""

import inspect
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from .configuration_vqlogits import VQLogitsConfig


class VQLogitsGenerationMixin(GenerationMixin):
    """`generate` for any backbone: caches and masks are those of its family.

    `GenerationMixin` types `self` as a protocol that no subclass satisfies to the letter; hence the
    `type: ignore` of the calls to it.
    """

    model: Any

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # `generate` names the cache by the class name, which here does not tell the backbone.
        name = self.model.cache_name
        if name in model_kwargs and name != "past_key_values":
            model_kwargs["past_key_values"] = model_kwargs.pop(name)
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        if "past_key_values" in model_kwargs:
            model_kwargs[name] = model_kwargs.pop("past_key_values")
        return result

    def create_masks_for_generate(self, config: VQLogitsConfig, **kwargs: Any) -> Any:
        """Attention masks of `generate` with a static cache: those of the backbone's family.

        Some families (BLOOM, Falcon-H1) need others than the general ones, and say so in the class
        that stands in this one's place.
        """
        backbone = config.get_text_config()
        family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(backbone), None)
        own = inspect.getattr_static(family, "create_masks_for_generate", None)
        make = create_masks_for_generate if own is None else own.__get__(self)
        return make(config=backbone, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        cache_params: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        State-space backbones take an attention mask with the prompt only: later it would have
        another length than their one-token input.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Named in the signature because `generate` refuses arguments that it does not find there.
        if cache_params is not None:
            inputs["cache_params"] = cache_params
        state_space = self.model.cache_name == "cache_params"
        if state_space and kwargs.get("use_cache") and not is_first_iteration:
            inputs["attention_mask"] = None
        return inputs
