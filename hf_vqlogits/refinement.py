"""Nearly exact decoding: quantised logits choose candidates, rows of the dense layer score them.

Quantisation changed output vector w_v by e_v. Of random hidden states h the error of the logit has
the deviation s_v, known since the conversion; of a state that lies far out it is larger by a factor
rho(h), known from mean and deviation of the states of the calibration text (ops/refining.py). So a
token u whose quantised logit q_u lies more than z rho sqrt(s_best^2 + s_u^2) below the best one is
unlikely to be the dense layer's choice, z being fitted on text. The others are scored by their own
rows of the dense weight: T rows at most, where the dense layer reads V.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from . import ops


class RefinementConfig(Protocol):
    """The fields that a refinement reads; [`VQLogitsConfig`] has them."""

    refine_top_k: int
    refine_deviations: float | None
    refine_with_embedding: bool

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        ...


class Refinement(nn.Module):
    """Scores of the dense layer for the tokens that a quantised head finds most likely.

    Letters: N positions, V vocabulary, d hidden size, T candidates.

    Attributes:
        top_k: T, candidates of a position at most.
        deviations: z. Of the T tokens of the largest quantised logits, those within z deviations of
            the best are scored; None scores all of them.
        weight: parameter (V, d) without gradient, the dense weight; None where it is the input
            embedding's, which is then handed in.
        bias: buffer (V,), the dense layer's, zero where it has none.
        error: buffer (V,), s, deviation of the error of every token's final logit.
        mean: buffer (d,), of the hidden states of the calibration text.
        spread: buffer (d,), their deviations.
        common: buffer (d,), what the errors of all tokens have in common is common . h +
            common_bias: a constant that softmax does not see, but dense scores lack.
        common_bias: buffer (1,).

    Args:
        config: a [`VQLogitsConfig`], or any object with the fields of [`RefinementConfig`].
    """

    bias: Tensor
    error: Tensor
    mean: Tensor
    spread: Tensor
    common: Tensor
    common_bias: Tensor

    def __init__(self, config: RefinementConfig):
        super().__init__()
        self.top_k, self.deviations = config.refine_top_k, config.refine_deviations
        self.weight: nn.Parameter | None = None
        if not config.refine_with_embedding:
            rows = torch.empty(config.vocab_size, config.hidden_size)
            self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("bias", torch.empty(config.vocab_size))
        self.register_buffer("error", torch.empty(config.vocab_size))
        for name in ("mean", "spread", "common"):
            self.register_buffer(name, torch.empty(config.hidden_size))
        self.register_buffer("common_bias", torch.empty(1))

    def initial_tensors(self) -> dict[str, Tensor]:
        """Tensors of a refinement that is to be filled, by name: rows like those of a new layer."""
        buffers = {name: torch.zeros(b.shape, device="cpu") for name, b in self.named_buffers()}
        buffers["spread"] += 1
        if self.weight is None:
            return buffers
        return {"weight": 0.02 * torch.randn(self.weight.shape, device="cpu"), **buffers}

    def forward(
        self,
        hidden_states: Tensor,
        logits: Tensor,
        *,
        weight: Tensor | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
    ) -> Tensor:
        """Logits on the dense layer's scale, those of the candidates by the dense layer itself.

        Args:
            hidden_states: (..., d).
            logits: final quantised ones (..., V); with gradient switched off they may be changed in
                place.
            weight: the dense one (V, d), where this module has none of its own.
            logit_scale: factor on the dense layer's logits.
            final_logit_softcapping: c of c tanh(z / c), on them scaled; None without.

        Returns:
            Logits (..., V), in the type of `logits`.

        Raises:
            ValueError: there is no weight: none of its own and none handed in, or an offloaded one.
        """
        dense = self._dense(weight, logit_scale, final_logit_softcapping)
        refined = ops.refine(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            logits.reshape(-1, logits.shape[-1]),
            self.top_k,
            dense,
            self._offset(),
            self._rule(),
        )
        return refined.view(logits.shape)

    def offset(self, hidden_states: Tensor) -> Tensor:
        """What all quantised logits have more than the dense ones, (..., d) -> (..., 1)."""
        return ops.shift(hidden_states, self._offset())

    def within(self, hidden_states: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
        """Which candidates the rule scores, bool (..., T); the arguments of [`distance`]."""
        if self.deviations is None:
            return torch.ones_like(values, dtype=torch.bool)
        return self.distance(hidden_states, values, tokens) <= self.deviations

    def distance(self, hidden_states: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
        """How far candidates lie below the best one, in deviations of the errors, (..., T).

        Args:
            hidden_states: (..., d).
            values: their logits on the dense layer's scale (..., T), descending.
            tokens: whose they are (..., T).
        """
        rule = ops.Rule(math.inf, self.error, self.mean, self.spread)
        return ops.distance(hidden_states, values, tokens, rule)

    def _offset(self) -> ops.Offset:
        return ops.Offset(self.common, self.common_bias)

    def _rule(self) -> ops.Rule | None:
        if self.deviations is None:
            return None
        return ops.Rule(self.deviations, self.error, self.mean, self.spread)

    def _dense(self, weight: Tensor | None, logit_scale: float, softcap: float | None) -> ops.Dense:
        weight = weight if self.weight is None else self.weight
        if weight is None:
            raise ValueError(
                "This refinement has no dense weight of its own: hand in `weight`, the input "
                "embedding's."
            )
        if weight.is_meta:
            raise ValueError(
                "The dense weight that `refine_top_k` needs was offloaded, and its rows cannot be "
                "read; give its module a device in the `device_map`, or load with `refine_top_k=0`."
            )
        return ops.Dense(weight, self.bias, logit_scale, softcap)

    @torch.no_grad()
    def follow(self, weight: Tensor, bias: Tensor, dense: Tensor, *, logit_scale: float) -> None:
        """Take another head, of whose errors nothing is known but what all tokens' have in common.

        Args:
            weight: (V, d) of the head.
            bias: (V,) of the head.
            dense: (V, d), the dense weight.
            logit_scale: factor on every logit; 0 where a constant added to all of them is not free.
        """
        self.deviations = None
        self.common.copy_(logit_scale * (weight - dense.to(weight)).mean(0))
        self.common_bias.copy_(logit_scale * (bias - self.bias.to(bias)).mean())

    @torch.no_grad()
    def resize(self, new_size: int, weight: Tensor, bias: Tensor) -> None:
        """Cut or continue it to another vocabulary.

        Args:
            new_size: vocabulary size wanted.
            weight: (new_size, d) rows of the quantised head, which new tokens take.
            bias: (new_size,), likewise.
        """
        self.top_k, kept = min(self.top_k, new_size), min(new_size, len(self.error))
        if self.weight is not None:
            rows = torch.cat([self.weight[:kept], weight[kept:].to(self.weight)])
            self.weight = nn.Parameter(rows, requires_grad=False)
        self.bias = torch.cat([self.bias[:kept], bias[kept:].to(self.bias)])
        self.error = torch.cat([self.error[:kept], self.error.new_zeros(new_size - kept)])

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        own = self.weight is not None
        return f"top_k={self.top_k}, deviations={self.deviations}, own_weight={own}"
