"""From the parts of a model and a corpus to heads: calibrate, fit, distil."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_vqlogits import VQLogitsHead

from .calibration import CalibrationStatistics, StatisticsAccumulator
from .codebooks import fit_index
from .corpus import Corpus
from .distillation import distill
from .families import SourceParts, head_config
from .signs import SignFitter
from .sizes import HeadSize
from .streaming import hidden_states

LADDER = (0.995, 0.99, 0.98, 0.96)


@dataclass
class Quantiser:
    """Makes heads for one model, timing each step.

    Attributes:
        parts: the model, taken apart.
        corpus: its text.
        seed: of everything random.
        show_progress: show bars.
        seconds: time of each step so far.
        details: what the steps told of themselves.
    """

    parts: SourceParts
    corpus: Corpus
    seed: int
    show_progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def progress(self, what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """A wrapper that shows a bar of this name."""
        return lambda items: tqdm(items, desc=what, disable=not self.show_progress, leave=False)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def calibrate(self) -> CalibrationStatistics:
        """Statistics of the hidden states of the calibration text."""
        parts = self.parts
        accumulator = StatisticsAccumulator(
            parts.weight,
            bias=parts.bias,
            logit_scale=parts.transform.scale,
            final_logit_softcapping=parts.transform.softcap,
        )
        blocks = self.corpus.calibration
        for hidden, _ in hidden_states(
            parts.backbone, blocks, progress=self.progress("calibrating")
        ):
            accumulator.update(hidden)
        return accumulator.finish()

    def sign_heads(
        self, sizes: list[HeadSize], statistics: CalibrationStatistics
    ) -> dict[HeadSize, VQLogitsHead]:
        """Sign-coded heads of several sizes, each refined on its own from one greedy prefix."""
        fitter = SignFitter(
            self.parts.weight,
            statistics,
            bias=self.parts.bias,
            seed=self.seed,
            progress=self.progress,
        )
        fitter.greedy(max(size.num_codebooks for size in sizes))
        heads = {}
        for size in sizes:
            fit = fitter.fit(size.num_codebooks, size.num_fine_tokens)
            self.details[f"signs {size.num_codebooks}"] = fit.details
            heads[size] = self._head(size, statistics, fit)
        return heads

    def index_head(
        self, size: HeadSize, method: str, statistics: CalibrationStatistics
    ) -> VQLogitsHead:
        """An index-coded head."""
        fit = fit_index(
            self.parts.weight,
            method=method,
            num_codebooks=size.num_codebooks,
            codebook_size=size.codebook_size,
            bias=self.parts.bias,
            statistics=statistics,
            seed=self.seed,
            progress=self.progress,
        )
        self.details[method] = fit.details
        return self._head(size, statistics, fit)

    def distill(self, head: VQLogitsHead, steps: int) -> None:
        """Train the head's codebook towards the dense layer."""
        parts = self.parts
        done = distill(
            head,
            parts.backbone,
            teacher=lambda h: parts.logits(h.to(parts.weight.dtype)),
            blocks=self.corpus.calibration,
            steps=steps,
            seed=self.seed,
            progress=self.progress("distilling"),
        )
        self.details["distillation"] = vars(done)

    def config(self, size: HeadSize) -> Any:
        """Configuration of a model with a head of this size."""
        return head_config(
            self.parts,
            code_type=size.code_type,
            num_codebooks=size.num_codebooks,
            codebook_size=size.codebook_size,
            num_fine_tokens=size.num_fine_tokens,
        )

    def _head(self, size: HeadSize, statistics: CalibrationStatistics, fit: Any) -> VQLogitsHead:
        with torch.device("meta"):  # no random tensors that are replaced at once
            head = VQLogitsHead(self.config(size))
        device = self.parts.weight.device

        def put(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).contiguous()

        head.codebook = nn.Parameter(put(fit.codebook.float() / head.score_scale))
        head.codebook_bias = nn.Parameter(put(fit.codebook_bias.float() / head.score_scale))
        head.codes = put(fit.codes)
        if size.num_fine_tokens:
            head.fine_ids, head.fine_codes = put(fit.fine_ids), put(fit.fine_codes)
        head.hidden_mean = put(statistics.mean.float())
        head.fold_direction = put(statistics.fold_direction().float())
        head.check_codes()
        return head
