"""Fit of sign codes: every output vector a signed sum of R shared vectors.

Letters: V vocabulary, d hidden size, R bits a token. Quantisation is in the metric of the logits
on calibration text (`metric.py`), in three stages:

1. Greedy (`sign_greedy.py`): blocks of rank-one steps on the residual, coarse to fine, so that
   codes of fewer bits are a prefix.
2. Codebook (`sign_codebook.py`): least squares for given codes.
3. Codes (`sign_search.py`): tabu search for a given codebook, token by token.

Stages 2 and 3 alternate a fixed number of times, which makes them end at a joint optimum that no
prefix shares: every size is refined on its own, unless it is to hold a smaller one. Then the bits
of that one stay, the new ones start greedily on what it leaves, and the search moves these alone;
the codebook is solved for as a whole, so that each size has one of its own.

The tokens that count most may have a second, fine code of half the weight. By the theory of rate
and distortion a token that counts four times as much deserves d bits more, and bits cost no
codeword. The second codes come in halfway: they start from the slope, and the search then sees the
2 R signs of such a token as one problem, with the codebook [C, C / 2].

Cost: with d about R, an alternation takes about V R (4 `CODEBOOK_ITERATIONS` d + R + 6 d)
operations in matrix products and V `flips` (R to 2 R) in the search; the greedy stage 20 V d R.
Memory besides `weight`: 2 V d floats for rows and contexts, V R bytes for the codes, and tiles
of tokens, so that a vocabulary of 128,256 with d 4,096 and R 5,000 takes about 6 GB.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_vqlogits.ops import pack_signs, unpack_signs
from hf_vqlogits.ops.eager import FINE_FACTOR

from .metric import TokenMetric
from .sign_codebook import error_of, solve_codebook, tiles
from .sign_greedy import extend_greedily
from .sign_search import SearchEffort, free_bits, search_signs

ALTERNATIONS = 10
FINE_FROM = 5  # alternation in which the second codes come in
CODEBOOK_ITERATIONS = 4
FINAL_ITERATIONS = 8
EFFORT = SearchEffort(flips=1000, tenure=10, patience=300)
FINE_EFFORT = SearchEffort(flips=2000, tenure=10, patience=300)

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


def _silent(_: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return iter


@dataclass
class SignFit:
    """Sign codes and codebook of an output layer.

    `logits = (h @ codebook.T + codebook_bias) @ signs.T` for raw hidden states h, signs being the
    unpacked codes, plus half of the unpacked fine codes for the tokens that have them.

    Attributes:
        codes: (V, ceil(R / 8)) uint8, bit r of a token at bit r % 8 of byte r // 8, 1 for +1.
        codebook: (R, d) float32.
        codebook_bias: (R,) float32.
        fine_ids: (F,) int32 tokens with a second code, ascending, or None.
        fine_codes: (F, ceil(R / 8)) uint8, or None.
        details: `error_greedy` and `error` (weighted squared error as a share of that of no codes
            at all), `seconds` of each stage.
    """

    codes: Tensor
    codebook: Tensor
    codebook_bias: Tensor
    fine_ids: Tensor | None = None
    fine_codes: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)


class SignFitter:
    """Fits sign codes of several sizes to the rows of one metric, sharing the greedy stage.

    Args:
        metric: of the rows; it says where to compute.
        seed: of everything random; the same seed and number of threads give the same bytes.
        progress: `progress(what)` wraps an iterable, with tqdm for example.
    """

    def __init__(self, metric: TokenMetric, *, seed: int = 0, progress: Progress | None = None):
        # Tokens in the order of their importance: those with a second code are a slice.
        self._order = metric.weight.argsort(descending=True, stable=True)
        self._metric = metric.tokens(self._order)
        self._seed = seed
        self._progress = progress or _silent
        tokens, size = metric.rows.shape
        device = metric.rows.device
        self._generator = torch.Generator().manual_seed(seed)
        self._signs = torch.empty(tokens, 0, dtype=torch.int8, device=device)
        self._codebook = torch.empty(0, size, device=device)
        self._scale = error_of(self._metric, self._signs, self._codebook)
        self._greedy_seconds = 0.0

    @torch.no_grad()
    def greedy(self, num_codebooks: int) -> None:
        """Make the greedy codes of the largest size that will be wanted.

        `fit` extends them by itself; but then the bits depend on the order of the sizes.

        Raises:
            ValueError: `num_codebooks` below 1.
        """
        if num_codebooks < 1:
            raise ValueError(f"`num_codebooks` must be at least 1, got {num_codebooks}.")
        start = time.perf_counter()
        if num_codebooks > len(self._codebook):
            self._signs, self._codebook = extend_greedily(
                self._metric,
                self._signs,
                self._codebook,
                num_codebooks,
                generator=self._generator,
                progress=self._progress("greedy codes"),
            )
        self._greedy_seconds += time.perf_counter() - start

    @torch.no_grad()
    def fit(
        self, num_codebooks: int, num_fine_tokens: int = 0, *, inside: SignFit | None = None
    ) -> SignFit:
        """Sign codes of one size, refined from the greedy prefix.

        Args:
            num_codebooks: R, bits a token.
            num_fine_tokens: F, how many tokens have a second code: those that count most.
            inside: a smaller fit of the same layer, whose bits are the first ones of the result.

        Returns:
            The fit.

        Raises:
            ValueError: `num_codebooks` below 1 or not above that of `inside`, or `num_fine_tokens`
                not within 0..V or other tokens than those of `inside`.
        """
        metric = self._metric
        if not 0 <= num_fine_tokens <= len(metric.rows):
            raise ValueError(
                f"`num_fine_tokens` must lie between 0 and {len(metric.rows)}, got "
                f"{num_fine_tokens}."
            )
        frozen = 0 if inside is None else len(inside.codebook)
        if inside is None:
            self.greedy(num_codebooks)
            greedy_seconds = self._greedy_seconds
            signs = self._signs[:, :num_codebooks].clone(memory_format=torch.contiguous_format)
            codebook, fine = self._codebook[:num_codebooks], signs[:num_fine_tokens, :0]
        else:
            start = time.perf_counter()
            signs, fine, codebook = self._extended(inside, num_codebooks, num_fine_tokens)
            greedy_seconds = time.perf_counter() - start
        seconds = {"greedy": greedy_seconds, "codebook": 0.0, "search": 0.0}
        error_greedy = error_of(metric, _levels(signs, fine), codebook)

        def solved(iterations: int) -> Tensor:
            start = time.perf_counter()
            result = solve_codebook(metric, _levels(signs, fine), codebook, iterations=iterations)
            seconds["codebook"] += time.perf_counter() - start
            return result

        wrap = self._progress(f"refining {num_codebooks:,} bits")
        for alternation in wrap(range(ALTERNATIONS)):
            codebook = solved(CODEBOOK_ITERATIONS)
            start = time.perf_counter()
            seed = self._seed * ALTERNATIONS + alternation
            if alternation == FINE_FROM:
                first = metric.tokens(slice(num_fine_tokens))
                found = _first_fine_signs(first, _levels(signs, fine), codebook)
                fine = torch.cat([fine, found[:, frozen:]], 1)
            _search(metric, signs, fine, codebook, seed, frozen)
            seconds["search"] += time.perf_counter() - start
        codebook = solved(FINAL_ITERATIONS)
        vectors, biases = metric.product_form(codebook)
        scale = self._scale or 1.0
        details = {
            "error_greedy": error_greedy / scale,
            "error": error_of(metric, _levels(signs, fine), codebook) / scale,
            "seconds": seconds,
        }
        return self._in_order(signs, fine, vectors, biases, details)

    def _extended(
        self, inside: SignFit, num_codebooks: int, num_fine_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Signs (V, R), the first ones those of a smaller fit, its fine ones (F, R0), codebook."""
        frozen, device = len(inside.codebook), self._order.device
        if num_codebooks <= frozen:
            raise ValueError(
                f"`num_codebooks` {num_codebooks} must be above the {frozen} of the fit that it is "
                "to hold."
            )
        ids, place = self._order[:num_fine_tokens].sort()
        held = ids[:0] if inside.fine_ids is None else inside.fine_ids.to(ids)
        if not torch.equal(ids, held):
            raise ValueError(
                f"`num_fine_tokens` {num_fine_tokens} must name the tokens with a second code in "
                f"the fit that is to be held, which has {len(held)}."
            )
        signs = unpack_signs(inside.codes.to(device)[self._order], frozen, dtype=torch.int8)
        fine = signs[:num_fine_tokens].clone()
        if inside.fine_codes is not None:
            fine[place] = unpack_signs(inside.fine_codes.to(device), frozen, dtype=torch.int8)
        vectors, biases = inside.codebook.to(device), inside.codebook_bias.to(device)
        levels, codebook = extend_greedily(
            self._metric,
            _levels(signs, fine),
            self._metric.whitened_form(vectors, biases),
            num_codebooks,
            generator=torch.Generator().manual_seed(self._seed),
            progress=self._progress("greedy codes"),
        )
        return torch.cat([signs, levels[:, frozen:].to(torch.int8)], 1), fine, codebook

    def _in_order(
        self, signs: Tensor, fine: Tensor, vectors: Tensor, biases: Tensor, details: dict[str, Any]
    ) -> SignFit:
        """The fit with tokens in the order of the vocabulary."""
        packed = pack_signs(signs)
        codes = torch.empty_like(packed)
        codes[self._order] = packed
        if not len(fine):
            return SignFit(codes, vectors, biases, details=details)
        fine_ids, place = self._order[: len(fine)].sort()
        fine_codes = pack_signs(fine)[place]
        return SignFit(codes, vectors, biases, fine_ids.int(), fine_codes, details)


