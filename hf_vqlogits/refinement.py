"""Nearly exact decoding: quantised logits choose candidates, rows of the dense layer score them.

The quantised logits of a position are wrong by some error, whose deviation s_v over the text where
token v is likely is known since the conversion. A token whose logit lies far below the best one,
measured by the errors of both, cannot be the dense layer's choice; the few others are scored again
by their own rows of the dense weight, which costs T rows of it where the dense layer reads V.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Rows = Callable[[Tensor], Tensor]

CHUNK_BYTES = 64 << 20  # of rows of the dense weight that are gathered at a time


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
        deviations: z. Of the T tokens of the largest quantised logits q, those are scored again for
            which q_best - q_v <= z sqrt(s_best^2 + s_v^2); None scores all of them.
        weight: parameter (V, d) without gradient, the dense weight; None where it is the input
            embedding's, whose rows are then handed in.
        bias: buffer (V,), the dense layer's, zero where it has none.
        error: buffer (V,), s_v, deviation of the error of a token's final logit.

    Args:
        config: a [`VQLogitsConfig`], or any object with the fields of [`RefinementConfig`].
    """

    bias: Tensor
    error: Tensor

    def __init__(self, config: RefinementConfig):
        super().__init__()
        self.top_k, self.deviations = config.refine_top_k, config.refine_deviations
        self.weight: nn.Parameter | None = None
        if not config.refine_with_embedding:
            rows = torch.empty(config.vocab_size, config.hidden_size)
            self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("bias", torch.empty(config.vocab_size))
        self.register_buffer("error", torch.empty(config.vocab_size))

    def initial_tensors(self) -> dict[str, Tensor]:
        """Tensors of a refinement that is to be filled, by name: rows like those of a new layer."""
        zeros = {name: torch.zeros(len(self.error), device="cpu") for name in ("bias", "error")}
        if self.weight is None:
            return zeros
        return {"weight": 0.02 * torch.randn(self.weight.shape, device="cpu"), **zeros}

    def forward(
        self,
        hidden_states: Tensor,
        logits: Tensor,
        *,
        rows: Rows | None = None,
        postprocess: Callable[[Tensor], Tensor] = lambda raw: raw,
    ) -> Tensor:
        """Logits with those of the candidates replaced by the dense layer's.

        Args:
            hidden_states: (..., d).
            logits: quantised ones (..., V); with gradient switched off they are changed in place.
            rows: of the dense weight, where this module has none of its own; see [`rows_of`].
            postprocess: from raw to final logits.

        Returns:
            Logits (..., V), in the type of `logits`.

        Raises:
            ValueError: there are no rows: none of its own and none handed in, or offloaded ones.
        """
        values, tokens = logits.detach().topk(self.top_k)
        exact = self.rescore(hidden_states, values, tokens, rows=rows, postprocess=postprocess)
        if torch.is_grad_enabled():
            return logits.scatter(-1, tokens, exact.to(logits.dtype))
        return logits.scatter_(-1, tokens, exact.to(logits.dtype))

    def rescore(
        self,
        hidden_states: Tensor,
        values: Tensor,
        tokens: Tensor,
        *,
        rows: Rows | None = None,
        postprocess: Callable[[Tensor], Tensor] = lambda raw: raw,
    ) -> Tensor:
        """The dense layer's logits of candidates that [`VQLogitsHead.topk`] found.

        Args:
            hidden_states: (..., d).
            values: final quantised logits (..., T), descending.
            tokens: whose they are (..., T).
            rows: of the dense weight, where this module has none of its own; see [`rows_of`].
            postprocess: from raw to final logits.

        Returns:
            Logits (..., T), no longer in order; those outside of the rule are as they were.

        Raises:
            ValueError: there are no rows: none of its own and none handed in, or offloaded ones.
        """
        rows = rows if self.weight is None else rows_of(self.weight)
        if rows is None:
            raise ValueError(
                "This refinement has no dense weight of its own: hand in `rows` of the input "
                "embedding's."
            )
        chosen = tokens.flatten(0, -2) if tokens.dim() > 1 else tokens.unsqueeze(0)
        hidden = hidden_states.reshape(len(chosen), hidden_states.shape[-1])
        at_once = max(1, CHUNK_BYTES // (4 * chosen.shape[1] * hidden.shape[1]))
        parts = zip(hidden.split(at_once), chosen.split(at_once), strict=True)
        if not len(chosen):
            return values
        raw = torch.cat([_raw_logits(rows, self.bias, h, c) for h, c in parts])
        exact = postprocess(raw.view(values.shape)).to(values.dtype)
        return torch.where(self.within(values, tokens), exact, values)

    def within(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Which candidates the rule scores again, bool (..., T); the arguments of `rescore`."""
        if self.deviations is None:
            return torch.ones_like(values, dtype=torch.bool)
        return self.distance(values, tokens) <= self.deviations

    def distance(self, values: Tensor, tokens: Tensor) -> Tensor:
        """How far candidates lie below the best one, in deviations of both errors, (..., T)."""
        error = self.error[tokens].float()
        both = torch.hypot(error[..., :1], error).clamp_min(torch.finfo(torch.float32).tiny)
        return (values[..., :1] - values).float() / both

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


def rows_of(weight: Tensor) -> Rows:
    """Gathers rows of a dense weight (V, d) where that lies: tokens (...) -> (..., d).

    Raises:
        ValueError: it lies nowhere (`meta`), as the weights of offloaded modules do.
    """
    if weight.is_meta:
        raise ValueError(
            "The dense weight that `refine_top_k` needs was offloaded, and its rows cannot be "
            "read; give its module a device in the `device_map`, or load with `refine_top_k=0`."
        )
    return lambda tokens: weight[tokens.to(weight.device)]


def _raw_logits(rows: Rows, bias: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Dense logits (n, T) of tokens (n, T) after hidden states (n, d), rounded as the layer's."""
    there = rows(tokens).to(hidden.device)
    added = bias[tokens].to(there).unsqueeze(-1)
    return torch.baddbmm(added, there, hidden.to(there.dtype).unsqueeze(-1)).squeeze(-1)
