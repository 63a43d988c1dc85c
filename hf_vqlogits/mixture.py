"""A mixture of softmaxes over one codebook, with a dense-to-sparse gate.

    P(v | h) = sum_m gate_m(h) softmax_v(z_m[v])

Logits of a V x d layer are of rank d at most, those of a mixture are not (Yang et al., "Breaking
the Softmax Bottleneck", arXiv 1711.03953). There every component has a d x d projection of the
hidden state and a dense product of its own. Here components differ in the scores, which are R wide
and not V wide: those of component m are a_m s + b_m, s being the scores of the one codebook. They
share codes and codewords; a component costs 2 R parameters, d + 1 in the gate, and one more look-up
a token.

The gate is that of `gates.py` (Nguyen, Akbarian and Ho), of h / sqrt(d): a step of Adam moves every
slope by the learning rate, and so the gate's scores no further than a bias.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .gates import gate_scores
from .head import HeadConfig, VQLogitsHead
from .ops.registration import without_autocast
from .ops.row_losses import check_options, reduced

SPREAD = 0.01  # of the factors around 1, at the start
CHUNK_BYTES = 64 << 20  # of float32 logits that `topk` has at a time


class MixtureConfig(HeadConfig, Protocol):
    """The fields that a mixture reads; [`VQLogitsConfig`] has them."""

    num_mixtures: int
    gate_activation: str
    gate_temperature: float


class VQLogitsMixtureHead(VQLogitsHead):
    """A [`VQLogitsHead`] whose distribution is a mixture of M softmaxes.

    What it returns as logits are log-probabilities. They are final: scale and soft-cap of the
    configuration were applied in every component.

    Attributes:
        num_mixtures: M.
        factors: parameter (M, R), index codes (M, G, K): a, what a component multiplies scores by.
        shifts: parameter shaped likewise: b, what it adds to them, in units of `score_scale`.
        gate_slopes: parameter (M, d).
        gate_biases: parameter (M,).

    Args:
        config: a [`VQLogitsConfig`], or any object with the fields of [`MixtureConfig`].
    """

    def _register(self, config: Any) -> None:
        super()._register(config)
        self.num_mixtures = config.num_mixtures
        self.gate_activation = config.gate_activation
        self.gate_temperature = float(config.gate_temperature)
        shape = (self.num_mixtures, *self.codebook_bias.shape)
        self.factors = nn.Parameter(torch.empty(shape))
        self.shifts = nn.Parameter(torch.empty(shape))
        self.gate_slopes = nn.Parameter(torch.empty(self.num_mixtures, self.in_features))
        self.gate_biases = nn.Parameter(torch.empty(self.num_mixtures))

    def initial_tensors(self, *, common: float | None = None) -> dict[str, Tensor]:
        """Random tensors of a head to be trained from scratch, as [`VQLogitsHead`]'s.

        Components are nearly equal, factors being drawn around 1, and share all positions alike.
        """
        return super().initial_tensors(common=common) | self._initial_components()

    def _initial_components(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        drawn = torch.randn(self.factors.shape, device="cpu", generator=generator)
        return {
            "factors": 1 + SPREAD * drawn,
            "shifts": torch.zeros(self.shifts.shape, device="cpu"),
            "gate_slopes": torch.zeros(self.gate_slopes.shape, device="cpu"),
            "gate_biases": torch.zeros(self.gate_biases.shape, device="cpu"),
        }

    def component_parameters(self) -> Iterator[nn.Parameter]:
        """What the mixture has beside the codebook: factors, shifts and gate."""
        yield from (self.factors, self.shifts, self.gate_slopes, self.gate_biases)

    def log_gate(self, rows: Tensor) -> Tensor:
        """Logarithm of every component's share, (N, d) -> (N, M), float32 or wider."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows.device):
            scores = gate_scores(
                rows.to(wide) / math.sqrt(self.in_features),
                self.gate_slopes.to(wide),
                self.gate_biases.to(wide),
                torch.tensor(math.log(self.gate_temperature), device=rows.device, dtype=wide),
                self.gate_activation,
            )
            return scores.log_softmax(-1)

    def _logits(self, rows: Tensor) -> Tensor:
        scores = self.scores(rows)
        wide = torch.promote_types(scores.dtype, torch.float32)
        shares, total = self.log_gate(rows), None
        for component in range(self.num_mixtures):
            factors, shifts = self.factors[component].to(wide), self.shifts[component].to(wide)
            own = torch.addcmul(self.score_scale * shifts, scores.to(wide), factors)
            logits = self.postprocess(ops.expand(own, **self._coded()))
            part = logits.log_softmax(-1) + shares[:, component, None]
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None  # M is at least 1
        return total.to(scores.dtype)

    def _loss(self, rows: Tensor, labels: Tensor, **options: Any) -> Tensor:
        plain: dict[str, Any] = {"label_smoothing": 0.0, "z_loss": 0.0}
        plain["output_loss"] = "cross_entropy"
        for name, wanted in plain.items():
            if options[name] != wanted:
                raise ValueError(
                    "A mixture of softmaxes trains by plain cross-entropy: its logits are "
                    "log-probabilities, no margins, and never built for the loss. Got "
                    f"`{name}` {options[name]!r}; use {wanted!r}, or `num_mixtures` 1."
                )
        ignore_index, reduction = options["ignore_index"], options["reduction"]
        num_items_in_batch = options["num_items_in_batch"]
        check_options(reduction, num_items_in_batch, None, None)
        parts = [
            self._loss_by(
                self.codebook * factors.unsqueeze(-1),
                self.codebook_bias * factors + shifts,
                rows,
                labels,
                reduction="none",
                ignore_index=ignore_index,
                **plain,
            )
            for factors, shifts in zip(self.factors, self.shifts, strict=True)
        ]
        mixed = -torch.logsumexp(self.log_gate(rows) - torch.stack(parts, -1), -1)
        losses = mixed.masked_fill(labels == ignore_index, 0)
        return reduced(losses, labels, ignore_index, reduction, num_items_in_batch)

    @torch.no_grad()
    def topk(self, hidden_states: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest log-probabilities of every position and their tokens, in chunks of rows.

        Components have other orders of the tokens, so that all V are computed; see
        [`VQLogitsHead.topk`] for arguments and results.
        """
        self._check_width(hidden_states)
        rows = hidden_states.reshape(-1, self.in_features)
        at_once = max(1, CHUNK_BYTES // (4 * self.out_features))
        parts = [ops.largest(self._logits(some).float(), k) for some in rows.split(at_once)]
        shape = (*hidden_states.shape[:-1], k)
        values, tokens = (torch.cat(part).view(shape) for part in zip(*parts, strict=True))
        return values, tokens

    def to_linear(self) -> tuple[Tensor, Tensor]:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A mixture of {self.num_mixtures} softmaxes has no dense layer that computes the same."
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"{super().extra_repr()}, num_mixtures={self.num_mixtures}, "
            f"gate_activation={self.gate_activation}, gate_temperature={self.gate_temperature}"
        )


def output_layer(config: MixtureConfig) -> VQLogitsHead:
    """The head that a configuration describes."""
    return VQLogitsHead(config) if config.num_mixtures == 1 else VQLogitsMixtureHead(config)


@torch.no_grad()
def split(head: VQLogitsHead, config: MixtureConfig, seed: int = 0) -> VQLogitsMixtureHead:
    """A mixture that computes nearly what a head does, to be trained from there.

    Components share the head's codebook and codes, which become the mixture's own objects; only
    factors 1 + 0.01 x, x standard normal, tell them apart, so that training can.

    Args:
        head: a plain one.
        config: of the mixture; everything but the mixture is as the head's.
        seed: of x.

    Raises:
        ValueError: the head is a mixture already, or M is not at least 2.
    """
    if isinstance(head, VQLogitsMixtureHead) or config.num_mixtures < 2:
        raise ValueError(
            f"Only a plain head is split, into 2 components or more, but it has {head.num_mixtures}"
            f" and `num_mixtures` is {config.num_mixtures}."
        )
    with torch.device("meta"):
        mixture = VQLogitsMixtureHead(config)
    for name, parameter in head.named_parameters():
        setattr(mixture, name, parameter)
    for name, buffer in head.named_buffers():
        setattr(mixture, name, buffer)
    like = head.codebook
    drawn = mixture._initial_components(torch.Generator().manual_seed(seed))
    for name, value in drawn.items():
        setattr(mixture, name, nn.Parameter(value.to(like)))
    return mixture.train(head.training)
