"""Codes learnt on the divergence itself, by majorise-minimise.

Letters: N positions, V vocabulary, D = d + 1 whitened coordinates, R bits.

The fit knows of every token one weight and one direction, of an expansion around the dense layer.
Here gradient and curvature of KL(dense || quantised) are taken where the head is. With whitened
hidden states x, distributions p and q of the two layers, and n positions' worth of the fit's own
metric M to hold those tokens near their dense vectors that the text hardly ever makes likely,

    g_v = sum_x (q_v - p_v) x + n M_v (quantised - dense vector),    f_v = sum_x q_v (1 - q_v) + n,

moving the vectors by e changes the divergence by nearly, and for a large enough lambda at most,

    sum_v g_v . e_v + lambda / 2 f_v (|e_v|^2 + (m_v . e_v)^2):

diag(q) majorises diag(q) - q q^T, so that all tokens may move at once. Each token's codes are
searched towards the minimum of its term, -M_v^-1 g_v / (lambda f_v) away, from where they are: sign
codes by few flips, because the curvature is only as good as the metric's one direction, index codes
by one choice of every codebook.

On SmolLM2-135M at 99%, one iteration over 65,536 positions flipped one bit in 2,000 and took the
divergence from 0.129 to 0.123 nats; with lambda 1 and 10 flips it rose to 0.152. Solving for the
codebook in the same bound took it from 0.123 to 0.127: codewords move all tokens together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops import eager, pack_signs, unpack_signs
from hf_vqlogits.ops.eager import FINE_FACTOR
from hf_vqlogits.ops.precision import product_dtype

from .metric import TokenMetric
from .residual import reconstruct, reencode
from .sign_codebook import tiles
from .sign_search import SearchEffort, free_bits, search_signs

FLIPS = 5  # of a token and an iteration
PRIOR = 1.0  # n, positions of logits of unit scale
CHUNK_BYTES = 256 << 20  # of the logits of a chunk in float32

Logits = Callable[[Tensor], Tensor]


@dataclass
class Slope:
    """What a pass over text gathers.

    Attributes:
        gradient: (V, D), sum of (q - p) x.
        curvature: (V,), sum of q (1 - q).
    """

    gradient: Tensor
    curvature: Tensor


@torch.no_grad()
def slope_of_divergence(
    head: VQLogitsHead, metric: TokenMetric, teacher: Logits, hidden: Iterable[Tensor]
) -> Slope:
    """Gradient and curvature of KL(teacher || head) in the head's output vectors.

    Args:
        head: plain, no mixture.
        metric: whose whitened coordinates are used.
        teacher: the original logits (n, V) of hidden states (n, d).
        hidden: hidden states (n, d), of any number a time.
    """
    dtype = product_dtype(metric.rows.device)
    logits = _logits_of(head, dtype)
    slope = Slope(torch.zeros_like(metric.rows), torch.zeros_like(metric.weight))
    size = max(1, CHUNK_BYTES // (4 * len(metric.rows)))
    for part in hidden:
        for h in part.split(size):
            z = logits(h)
            inner = slope_of_postprocess(head, z)
            q = torch.softmax(z, -1)
            slope.curvature += torch.addcmul(q, q, q, value=-1).mul_(inner.square()).sum(0)
            q -= torch.softmax(teacher(h), -1, dtype=torch.float32)
            x = torch.nn.functional.pad((h - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
            slope.gradient += (q.mul_(inner).to(dtype).T @ x.to(dtype)).float()
    return slope


def _logits_of(head: VQLogitsHead, dtype: torch.dtype) -> Logits:
    """Final logits (n, V) in float32 of hidden states, of sign codes by a product in a type."""
    if head.code_type != "sign":
        return lambda hidden: head(hidden).float()
    levels, words = levels_of(head).to(dtype), head.codebook.detach().float()
    biases = head.codebook_bias.detach().float()

    def logits(hidden: Tensor) -> Tensor:
        scores = eager.scores(hidden, words, biases, scale=head.score_scale)
        return head.postprocess((scores.to(dtype) @ levels.T).float())

    return logits


@torch.no_grad()
def slope_in_scores(
    head: VQLogitsHead, levels: Tensor, scores: Tensor, teacher: Logits, hidden: Tensor
) -> Tensor:
    """Gradient of the sum over positions of KL(teacher || head) in the scores.

    Autograd would keep half a dozen N x V tensors, and passes over them are what takes the time.

    Args:
        head: of sign codes.
        levels: (V, R), of [`levels_of`], in the type of the products.
        scores: (n, R), of the hidden states.
        teacher: the original logits (n, V) of hidden states (n, d).
        hidden: (n, d).

    Returns:
        (n, R) float32.
    """
    parts = []
    size = max(1, CHUNK_BYTES // (4 * len(levels)))
    for s, h in zip(scores.split(size), hidden.split(size), strict=True):
        z = head.postprocess((s.to(levels.dtype) @ levels.T).float())
        inner = slope_of_postprocess(head, z)
        z = torch.softmax(z, -1).sub_(torch.softmax(teacher(h), -1)).mul_(inner)
        parts.append((z.to(levels.dtype) @ levels).float())
    return torch.cat(parts)


@torch.no_grad()
def move_codes(
    head: VQLogitsHead, metric: TokenMetric, slope: Slope, damping: float, frozen: int = 0
) -> None:
    """Change the codes so as to lower the majorised divergence, in place.

    Args:
        head: plain, no mixture.
        metric: of the fit, in the order of the vocabulary.
        slope: at this head.
        damping: lambda.
        frozen: bits of each sign code, the first ones, that stay.
    """
    codebook = whitened_codebook(head, metric)
    levels = levels_of(head) if head.code_type == "sign" else None
    # The fit's metric is in units of the vectors alone, the slope is of final logits.
    prior = PRIOR * head.logit_scale**2
    weight = slope.curvature + prior
    target = torch.empty_like(metric.rows)
    common: Tensor | float = 0.0
    if levels is None:  # fits of groups of tokens keep in their rows what all have in common
        common = metric.weight @ (reconstruct(head.codes.long(), codebook) - metric.rows)
    for tile in tiles(len(target)):
        if levels is None:
            vectors = reconstruct(head.codes[tile].long(), codebook)
        else:
            vectors = levels[tile].float() @ codebook
        drift = vectors - metric.rows[tile] - common
        pull = slope.gradient[tile] + prior * metric.stretch(drift, tile)
        target[tile] = vectors - metric.shrink(pull / (damping * weight[tile, None]), tile)
    aim = TokenMetric(target, weight, metric.context, metric.unwhiten, metric.mean)
    if levels is None:
        codes = head.codes.long()
        reencode(aim, codes, codebook, torch.arange(len(codebook)))
        head.codes.copy_(codes)
    else:
        _flip(head, aim, codebook, frozen)


def _flip(head: VQLogitsHead, aim: TokenMetric, codebook: Tensor, frozen: int) -> None:
    """Flip bits of sign codes, few of a token, towards the rows of `aim`."""
    effort = SearchEffort(flips=FLIPS, tenure=0, patience=FLIPS)
    bits = head.num_codebooks
    signs = unpack_signs(head.codes, bits, dtype=torch.int8)
    single = torch.ones(len(signs), dtype=torch.bool, device=signs.device)
    if head.fine_ids is not None and head.fine_codes is not None:
        ids = head.fine_ids.long()
        single[ids] = False
        both = torch.cat([signs[ids], unpack_signs(head.fine_codes, bits, dtype=torch.int8)], 1)
        words = torch.cat([codebook, FINE_FACTOR * codebook])
        free = free_bits(frozen, bits, bits)
        search_signs(aim.tokens(ids), both, words, effort=effort, free=free)
        signs[ids] = both[:, :bits]
        head.fine_codes.copy_(pack_signs(both[:, bits:]))
    rest = single.nonzero().squeeze(1)
    if len(rest):
        part = signs[rest]
        search_signs(aim.tokens(rest), part, codebook, effort=effort, free=free_bits(frozen, bits))
        signs[rest] = part
    head.codes.copy_(pack_signs(signs))


def levels_of(head: VQLogitsHead) -> Tensor:
    """What multiplies the codewords, (V, R) bfloat16: signs, and half of the second ones."""
    levels = unpack_signs(head.codes, head.num_codebooks, dtype=torch.bfloat16)
    if head.fine_ids is not None and head.fine_codes is not None:
        fine = unpack_signs(head.fine_codes, head.num_codebooks, dtype=torch.bfloat16)
        levels[head.fine_ids.long()] += FINE_FACTOR * fine
    return levels


def whitened_codebook(head: VQLogitsHead, metric: TokenMetric) -> Tensor:
    """The head's codebook in the coordinates of the metric: (R, D), of index codes (G, K, D)."""
    words = head.score_scale * head.codebook.detach().float().flatten(0, -2)
    biases = head.score_scale * head.codebook_bias.detach().float().flatten()
    return metric.whitened_form(words, biases).view(*head.codebook_bias.shape, -1)


def slope_of_postprocess(head: VQLogitsHead, logits: Tensor) -> Tensor:
    """Derivative of the logits in what the codes sum to, by the family's scale and soft-cap."""
    scale = logits.new_tensor(head.logit_scale)
    if head.final_logit_softcapping is None:
        return scale
    return scale * (1 - (logits / head.final_logit_softcapping).square())
