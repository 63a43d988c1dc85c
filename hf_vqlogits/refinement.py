"""Nearly exact decoding: quantised logits choose candidates, rows of the dense layer score them.

Quantisation changed output vector w_v by e_v. Of random hidden states h the error of the logit has
the deviation s_v, known since the conversion; of a state that lies far out it is as many times
larger as that is farther,

    rho(h)^2 = mean_i ((h_i - mu_i) / sigma_i)^2,

mu and sigma being mean and deviation of the states of the calibration text. So a token u whose
quantised logit q_u lies more than z rho sqrt(s_best^2 + s_u^2) below the best one is unlikely to be
the dense layer's choice, z being fitted on text. The others are scored by their own rows of the
dense weight: T rows at most, where the dense layer reads V.
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
        deviations: z. Of the T tokens of the largest quantised logits, those within z deviations of
            the best are scored; None scores all of them.
        weight: parameter (V, d) without gradient, the dense weight; None where it is the input
            embedding's, whose rows are then handed in.
        bias: buffer (V,), the dense layer's, zero where it has none.
        error: buffer (V,), s, deviation of the error of every token's final logit.
        mean: buffer (d,), mu.
        spread: buffer (d,), sigma.
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
        rows: Rows | None = None,
        postprocess: Callable[[Tensor], Tensor] = lambda raw: raw,
    ) -> Tensor:
        """Logits on the dense layer's scale, those of the candidates by the dense layer itself.

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
        offset = self.offset(hidden_states).to(logits.dtype)
        shifted = logits - offset if torch.is_grad_enabled() else logits.sub_(offset)
        values, tokens = shifted.detach().topk(self.top_k)
        exact = self._rescore(hidden_states, values, tokens, rows, postprocess)
        if torch.is_grad_enabled():
            return shifted.scatter(-1, tokens, exact)
        return shifted.scatter_(-1, tokens, exact)

    def offset(self, hidden_states: Tensor) -> Tensor:
        """What all quantised logits have more than the dense ones, (..., d) -> (..., 1)."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)  # other sums, other digits
        common, bias = self.common.to(wide), self.common_bias.to(wide)
        return torch.nn.functional.linear(hidden_states.to(wide), common.unsqueeze(0), bias)

    def rescore(
        self,
        hidden_states: Tensor,
        values: Tensor,
        tokens: Tensor,
        *,
        rows: Rows | None = None,
        postprocess: Callable[[Tensor], Tensor] = lambda raw: raw,
    ) -> Tensor:
        """Logits, on the dense layer's scale, of candidates that [`VQLogitsHead.topk`] found.

        Args:
            hidden_states: (..., d).
            values: final quantised logits (..., T), descending.
            tokens: whose they are (..., T).
            rows: of the dense weight, where this module has none of its own; see [`rows_of`].
            postprocess: from raw to final logits.

        Returns:
            Logits (..., T), no longer in order: the dense layer's, or outside of the rule the
            quantised ones.

        Raises:
            ValueError: there are no rows: none of its own and none handed in, or offloaded ones.
        """
        values = values - self.offset(hidden_states).to(values.dtype)
        return self._rescore(hidden_states, values, tokens, rows, postprocess)

    def _rescore(
        self,
        hidden_states: Tensor,
        values: Tensor,
        tokens: Tensor,
        rows: Rows | None,
        postprocess: Callable[[Tensor], Tensor],
    ) -> Tensor:
        rows = rows if self.weight is None else rows_of(self.weight)
        if rows is None:
            raise ValueError(
                "This refinement has no dense weight of its own: hand in `rows` of the input "
                "embedding's."
            )
        if not tokens.numel():
            return values
        chosen = tokens.reshape(-1, tokens.shape[-1])
        hidden = hidden_states.reshape(len(chosen), hidden_states.shape[-1])
        at_once = max(1, CHUNK_BYTES // (4 * chosen.shape[1] * hidden.shape[1]))
        if len(chosen) <= at_once:  # as in decoding, where every operation counts
            raw = _raw_logits(rows, self.bias, hidden, chosen)
        else:
            parts = zip(hidden.split(at_once), chosen.split(at_once), strict=True)
            raw = torch.cat([_raw_logits(rows, self.bias, h, c) for h, c in parts])
        exact = postprocess(raw.view(values.shape)).to(values.dtype)
        if self.deviations is None:
            return exact
        return torch.where(self.within(hidden_states, values, tokens), exact, values)

    def within(self, hidden_states: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
        """Which candidates the rule scores, bool (..., T); the arguments of [`rescore`]."""
        if self.deviations is None:
            return torch.ones_like(values, dtype=torch.bool)
        return self.distance(hidden_states, values, tokens) <= self.deviations

    def distance(self, hidden_states: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
        """How far candidates lie below the best one, in deviations of the errors, (..., T)."""
        out = (hidden_states.float() - self.mean.float()) / self.spread.float()
        rho = out.square().mean(-1, keepdim=True).sqrt()
        error = self.error[tokens].float()
        deviation = rho * torch.hypot(error[..., :1], error)
        below = (values[..., :1] - values).float()
        return below / deviation.clamp_min(torch.finfo(torch.float32).tiny)

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
