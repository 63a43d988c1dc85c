"""The smallest size whose perplexity stays within a limit, found in few distillations.

Letters: d hidden size, R bits a token. All growth of the perplexity is ln(perplexity factor). By
the theory of rate and distortion it falls as 2^(-2 R / d), and measured it does so nearly, so that
its logarithm over R is a smooth curve, almost straight. A fit costs a fraction of a distillation,
and distillation takes about the same share off neighbouring sizes. So the curve is drawn by fits
alone, a size proposed where the curve, lowered by what distillations gained so far, meets the
limit, and only the proposals are distilled.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .errors import ConversionError
from .sizes import FLOAT32_BYTES, HeadSize, choose_size

MOST_DISTILLATIONS = 4
MOST_FITS = 12  # where nothing is distilled; the bracket is closed after five or six
FITS_OF_A_PROPOSAL = 3
TOLERANCE = 0.03  # of R, between the size chosen and one that is known to be too small
# Of the growth by the fit alone that a distillation leaves, before one has been seen: on
# SmolLM2-135M 0.94 at 99%, 0.99 at 98% and 1.01 at 96% (benchmarks/results/quality_fit.json).
FIRST_GAIN = 0.99
HOPELESS = 4.0  # times the limit by the fit alone: no distillation takes off three quarters
LEAST_GROWTH = 1e-6  # below it the curve would be of noise
STEP = 8  # bits of a byte of codes
MOST_BITS_TRIED = 4.0  # SmolLM2-135M has a factor of 1.005 at 3.75
LARGEST_INCREASE = 1.0


@dataclass
class Choice:
    """How a search ended.

    Attributes:
        bits: the smallest size that passed, or None.
        fitted: growth by the fit alone, by size.
        judged: growth of what would be the result (distilled, where heads are), by size.
    """

    bits: int | None = None
    fitted: dict[int, float] = field(default_factory=dict)
    judged: dict[int, float] = field(default_factory=dict)


def choose_bits(
    limit: float,
    sizes: Sequence[int],
    start: Sequence[int],
    *,
    decay: float,
    fit: Callable[[int], float],
    distil: Callable[[int], float] | None = None,
) -> Choice:
    """Search the smallest size whose growth of the perplexity is at most `limit`.

    Args:
        limit: ln of the perplexity factor allowed, above 0.
        sizes: R that may be chosen, ascending, at least one.
        start: R to fit first, at least one, of `sizes` or not.
        decay: how fast the ln of the growth falls with R in theory, 2 ln 2 / d.
        fit: growth by the fit alone at R.
        distil: growth at R after the distillation, always called after `fit`; None where nothing
            is distilled, and the fit alone is judged.

    Returns:
        The smallest size that passed, and what was tried. With distillations at most
        `MOST_DISTILLATIONS`. Unless they ran out, the next smaller size tried failed, and lies
        within `TOLERANCE` of R or one step below.
    """
    search = _Search(limit, sizes, decay, fit, distil)
    for bits in start:
        search.fit(bits)
    search.run()
    passed = [bits for bits, growth in search.judged.items() if growth <= limit]
    return Choice(min(passed, default=None), search.fitted, search.judged)


class _Search:
    def __init__(
        self,
        limit: float,
        sizes: Sequence[int],
        decay: float,
        fit: Callable[[int], float],
        distil: Callable[[int], float] | None,
    ):
        self._limit, self._sizes, self._decay = limit, sizes, decay
        self._fit, self._distil = fit, distil
        self.fitted: dict[int, float] = {}
        self.judged: dict[int, float] = {}

    def fit(self, bits: int) -> None:
        if bits not in self.fitted:
            self.fitted[bits] = self._fit(bits)
            if self._distil is None and bits in self._sizes:
                self.judged[bits] = self.fitted[bits]

    def run(self) -> None:
        most = MOST_FITS if self._distil is None else MOST_DISTILLATIONS
        while len(self.judged) < most and (inside := self._inside()):
            bits = self._propose(inside)
            if self._distil is None:
                continue
            if bits == self._sizes[-1] and self.fitted[bits] > HOPELESS * self._limit:
                break
            self.judged[bits] = self._distil(bits)

    def _inside(self) -> list[int]:
        """Sizes that could still be the answer, clear of those judged; empty where it is found."""
        passed = [bits for bits, growth in self.judged.items() if growth <= self._limit]
        high = min(passed, default=None)
        below = [b for b, g in self.judged.items() if g > self._limit and (not high or b < high)]
        low = max(below, default=0)
        inside = [s for s in self._sizes if low < s and (high is None or s < high)]
        if high is not None and high - low <= TOLERANCE * high:
            return []
        clear = [
            s
            for s in inside
            if s - low >= TOLERANCE * s and (high is None or high - s >= TOLERANCE * high)
        ]
        return clear or inside

    def _propose(self, inside: list[int]) -> int:
        """A size where the growth should just be within the limit, and that is fitted."""
        bits = self._estimate(inside)
        for _ in range(FITS_OF_A_PROPOSAL):
            if bits in self.fitted:
                break
            self.fit(bits)
            better = self._estimate(inside)
            if self._distil is None or abs(better - bits) <= TOLERANCE * bits:
                break
            bits = better
        self.fit(bits)
        return bits

    def _estimate(self, inside: list[int]) -> int:
        """The smallest size that the curve takes to be within the limit, or the largest."""
        wanted = math.log(self._limit)
        return next((s for s in inside if self._curve(s) + self._gain(s) <= wanted), inside[-1])

    def _gain(self, bits: int) -> float:
        """What a distillation adds to the curve: as much as at the nearest size distilled."""
        last_try = len(self.judged) == MOST_DISTILLATIONS - 1
        if self._distil is None:
            return 0.0
        if last_try and min(self.judged.values()) > self._limit:
            return 0.0  # rather too large than nothing
        if not self.judged:
            return math.log(FIRST_GAIN)
        near = min(self.judged, key=lambda other: abs(other - bits))
        return _ln(self.judged[near]) - _ln(self.fitted[near])

    def _curve(self, bits: int) -> float:
        """Ln of the growth by the fit alone: straight between the fits; outside, as its end."""
        known = sorted(self.fitted)
        place = bisect_left(known, bits)
        if 0 < place < len(known):
            left, right = known[place - 1], known[place]
        else:
            left, right = (known[:2] if place == 0 else known[-2:]) * (2 if len(known) == 1 else 1)
        end = left if place == 0 else right
        slope = -self._decay
        if left != right:
            slope = (_ln(self.fitted[right]) - _ln(self.fitted[left])) / (right - left)
        if place in (0, len(known)):  # two fits close together may be noise
            slope = min(-self._decay / 3, max(-3 * self._decay, slope))
        return _ln(self.fitted[end]) + slope * (bits - end)


def _ln(growth: float) -> float:
    return math.log(max(growth, LEAST_GROWTH))


def sizes_to_choose_from(
    vocab_size: int, hidden_size: int, fine_share: float | None
) -> list[HeadSize]:
    """Sizes of sign codes that a search may end at: whole bytes, up to four bits a weight.

    Args:
        vocab_size: V.
        hidden_size: d.
        fine_share: of [`choose_size`].

    Returns:
        Ascending; all smaller than the dense layer. Below 64 bits every number, where a byte would
        be too coarse.

    Raises:
        ConversionError: there is none.
    """
    most = int(MOST_BITS_TRIED * hidden_size)
    step = STEP if most >= 8 * STEP else 1
    # The smallest tells what is wrong with a vocabulary that is too small for any.
    first = choose_size(
        "signs", vocab_size=vocab_size, hidden_size=hidden_size, bits=step, fine_share=fine_share
    )
    sizes = [HeadSize("sign", b, 2, first.num_fine_tokens) for b in range(step, most + 1, step)]
    dense = vocab_size * hidden_size * FLOAT32_BYTES
    return [s for s in sizes if s.stored_bytes(vocab_size, hidden_size, FLOAT32_BYTES) <= dense]


def check_choice(
    increase: float,
    method: str,
    embeddings: str,
    **sizes: float | Sequence[float] | None,
) -> None:
    """Check `max_perplexity_increase` and the options beside it.

    Args:
        increase: the option.
        method: that makes the codes.
        embeddings: what becomes of the input embedding.
        **sizes: options that choose the size, by name; None where not given.

    Raises:
        ConversionError: a value that makes no sense, or options that contradict it.
    """
    name = "`max_perplexity_increase`"
    if not 0 < increase <= LARGEST_INCREASE:
        raise ConversionError(
            f"{name} must lie above 0 and be at most {LARGEST_INCREASE:g}, got {increase}; 0.02 "
            "allows 2% more perplexity."
        )
    given = [f"`{option}` {value}" for option, value in sizes.items() if value is not None]
    if given:
        raise ConversionError(
            f"{name} {increase} chooses the size, and {' and '.join(given)} as well; give one of "
            "them."
        )
    if method != "signs":
        raise ConversionError(f"{name} chooses among sign codes; it does not apply to {method!r}.")
    if embeddings != "keep":
        raise ConversionError(
            f"{name} judges output layers alone, and `embeddings` {embeddings!r} changes more; "
            "choose with 'keep', then convert with the `bits` that the report names."
        )
