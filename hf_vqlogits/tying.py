"""One codebook and one set of codes for both sides of a model: `embeddings="tied"`.

Head and input embedding hold the same objects, a Parameter and a buffer, by Transformers' own way
of tying weights: a checkpoint stores them once, under the embedding's name, where the base model
without a head finds them too. Transformers ties buffers as well, but takes them for parameters in
some places; these are mended here.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .embedding import SHARED
from .head import VQLogitsHead


class TiedCodesMixin(PreTrainedModel):
    """Tying for a model with an `lm_head`, and a base model `model` that holds the embedding."""

    lm_head: VQLogitsHead
    model: Any

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Names of the head's tensors that are the embedding's, with the names of those."""
        if all_submodels or self.config.embeddings != "tied":
            return super().get_expanded_tied_weights_keys(all_submodels)
        # Not as patterns, for which Transformers would take them: `codebook` fits `codebook_bias`.
        return dict(self._tied_weights_keys)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Keep tensors that will be tied from being drawn at random."""
        for name in self.all_tied_weights_keys:
            tensor: Any = self.get_parameter_or_buffer(name)
            tensor._is_hf_initialized = True

    def tie_weights(
        self, missing_keys: set[str] | None = None, recompute_mapping: bool = True
    ) -> None:
        """Make the shared tensors of head and embedding the same objects again.

        Args:
            missing_keys: names that a checkpoint lacks, while it is loaded.
            recompute_mapping: read from the configuration what is tied.

        Raises:
            ValueError: a checkpoint holds both, and they differ.
        """
        if missing_keys is not None:
            for target, source in self.all_tied_weights_keys.items():
                if not {target, source} & missing_keys:
                    self._refuse_different(target, source)
                    missing_keys.add(target)  # as if the checkpoint had it once
        super().tie_weights(missing_keys, recompute_mapping)

    def _refuse_different(self, target: str, source: str) -> None:
        one, other = (self.get_parameter_or_buffer(name) for name in (target, source))
        if not one.is_meta and not other.is_meta and not torch.equal(one, other):
            raise ValueError(
                f"The checkpoint holds {target} and {source}, which differ, but its `embeddings` "
                "is 'tied': they should be one. To keep both, set `embeddings` to 'vq' and "
                "`tie_word_embeddings` to false in its config.json."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Parameters stay the same objects when a module moves to another device; buffers do not.
        embedding: Any = self.get_input_embeddings()
        # PEFT may have wrapped the head, in a module that says it has the head's attributes.
        plain = isinstance(self.lm_head, VQLogitsHead)
        there = {name: getattr(self.lm_head, name) for name in SHARED[1:]} if plain else {}
        # One by one: an embedding may share the codes and have second ones of its own, or none.
        shared = [
            name
            for name, tensor in there.items()
            if tensor is not None and tensor is getattr(embedding, name, None)
        ]
        super()._apply(fn, recurse)
        for name in shared:
            setattr(self.lm_head, name, getattr(embedding, name))
        return self

    def shared_names(self) -> dict[str, str]:
        """Names of the head's shared tensors, with the embedding's names of them.

        Raises:
            ValueError: the two sides are not of one width.
        """
        embedding: Any = self.get_input_embeddings()
        if embedding.embedding_dim != self.lm_head.in_features:
            raise ValueError(
                "`embeddings` 'tied' needs an input embedding as wide as the output layer, but "
                f"they are {embedding.embedding_dim} and {self.lm_head.in_features} wide; use 'vq'."
            )
        name = next(name for name, module in self.named_modules() if module is embedding)
        there = (tensor for tensor in SHARED if getattr(self.lm_head, tensor) is not None)
        return {f"lm_head.{tensor}": f"{name}.{tensor}" for tensor in there}

    def follow_parts(self) -> None:
        """Make configuration and tied names say what head and embedding are now."""
        embedding: nn.Module = self.get_input_embeddings()
        tensors: list[tuple[Any, Any]] = [
            (getattr(self.lm_head, name), getattr(embedding, name, None)) for name in SHARED
        ]
        if any(one is not None and one.is_meta for one, _ in tensors):
            return  # offloaded: whether they are the same cannot be told
        tied = all(one is other for one, other in tensors)
        if not tied and self.config.embeddings == "tied":
            self.model.set_input_embeddings(embedding)  # which says what it is
        if tied:
            self.config.embeddings, self.config.embedding_codebooks = "tied", None
            self.config.embedding_fine_tokens = 0
        self.config.tie_word_embeddings = tied
        self._tied_weights_keys: Any = self.shared_names() if tied else None
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
