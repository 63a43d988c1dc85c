"""Fit of sign codes: every output vector a signed sum of R shared vectors.

Letters: V vocabulary, d hidden size, R bits a token. Quantisation is in the metric of the logits
on calibration text (`metric.py`), in three stages:

1. Greedy (`sign_greedy.py`): blocks of rank-one steps on the residual, coarse to fine, so that
   codes of fewer bits are a prefix.
2. Codebook (`sign_codebook.py`): least squares for given codes.
3. Codes (`sign_search.py`): tabu search for a given codebook, token by token.

Stages 2 and 3 alternate a fixed number of times, which makes them end at a joint optimum that no
prefix shares: every size is refined on its own.

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

from hf_vqlogits.ops import pack_signs

from .calibration import CalibrationStatistics
from .metric import TokenMetric, token_metric
from .sign_codebook import solve_codebook, tiles
from .sign_greedy import extend_greedily
from .sign_search import SearchEffort, search_signs

ALTERNATIONS = 10
CODEBOOK_ITERATIONS = 4
FINAL_ITERATIONS = 8
EFFORT = SearchEffort(flips=1000, tenure=10, patience=300)

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


def _silent(_: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return iter


@dataclass
class SignFit:
    """Sign codes and codebook of an output layer.

    `logits = (h @ codebook.T + codebook_bias) @ signs.T` for raw hidden states h, signs being the
    unpacked codes.

    Attributes:
        codes: (V, ceil(R / 8)) uint8, bit r of a token at bit r % 8 of byte r // 8, 1 for +1.
        codebook: (R, d) float32.
        codebook_bias: (R,) float32.
        details: `error_greedy` and `error` (weighted squared error as a share of that of no codes
            at all), `seconds` of each stage.
    """

    codes: Tensor
    codebook: Tensor
    codebook_bias: Tensor
    details: dict[str, Any] = field(default_factory=dict)


class SignFitter:
    """Fits sign codes of several sizes to one output layer, sharing the greedy stage.

    Args:
        weight: (V, d) dense output weights.
        statistics: of the calibration text.
        bias: (V,) or None; it rides in the codes.
        seed: of everything random; the same seed and number of threads give the same bytes.
        device: where to compute; default `weight`'s.
        progress: `progress(what)` wraps an iterable, with tqdm for example.

    Raises:
        ValueError: shapes do not fit, or weights that are not finite; names the rows.
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: CalibrationStatistics,
        *,
        bias: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ):
        device = weight.device if device is None else torch.device(device)
        self._begin(token_metric(weight, statistics, bias=bias, device=device), seed, progress)

    @classmethod
    def of_metric(
        cls, metric: TokenMetric, *, seed: int = 0, progress: Progress | None = None
    ) -> "SignFitter":
        """A fitter of rows in a metric that is there already; for arguments see the class."""
        fitter = cls.__new__(cls)
        fitter._begin(metric, seed, progress)
        return fitter

    def _begin(self, metric: TokenMetric, seed: int, progress: Progress | None) -> None:
        self._metric = metric
        self._seed = seed
        self._progress = progress or _silent
        tokens, size = metric.rows.shape
        device = metric.rows.device
        self._generator = torch.Generator().manual_seed(seed)
        self._signs = torch.empty(tokens, 0, dtype=torch.int8, device=device)
        self._codebook = torch.empty(0, size, device=device)
        self._scale = _error(self._metric, self._signs, self._codebook)
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
    def fit(self, num_codebooks: int) -> SignFit:
        """Sign codes of one size, refined from the greedy prefix.

        Args:
            num_codebooks: R, bits a token.

        Returns:
            The fit.

        Raises:
            ValueError: `num_codebooks` below 1.
        """
        self.greedy(num_codebooks)
        metric = self._metric
        signs = self._signs[:, :num_codebooks].clone(memory_format=torch.contiguous_format)
        codebook = self._codebook[:num_codebooks]
        seconds = {"greedy": self._greedy_seconds, "codebook": 0.0, "search": 0.0}
        error_greedy = _error(metric, signs, codebook)

        def solved(iterations: int) -> Tensor:
            start = time.perf_counter()
            result = solve_codebook(metric, signs, codebook, iterations=iterations)
            seconds["codebook"] += time.perf_counter() - start
            return result

        wrap = self._progress(f"refining {num_codebooks:,} bits")
        for alternation in wrap(range(ALTERNATIONS)):
            codebook = solved(CODEBOOK_ITERATIONS)
            start = time.perf_counter()
            seed = self._seed * ALTERNATIONS + alternation
            search_signs(metric, signs, codebook, effort=EFFORT, seed=seed)
            seconds["search"] += time.perf_counter() - start
        codebook = solved(FINAL_ITERATIONS)
        vectors, biases = metric.product_form(codebook)
        scale = self._scale or 1.0
        details = {
            "error_greedy": error_greedy / scale,
            "error": _error(metric, signs, codebook) / scale,
            "seconds": seconds,
        }
        return SignFit(pack_signs(signs), vectors, biases, details)


def fit_signs(
    weight: Tensor,
    statistics: CalibrationStatistics,
    *,
    num_codebooks: int,
    bias: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> SignFit:
    """Sign codes of one size; see `SignFitter` for arguments and errors."""
    fitter = SignFitter(weight, statistics, bias=bias, seed=seed, device=device, progress=progress)
    return fitter.fit(num_codebooks)


def _error(metric: TokenMetric, signs: Tensor, codebook: Tensor) -> float:
    total = 0.0
    for tile in tiles(len(signs)):
        difference = torch.addmm(metric.rows[tile], signs[tile].float(), codebook, alpha=-1)
        total += float(metric.error(difference, tile).double().sum())
    return total
