"""What `generate` has to be told about the backbone, of which it sees the outer class only."""

import inspect
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_vqlogits import VQLogitsConfig


class VQLogitsGenerationMixin(GenerationMixin):
    """`generate` for any backbone: caches and masks are those of its family.

    `GenerationMixin` types `self` as a protocol that no subclass satisfies to the letter; hence the
    `type: ignore` of the calls to it.
    """

    config: Any
    model: Any

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

    # Here as well: where the base class translates these names, `cache=None` stands beside them.
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @deprecate_kwarg("cache_params", "5.40.0", new_name="cache")
    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`.

        State-space backbones take an attention mask with the prompt only: later it would have
        another length than their one-token input. Where a text outgrows the short rotation of its
        positions, it goes in as a whole once more, without the cache.
        """
        # The methods of families cannot be asked, as masks are above: they call those of their own
        # base classes, which this is no instance of.
        if self._is_outgrown(cache, input_ids.shape[1]):
            cache, next_sequence_length = None, None
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        state_space = cache is not None and all(cache.is_linear)
        if state_space and not is_first_iteration:
            inputs["attention_mask"] = None
        return inputs

    def _is_outgrown(self, cache: Cache | None, length: int) -> bool:
        """Whether a text of this length is rotated otherwise than the keys in its cache were.

        With `longrope` scaling, from a certain length on every position is rotated by other
        angles. Some families (Phi-3) begin again there, and say so in the class that stands in this
        one's place; others go on with the old keys, and so they do here.
        """
        backbone = self.config.get_text_config()
        limit = getattr(backbone, "original_max_position_embeddings", None)
        rotation = getattr(backbone, "rope_parameters", None) or {}
        if cache is None or limit is None or rotation.get("rope_type") != "longrope":
            return False
        family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(backbone), None)
        general = GenerationMixin.prepare_inputs_for_generation
        begins_again = getattr(family, "prepare_inputs_for_generation", general) is not general
        return begins_again and length > limit and 0 < cache.get_seq_length() <= limit
