"""Sign codes learnt on the divergence itself, by majorise-minimise.

Letters: N positions, V vocabulary, D = d + 1 whitened coordinates, R bits.

The fit knows of every token one weight and one direction, of an expansion around the dense layer.
Here gradient and curvature of KL(dense || quantised) are taken where the head is. With whitened
hidden states x, distributions p and q of the two layers, and n positions' worth of the fit's own
metric M to hold those tokens near their dense vectors that the text hardly ever makes likely,

    g_v = sum_x (q_v - p_v) x + n M_v (quantised - dense vector),    f_v = sum_x q_v (1 - q_v) + n,

moving the vectors by e changes the divergence by nearly, and for a large enough lambda at most,

    sum_v g_v . e_v + lambda / 2 f_v (|e_v|^2 + (m_v . e_v)^2):

diag(q) majorises diag(q) - q q^T, so that all tokens may move at once. Each token's codes are
searched towards the minimum of its term, -M_v^-1 g_v / (lambda f_v) away, from where they are and
by few flips, because the curvature is only as good as the metric's one direction.

On SmolLM2-135M at 99%, one iteration over 65,536 positions flipped one bit in 2,000 and took the
divergence from 0.129 to 0.123 nats; with lambda 1 and 10 flips it rose to 0.152. Solving for the
codebook in the same bound took it from 0.123 to 0.127: codewords move all tokens together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.ops import pack_signs, unpack_signs
from hf_vqlogits.ops.eager import FINE_FACTOR

from .metric import TokenMetric
from .precision import product_dtype
from .sign_codebook import tiles
from .sign_search import SearchEffort, search_signs

FLIPS = 5  # of a token and an iteration
PRIOR = 1.0  # n, positions
CHUNK_BYTES = 256 << 20  # of the logits of a chunk in float32

Logits = Callable[[Tensor], Tensor]


@dataclass
class Slope:
    """What a pass over text gathers.

    Attributes:
        gradient: (V, D), sum of (q - p) x.
        curvature: (V,), sum of q (1 - q).
        divergence: mean KL in nats a position.
        positions: N.
    """

    gradient: Tensor
    curvature: Tensor
    divergence: float
    positions: int


@torch.no_grad()
def slope_of_divergence(
    head: VQLogitsHead, metric: TokenMetric, teacher: Logits, hidden: Iterable[Tensor]
) -> Slope:
    """Gradient and curvature of KL(teacher || head) in the head's output vectors.

    Args:
        head: of sign codes.
        metric: whose whitened coordinates are used.
        teacher: the original logits (n, V) of hidden states (n, d).
        hidden: hidden states (n, d), of any number a time.

    Raises:
        ValueError: there are no hidden states.
    """
    device = metric.rows.device
    dtype = product_dtype(device)
    levels, words = levels_of(head).to(dtype), head.codebook.detach().float()
    biases = head.codebook_bias.detach().float()
    gradient = torch.zeros_like(metric.rows)
    curvature = torch.zeros_like(metric.weight)
    total, positions = 0.0, 0
    size = max(1, CHUNK_BYTES // (4 * len(metric.rows)))
    for part in hidden:
        for h in part.split(size):
            log_p = torch.log_softmax(teacher(h), -1, dtype=torch.float32)
            scores = head.score_scale * torch.addmm(biases, h, words.T)
            z = head.postprocess((scores.to(dtype) @ levels.T).float())
            log_q = torch.log_softmax(z, -1)
            p, difference = log_p.exp(), log_q - log_p
            total -= float((p * difference).sum())
            q = log_q.exp_()
            inner = _slope_of_postprocess(head, z)
            curvature += ((q - q * q) * inner.square()).sum(0)
            x = torch.nn.functional.pad((h - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
            gradient += ((q.sub_(p) * inner).to(dtype).T @ x.to(dtype)).float()
            positions += len(h)
    if not positions:
        raise ValueError("There are no hidden states to learn codes from.")
    return Slope(gradient, curvature, total / positions, positions)


@torch.no_grad()
def move_codes(head: VQLogitsHead, metric: TokenMetric, slope: Slope, damping: float) -> float:
    """Flip the bits that lower the majorised divergence, in place.

    Args:
        head: of sign codes.
        metric: of the fit, in the order of the vocabulary.
        slope: at this head.
        damping: lambda.

    Returns:
        The share of bits that were flipped.
    """
    codebook = whitened_codebook(head, metric)
    levels, weight = levels_of(head), slope.curvature + PRIOR
    target = torch.empty_like(metric.rows)
    for tile in tiles(len(levels)):
        vectors, context = levels[tile].float() @ codebook, metric.context[tile]
        pulled = _times_metric(vectors - metric.rows[tile], context)
        step = (slope.gradient[tile] + PRIOR * pulled) / (damping * weight[tile, None])
        along = (step * context).sum(1, keepdim=True)
        length = 1 + context.square().sum(1, keepdim=True)
        target[tile] = vectors - step + context * (along / length)  # Sherman and Morrison
    aim = TokenMetric(target, weight, metric.context, metric.unwhiten, metric.mean)
    effort = SearchEffort(flips=FLIPS, tenure=0, patience=FLIPS)
    bits = head.num_codebooks
    signs = unpack_signs(head.codes, bits, dtype=torch.int8)
    before, flipped = signs.clone(), 0
    single = torch.ones(len(signs), dtype=torch.bool, device=signs.device)
    if head.fine_ids is not None and head.fine_codes is not None:
        ids = head.fine_ids.long()
        single[ids] = False
        fine = unpack_signs(head.fine_codes, bits, dtype=torch.int8)
        both = torch.cat([signs[ids], fine], 1)
        words = torch.cat([codebook, FINE_FACTOR * codebook])
        search_signs(aim.tokens(ids), both, words, effort=effort)
        signs[ids] = both[:, :bits]
        flipped += int((both[:, bits:] != fine).sum())
        head.fine_codes.copy_(pack_signs(both[:, bits:].contiguous()))
    rest = single.nonzero().squeeze(1)
    if len(rest):
        part = signs[rest]
        search_signs(aim.tokens(rest), part, codebook, effort=effort)
        signs[rest] = part
    flipped += int((signs != before).sum())
    head.codes.copy_(pack_signs(signs))
    return flipped / (bits * (len(signs) + head.num_fine_tokens))


def levels_of(head: VQLogitsHead) -> Tensor:
    """What multiplies the codewords, (V, R) bfloat16: signs, and half of the second ones."""
    levels = unpack_signs(head.codes, head.num_codebooks, dtype=torch.bfloat16)
    if head.fine_ids is not None and head.fine_codes is not None:
        fine = unpack_signs(head.fine_codes, head.num_codebooks, dtype=torch.bfloat16)
        levels[head.fine_ids.long()] += FINE_FACTOR * fine
    return levels


def whitened_codebook(head: VQLogitsHead, metric: TokenMetric) -> Tensor:
    """The head's codebook (R, D) in the coordinates of the metric."""
    words = head.score_scale * head.codebook.detach().float()
    biases = head.score_scale * head.codebook_bias.detach().float() + words @ metric.mean
    whitened = torch.linalg.solve(metric.unwhiten.T, words.T).T
    return torch.cat([whitened, biases[:, None]], 1).contiguous()


def _times_metric(difference: Tensor, context: Tensor) -> Tensor:
    along = (difference * context).sum(1, keepdim=True)
    return torch.addcmul(difference, along, context)


def _slope_of_postprocess(head: VQLogitsHead, logits: Tensor) -> Tensor:
    """Derivative of the logits in what the codes sum to, by the family's scale and soft-cap."""
    scale = logits.new_tensor(head.logit_scale)
    if head.final_logit_softcapping is None:
        return scale
    return scale * (1 - (logits / head.final_logit_softcapping).square())
