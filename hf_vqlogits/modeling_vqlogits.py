"""Causal language models with a vector-quantised output layer, for any decoder of Transformers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_vqlogits import VQLogitsConfig
from .dense import DenseModel, to_dense
from .embedding import VQEmbedding
from .gates import LINEAR
from .generation import VQLogitsGenerationMixin
from .head import VQLogitsHead
from .loading import OPTIONAL_TENSORS
from .mixture import VQLogitsMixtureHead, output_layer, split
from .pretrained import VQLogitsPreTrainedModel
from .refinement import Refinement
from .resizing import resized_codes, resized_embedding_codes, resized_vocabulary
from .routing import router_loss
from .tying import TiedCodesMixin

HEAD_KEYS = [r"^lm_head\.", r"^refinement\."]


@dataclass
class VQLogitsCausalLMOutput(CausalLMOutputWithPast):
    """Output of [`VQLogitsForCausalLM`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*): with labels, cross-entropy in nats or
            what `output_loss` of the configuration says.
        logits (`torch.Tensor` of shape `(batch, positions, V)`, *optional*): None when skipped.
        cache (`Cache`, *optional*): the backbone's cache.
        hidden_states (tuple, *optional*): of the backbone.
        attentions (tuple, *optional*): of the backbone.
        router_logits (tuple, *optional*): of mixture-of-experts backbones.
        aux_loss (`torch.Tensor`, *optional*): their load-balancing loss, with labels and
            `output_router_logits`; `loss` contains it times the family's factor.
    """

    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class VQLogitsModel(VQLogitsPreTrainedModel):
    """The backbone without the output layer: hidden states out, as from `AutoModel`."""

    _keys_to_ignore_on_load_unexpected = HEAD_KEYS

    def __init__(self, config: VQLogitsConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.text_config)
        if config.embeddings != "keep":
            terms = config.embedding_codebooks or config.num_codebooks
            tied = config.embeddings == "tied"
            fine = config.num_fine_tokens if tied else config.embedding_fine_tokens
            dense = self.backbone.get_input_embeddings()
            self.backbone.set_input_embeddings(VQEmbedding.in_place_of(dense, terms, fine))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's input embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embedding; the configuration says then what it is."""
        self.backbone.set_input_embeddings(value)
        coded = isinstance(value, VQEmbedding)
        self.config.tie_word_embeddings = False
        self.config.embeddings = "vq" if coded else "keep"
        self.config.embedding_codebooks = value.num_codebooks if coded else None
        self.config.embedding_fine_tokens = value.num_fine_tokens if coded else 0

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Resize the input embedding; new tokens of a quantised one start near the mean.

        Args:
            new_num_tokens: vocabulary size wanted; None keeps it.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: start new rows of a dense embedding around the mean of the old ones.

        Returns:
            The input embedding.

        Raises:
            TypeError: a size is not an integer.
            ValueError: a size is below 1.
        """
        embedding: Any = self.get_input_embeddings()
        size = resized_vocabulary(embedding.num_embeddings, new_num_tokens, pad_to_multiple_of)
        if isinstance(embedding, VQEmbedding):
            self.set_codes(resized_embedding_codes(embedding, size))
            return embedding
        # It also writes the size into the configuration, which it shares with this model.
        return self.backbone.resize_token_embeddings(size, mean_resizing=mean_resizing)

    def set_codes(self, codes: Tensor) -> None:
        """Give a quantised input embedding the codes (V, ceil(R / 8)) of another vocabulary."""
        embedding: Any = self.get_input_embeddings()
        embedding.set_codes(codes)
        self.config.get_text_config().vocab_size = len(codes)
        tied = self.config.embeddings == "tied"
        field = "num_fine_tokens" if tied else "embedding_fine_tokens"
        setattr(self.config, field, embedding.num_fine_tokens)
        if hasattr(self.backbone, "vocab_size"):
            self.backbone.vocab_size = len(codes)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        """Run the backbone.

        Args:
            input_ids: token ids (batch, positions).
            **kwargs: the backbone's own arguments; None is not passed on.

        Returns:
            The backbone's output, with `last_hidden_state` (batch, positions, d).
        """
        return self.backbone(input_ids, **{k: v for k, v in kwargs.items() if v is not None})


class VQLogitsForCausalLM(TiedCodesMixin, VQLogitsPreTrainedModel, VQLogitsGenerationMixin):
    """A decoder whose output layer is a [`VQLogitsHead`]; made by `convert_to_vq`.

    Example:
        >>> import hf_vqlogits
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("gpt2-vq")  # doctest: +SKIP
    """

    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012 - Transformers copies it
    _keys_to_ignore_on_load_missing = OPTIONAL_TENSORS

    def __init__(self, config: VQLogitsConfig):
        super().__init__(config)
        self.model = VQLogitsModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = output_layer(config)
        self.refinement = Refinement(config) if config.refine_top_k else None
        if config.embeddings == "tied":
            self._tied_weights_keys = self.shared_names()
            self._fsdp_plan = {}  # head and embedding must lie in one unit, that of the whole
        # `generate` reads the flag here, where it must say what the backbone says.
        self._is_stateful = self.model.backbone._is_stateful
        self.post_init()
        # Handed up by the base model, which loads without the head; here it has to fit.
        inherited = set(self._keys_to_ignore_on_load_unexpected or ())
        used = HEAD_KEYS if config.refine_top_k else HEAD_KEYS[:1]
        self._keys_to_ignore_on_load_unexpected = inherited - set(used)

    def get_output_embeddings(self) -> VQLogitsHead:
        """The head. It has no `.weight`; `head.to_linear()` gives the dense one."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head.

        Raises:
            TypeError: the new one is no [`VQLogitsHead`].
        """
        if not isinstance(new_embeddings, VQLogitsHead):
            raise TypeError(
                "The output layer must be a `VQLogitsHead`, got "
                f"{type(new_embeddings).__name__}; `model.to_dense()` gives a model with a linear "
                "one."
            )
        if self.refinement is not None:
            embedding: Any = self.get_input_embeddings()
            own = self.refinement.weight
            dense = embedding.weight if own is None else own
            capped = new_embeddings.final_logit_softcapping is not None
            scale = 0.0 if capped else new_embeddings.logit_scale
            self.refinement.follow(*new_embeddings.to_linear(), dense, logit_scale=scale)
            self.config.refine_deviations = None
        self.lm_head = new_embeddings
        self.config.num_mixtures = new_embeddings.num_mixtures
        if isinstance(new_embeddings, VQLogitsMixtureHead):
            self.config.gate_activation = new_embeddings.gate_activation
            self.config.gate_temperature = new_embeddings.gate_temperature
        self.follow_parts()

    def split_head(
        self,
        num_mixtures: int,
        *,
        gate_activation: str = LINEAR,
        gate_temperature: float = 1.0,
        seed: int = 0,
    ) -> VQLogitsMixtureHead:
        """Make the head a mixture of softmaxes that computes nearly the same, to be trained.

        Codebook and codes stay the same objects; make an optimiser after it.

        Args:
            num_mixtures: M, at least 2.
            gate_activation: as in [`VQLogitsConfig`].
            gate_temperature: likewise.
            seed: of the small differences between components.

        Returns:
            The new head.

        Raises:
            ValueError: the head is a mixture already, or an option is out of its range or does not
                go with the configuration; nothing was changed.
        """
        config = copy.copy(self.config)
        config.num_mixtures = num_mixtures
        config.gate_activation, config.gate_temperature = gate_activation, gate_temperature
        config.validate_architecture()
        mixture = split(self.lm_head, config, seed)
        self.set_output_embeddings(mixture)
        return mixture

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embedding; the configuration says then what it is.

        One whose `codebook` and `codes` are the head's own objects is tied to it.
        """
        dense: Any = self.get_input_embeddings()
        refinement = self.refinement
        if refinement is not None and refinement.weight is None and isinstance(value, VQEmbedding):
            refinement.weight = nn.Parameter(dense.weight.detach(), requires_grad=False)
            self.config.refine_with_embedding = False
        self.model.set_input_embeddings(value)
        self.follow_parts()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as [`PreTrainedModel.save_pretrained`] does.

        A tied model whose head was trained apart, as by PEFT's merged adapters, holds two codebooks
        and is saved as one of `embeddings="vq"`.
        """
        if isinstance(self.lm_head, VQLogitsHead):
            self.follow_parts()
        super().save_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> VQLogitsCausalLMOutput:
        """Run backbone and head.

        With `refine_top_k` the largest logits are the dense layer's, in evaluation mode; the loss
        is always the quantised head's.

        Args:
            input_ids: token ids (batch, positions).
            attention_mask: (batch, positions), or what the backbone takes.
            position_ids: (batch, positions).
            cache: the backbone's cache.
            inputs_embeds: (batch, positions, d) instead of `input_ids`.
            labels: (batch, positions), not shifted; -100 does not count. They always refer to all
                positions, whatever `logits_to_keep` says.
            use_cache: return a cache.
            logits_to_keep: logits of the last so many positions only (0: all), or of the
                positions in an index tensor, as elsewhere in Transformers.
            skip_logits: compute the loss without the logits, in memory O(N R) instead of O(N V).
                None means: when training with labels.
            **kwargs: `shift_labels` (labels already shifted), `num_items_in_batch` (divide the
                summed loss by it), and arguments of the backbone.

        Returns:
            [`VQLogitsCausalLMOutput`]; `logits` are None when skipped.

        Raises:
            ValueError: `skip_logits=True` without labels.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        shift_labels = _shifted(labels, kwargs.pop("shift_labels", None))
        if skip_logits is None:
            skip_logits = self.training and shift_labels is not None
        if skip_logits and shift_labels is None:
            raise ValueError(
                "`skip_logits=True` needs `labels` or `shift_labels`: without a loss, logits are "
                "all there is to return."
            )
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss, aux_loss, logits = None, None, None
        if shift_labels is not None:
            loss = self._loss(hidden_states, shift_labels, num_items_in_batch)
            loss, aux_loss = self._with_router_loss(loss, outputs, attention_mask)
        if not skip_logits:
            logits = self._logits(_kept_positions(hidden_states, logits_to_keep))
        return VQLogitsCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.get("cache"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            aux_loss=aux_loss,
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        logits = self.lm_head(hidden_states)
        if self.refinement is None or self.training:
            return logits
        weight = None
        if self.refinement.weight is None:
            embedding: Any = self.get_input_embeddings()
            weight = embedding.weight
        return self.refinement(
            hidden_states,
            logits,
            weight=weight,
            logit_scale=self.lm_head.logit_scale,
            final_logit_softcapping=self.lm_head.final_logit_softcapping,
        )

    def _loss(
        self, hidden_states: Tensor, shift_labels: Tensor, num_items: int | Tensor | None
    ) -> Tensor:
        labels = shift_labels.to(hidden_states.device).reshape(hidden_states.shape[:-1])
        return self.lm_head(
            hidden_states,
            labels,
            num_items_in_batch=num_items,
            output_loss=self.config.output_loss,
        )

    def _with_router_loss(
        self, loss: Tensor, outputs: ModelOutput, attention_mask: Any
    ) -> tuple[Tensor, Tensor | None]:
        if outputs.get("router_logits") is None:
            return loss, None
        routed = router_loss(self.model.backbone, outputs["router_logits"], attention_mask)
        if routed is None:
            return loss, None
        aux_loss, factor = routed
        return loss + factor * aux_loss.to(loss.device), aux_loss

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Resize input embedding and head together; a refused resize changes nothing.

        New tokens start near the mean of the vocabulary, each with a code of its own where the
        code has room for that (with G = 1 tokens share codes by design).

        Args:
            new_num_tokens: vocabulary size wanted; None keeps it.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: start new rows of a dense embedding around the mean of the old ones.

        Returns:
            The input embedding.

        Raises:
            TypeError: a size is not an integer.
            ValueError: a size is below 1, or below the codewords of an index codebook.
        """
        current = self.lm_head.out_features
        size = resized_vocabulary(current, new_num_tokens, pad_to_multiple_of)
        embedding: Any = self.get_input_embeddings()
        if size == current:
            return embedding
        codes = resized_codes(self.lm_head, size)
        # The backbone first: should it refuse, the head is still the old one.
        tied = self.config.embeddings == "tied"
        if tied:
            self.model.set_codes(codes)
        else:
            embedding = self.model.resize_token_embeddings(size, mean_resizing=mean_resizing)
        self.vocab_size = size
        self.lm_head.set_codes(codes)
        if self.refinement is not None:
            self.refinement.resize(size, *self.lm_head.to_linear())
            self.config.refine_top_k = self.refinement.top_k
        self.config.num_fine_tokens = self.lm_head.num_fine_tokens
        if tied:
            self.lm_head.fine_codes, self.lm_head.fine_ids = (
                embedding.fine_codes,
                embedding.fine_ids,
            )
            self.follow_parts()
        return embedding

    def to_dense(self) -> DenseModel:
        """The original architecture with an untied `nn.Linear`, and what that costs.

        See [`hf_vqlogits.dense.to_dense`].
        """
        return to_dense(self)


def _shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """The token to be predicted at every position, which at the last one is unknown."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]


def _kept_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Hidden states (batch, positions, d) of the positions whose logits are asked for."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
