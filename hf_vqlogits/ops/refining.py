"""The largest quantised logits scored again by the dense layer, as far as a rule lets them through.

Of a token v the quantised logit is off by an error of the deviation s_v on hidden states as far out
as the mean one, and by as many times more as a state h lies farther,

    rho(h)^2 = mean_i ((h_i - mu_i) / sigma_i)^2.

A candidate is scored where its logit is no more than z rho sqrt(s_best^2 + s_v^2) below the best.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, cpu_refining
from .eager import final_logits
from .top import check_k, largest

CHUNK_BYTES = 64 << 20  # of rows of the dense weight that are gathered at a time


class Dense(NamedTuple):
    """The layer that scores again.

    Attributes:
        weight: (V, d), where it lies.
        bias: (V,).
        logit_scale: factor on its logits.
        softcap: c of c tanh(z / c), on the scaled logits z; None without.
    """

    weight: Tensor
    bias: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None


class Offset(NamedTuple):
    """What all quantised logits have more than the dense ones: common . h + bias.

    Attributes:
        common: (d,).
        bias: (1,).
    """

    common: Tensor
    bias: Tensor


class Rule(NamedTuple):
    """Which candidates are scored.

    Attributes:
        deviations: z.
        error: (V,), s.
        mean: (d,), mu.
        spread: (d,), sigma.
    """

    deviations: float
    error: Tensor
    mean: Tensor
    spread: Tensor


def refine(
    hidden: Tensor, logits: Tensor, top_k: int, dense: Dense, offset: Offset, rule: Rule | None
) -> Tensor:
    """Logits on the dense layer's scale, the largest by the dense layer itself.

    Args:
        hidden: (N, d).
        logits: final quantised ones (N, V); with gradient switched off they are changed in place.
        top_k: T, 1 to V, candidates of a row.
        dense: scores them.
        offset: is subtracted.
        rule: which are scored; None for all.

    Returns:
        (N, V) in the type of `logits`; differentiable in `hidden` and `logits`.

    Raises:
        ValueError: `top_k` is not in 1..V.
    """
    in_place = not torch.is_grad_enabled()
    tensors = (hidden, logits, *dense[:2], *offset, *(rule[1:] if rule else ()))
    check_k(top_k, logits.shape[-1])
    if in_place and backends.callable_directly(*tensors) and backends.may_use_library():
        if cpu_refining.knows(hidden, logits, dense, offset, rule):
            return cpu_refining.refine_(hidden, logits, top_k, dense, offset, rule)
    less = shift(hidden, offset).to(logits.dtype)
    if in_place:
        tokens = largest(logits.sub_(less), top_k)[1]
        values = logits.gather(-1, tokens)  # of token 0 too, where it stands for no number
        return logits.scatter_(-1, tokens, _scored(hidden, values, tokens, dense, rule))
    shifted = logits - less
    tokens = largest(shifted, top_k)[1]
    values = shifted.gather(-1, tokens)  # with gradient, for what the rule leaves out
    return shifted.scatter(-1, tokens, _scored(hidden, values, tokens, dense, rule))


def shift(hidden: Tensor, offset: Offset) -> Tensor:
    """What is subtracted from the logits of hidden states: (..., d) -> (..., 1), in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)  # other sums, other digits
    common, bias = (tensor.to(wide) for tensor in offset)
    return torch.nn.functional.linear(hidden.to(wide), common.unsqueeze(0), bias)


def distance(hidden: Tensor, values: Tensor, tokens: Tensor, rule: Rule) -> Tensor:
    """How far candidates lie below the best one, in deviations of the errors.

    Args:
        hidden: (..., d).
        values: (..., T), their logits on the dense layer's scale, the best first.
        tokens: (..., T), the candidates.
        rule: of the errors.

    Returns:
        (..., T).
    """
    out = (hidden.float() - rule.mean.float()) / rule.spread.float()
    rho = out.square().mean(-1, keepdim=True).sqrt()
    error = rule.error[tokens].float()
    deviation = rho * torch.hypot(error[..., :1], error)
    below = (values[..., :1] - values).float()
    return below / deviation.clamp_min(torch.finfo(torch.float32).tiny)


def _scored(
    hidden: Tensor, values: Tensor, tokens: Tensor, dense: Dense, rule: Rule | None
) -> Tensor:
    """The dense logits of candidates (N, T), or `values` where the rule leaves them out."""
    if not tokens.numel():
        return values
    at_once = max(1, CHUNK_BYTES // (4 * tokens.shape[1] * hidden.shape[1]))
    if len(hidden) <= at_once:  # as in decoding, where every operation counts
        raw = _raw_logits(hidden, tokens, dense)
    else:
        parts = zip(hidden.split(at_once), tokens.split(at_once), strict=True)
        raw = torch.cat([_raw_logits(some, chosen, dense) for some, chosen in parts])
    exact = final_logits(raw, dense.logit_scale, dense.softcap).to(values.dtype)
    if rule is None:
        return exact
    return torch.where(distance(hidden, values, tokens, rule) <= rule.deviations, exact, values)


def _raw_logits(hidden: Tensor, tokens: Tensor, dense: Dense) -> Tensor:
    """Before scale and soft-cap, rounded as the layer's."""
    weight = dense.weight
    rows = weight[tokens.to(weight.device)].to(hidden.device)
    added = dense.bias[tokens].to(rows).unsqueeze(-1)
    return torch.baddbmm(added, rows, hidden.to(rows.dtype).unsqueeze(-1)).squeeze(-1)