def _search(
    metric: TokenMetric, signs: Tensor, fine: Tensor, codebook: Tensor, seed: int, frozen: int
) -> None:
    """Search both codes of the first tokens and the one of the others, in place.

    The second codes may be shorter than the first ones, or have no bits yet.
    """
    bits, fine_bits = len(codebook), fine.shape[1]
    split = len(fine) if fine_bits else 0
    rest, free = metric.tokens(slice(split, None)), free_bits(frozen, bits)
    search_signs(rest, signs[split:], codebook, effort=EFFORT, seed=seed, free=free)
    if split:
        both = torch.cat([signs[:split], fine], 1)
        words = torch.cat([codebook, FINE_FACTOR * codebook[:fine_bits]])
        first, free = metric.tokens(slice(split)), free_bits(frozen, bits, fine_bits)
        search_signs(first, both, words, effort=FINE_EFFORT, seed=seed, free=free)
        signs[:split], fine[:] = both[:, :bits], both[:, bits:]


def _first_fine_signs(metric: TokenMetric, levels: Tensor, codebook: Tensor) -> Tensor:
    """Signs (F, R) of the slope of the error: codewords that point to what the codes miss.

    Args:
        metric: of the F tokens.
        levels: (F, R) or of more tokens, which the codes so far give the codewords.
        codebook: (R, D).
    """
    parts = [levels[:0].to(torch.int8)]
    for tile in tiles(len(metric.rows)):
        codes = levels[: len(metric.rows)][tile].float()
        difference = torch.addmm(metric.rows[tile], codes, codebook, alpha=-1)
        slope = metric.pull(difference, tile) @ codebook.T
        parts.append(torch.where(slope < 0, -1, 1).to(torch.int8))
    return torch.cat(parts)


def _levels(signs: Tensor, fine: Tensor) -> Tensor:
    """What multiplies the codewords, (V, R): signs, plus half of the first tokens' second ones."""
    if not fine.numel():
        return signs
    levels = signs.to(torch.bfloat16)  # exact: +-0.5, +-1, +-1.5
    levels[: len(fine), : fine.shape[1]].add_(fine, alpha=FINE_FACTOR)
    return levels
