"""From the parts of a model and a corpus to heads: calibrate, fit, distil."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.ops.precision import product_dtype

from .calibration import CalibrationStatistics, StatisticsAccumulator
from .code_learning import Logits
from .codebooks import fit_index
from .corpus import Corpus
from .distillation import distill
from .embeddings import (
    beside_the_logits,
    fit_embedding,
    input_information,
    tie_embedding,
    token_weights,
)
from .end_to_end import distill_body, distill_end_to_end
from .families import SourceParts, head_config
from .held_out import rows_to_fit
from .metric import TokenMetric, token_metric
from .redrawing import draw_tokens, redraw
from .refining import FittedRefinement, fit_refinement
from .signs import SignFit, SignFitter
from .sizes import HeadSize
from .streaming import KeptStates, hidden_states
from .training import Advance, Notify

LADDER = (0.995, 0.99, 0.98, 0.96)
REREADINGS = 1


@dataclass
class Quantiser:
    """Makes heads for one model, timing each step.

    Attributes:
        parts: the model, taken apart.
        corpus: its text.
        seed: of everything random.
        show_progress: show bars.
        rereadings: how often the calibration text is read again, redrawn (`redrawing.py`).
        seconds: time of each step so far.
        details: what the steps told of themselves.
        states: of the text that the calibration read.
        besides: what errors of sign codes count for besides the logits; see [`token_metric`].
    """

    parts: SourceParts
    corpus: Corpus
    seed: int
    show_progress: bool = False
    rereadings: int = REREADINGS
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    states: KeptStates | None = None
    besides: Tensor | None = None

    def progress(self, what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        """A wrapper that shows a bar of this name."""
        return lambda items: tqdm(items, desc=what, disable=not self.show_progress, leave=False)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def calibrate(self, *, to_distill: bool = False) -> CalibrationStatistics:
        """Statistics of the hidden states of the calibration text.

        Args:
            to_distill: a distillation follows. The hidden states are kept for it, where they fit
                (see `KeptStates`), and the text that it is judged by enters no statistics: else
                the fit would know that text, and training look worse than it is.
        """
        parts = self.parts
        accumulator = StatisticsAccumulator(
            parts.weight,
            bias=parts.bias,
            logit_scale=parts.transform.scale,
            final_logit_softcapping=parts.transform.softcap,
        )
        text, progress = self.corpus.calibration, self.progress("calibrating")
        states = KeptStates(
            parts.backbone,
            text.repeat(1 + self.rereadings, 1),
            versions=1 + self.rereadings,
            keep=to_distill,
        )
        fitted = rows_to_fit(text, self.seed) if to_distill else torch.arange(len(text))
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[Tensor] = []

        def draw(probabilities: Tensor) -> None:
            drawn.append(draw_tokens(probabilities, generator).cpu())

        for version in range(states.versions):
            rows = fitted + version * len(text)
            if version:
                again = torch.cat(drawn).view(len(fitted), -1)
                states.blocks[rows] = redraw(text[fitted], again, generator)
                drawn.clear()
            for hidden in states(rows, progress=progress):
                accumulator.update(hidden, draw if version < self.rereadings else None)
        self.states = states
        return accumulator.finish()

    def input_metric(self) -> Tensor:
        """(d, d), for `besides`, where heads shall serve as input embeddings as well."""
        return beside_the_logits(self._input_information())

    def sign_heads(
        self, sizes: list[HeadSize], statistics: CalibrationStatistics
    ) -> dict[HeadSize, VQLogitsHead]:
        """Sign-coded heads of several sizes, each refined on its own from one greedy prefix."""
        fitter = self.sign_fitter(statistics)
        fitter.greedy(max(size.num_codebooks for size in sizes))
        return {size: self.sign_head(size, statistics, fitter) for size in sizes}

    def sign_fitter(self, statistics: CalibrationStatistics) -> SignFitter:
        """What fits sign codes of the model, for [`sign_head`]."""
        return SignFitter(self._metric(statistics), seed=self.seed, progress=self.progress)

    def sign_head(
        self,
        size: HeadSize,
        statistics: CalibrationStatistics,
        fitter: SignFitter,
        *,
        inside: SignFit | None = None,
    ) -> VQLogitsHead:
        """A sign-coded head, refined from the greedy prefix of the fitter, or around a smaller fit.

        Args:
            size: of the head.
            statistics: of the calibration text.
            fitter: of [`sign_fitter`].
            inside: a smaller fit, whose bits are the first ones of the head's.
        """
        fit = fitter.fit(size.num_codebooks, size.num_fine_tokens, inside=inside)
        self.details[f"signs {size.num_codebooks}"] = fit.details
        return self.head_of(size, statistics, fit)

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
        return self.head_of(size, statistics, fit)

    def distill(
        self,
        head: VQLogitsHead,
        steps: int,
        statistics: CalibrationStatistics,
        *,
        learn_codes: bool = True,
        frozen_bits: int = 0,
        state_file: Path | None = None,
        name: str = "distillation",
    ) -> None:
        """Train the head's codes and codebook towards the dense layer.

        Args:
            head: in place.
            steps: of about a thousand positions each.
            statistics: of the calibration text.
            learn_codes: codes as well; without, they stay and the codebook has all steps.
            frozen_bits: bits of each code, the first ones, that stay.
            state_file: where an interrupted run is kept.
            name: in `details`.
        """
        parts = self.parts
        metric = self._metric(statistics) if learn_codes else None
        with self._bar("distilling", steps) as (notify, advance):
            done = distill(
                head,
                self._states(),
                teacher=_teacher(parts),
                judge=_teacher(parts, torch.float32),
                steps=steps,
                metric=metric,
                frozen_bits=frozen_bits,
                seed=self.seed,
                state_file=state_file,
                notify=notify,
                advance=advance,
            )
        self.details[name] = vars(done)

    def distill_end_to_end(
        self,
        head: VQLogitsHead,
        embedding: VQEmbedding,
        steps: int,
        *,
        state_file: Path | None = None,
    ) -> None:
        """Train the codebooks of both sides towards the original model, through the body.

        Args:
            head: in place.
            embedding: the quantised input embedding, in place.
            steps: of about a thousand positions each.
            state_file: where an interrupted run is kept.
        """
        with self._bar("distilling end to end", steps) as (notify, advance):
            done = distill_end_to_end(
                self.parts.backbone,
                embedding,
                head,
                self._states(),
                teacher=_teacher(self.parts),
                judge=_teacher(self.parts, torch.float32),
                steps=steps,
                seed=self.seed,
                state_file=state_file,
                notify=notify,
                advance=advance,
            )
        self.details["end to end"] = vars(done)

    def trained_body(
        self,
        head: VQLogitsHead,
        embedding: VQEmbedding | None,
        steps: int,
        *,
        state_file: Path | None = None,
    ) -> PreTrainedModel:
        """A copy of the body that was trained towards the original, with head and embedding.

        Args:
            head: trained in place.
            embedding: the quantised input embedding, likewise; None where the dense one stays.
            steps: of about a thousand positions each.
            state_file: where an interrupted run is kept.

        Returns:
            The copy, each tensor in the original's type, with the input embedding of the converted
        model.
        """
        original = self.parts.backbone
        body = copy.deepcopy(original).float()
        if embedding is not None:
            body.set_input_embeddings(embedding)
        with self._bar("distilling the whole model", steps) as (notify, advance):
            done = distill_body(
                body,
                head,
                self._states(),
                teacher=_teacher(self.parts),
                judge=_teacher(self.parts, torch.float32),
                steps=steps,
                seed=self.seed,
                state_file=state_file,
                notify=notify,
                advance=advance,
            )
        self.details["body"] = vars(done)
        # One by one: rotations and the like stay in float32 where all else is in half precision.
        types = {name: tensor.dtype for name, tensor in _tensors(original)}
        for name, tensor in _tensors(body):
            tensor.data = tensor.data.to(types.get(name, tensor.dtype))
        return body

    def refine(
        self,
        head: VQLogitsHead,
        size: HeadSize,
        statistics: CalibrationStatistics,
        *,
        top_k: int,
        agreement: float,
        with_embedding: bool,
    ) -> FittedRefinement:
        """What scores the head's best tokens again by rows of the dense layer.

        Its rule is fitted to `kept_out` of the corpus; without that all candidates are scored.

        Args:
            head: the finished output layer.
            size: of it.
            statistics: of the calibration text.
            top_k: T, tokens of a position at most.
            agreement: share of the positions where the dense layer's choice is to be among those
                scored.
            with_embedding: the rows are the input embedding's.
        """
        kept_out = self.corpus.kept_out
        batches: Iterable[Tensor] = ()
        if kept_out is not None:
            states = hidden_states(self.parts.backbone, kept_out, fast=True)
            batches = (hidden for hidden, _ in states)
        config = self.config(size, refine_top_k=top_k, refine_with_embedding=with_embedding)
        metric = self._metric(statistics)
        return fit_refinement(self.parts, config, head, metric, statistics, batches, agreement)

    def _metric(self, statistics: CalibrationStatistics) -> TokenMetric:
        parts = self.parts
        return token_metric(parts.weight, statistics, bias=parts.bias, besides=self.besides)

    def _states(self) -> KeptStates:
        return self.states or KeptStates(self.parts.backbone, self.corpus.calibration)

    @contextmanager
    def _bar(self, what: str, steps: int) -> Iterator[tuple[Notify, Advance]]:
        """A bar of steps with the divergence as it was last judged."""
        with tqdm(total=steps, desc=what, disable=not self.show_progress, leave=False) as bar:

            def advance(made: int) -> None:
                bar.update(made - bar.n)

            def notify(made: int, kl: float) -> None:
                bar.set_postfix_str(f"KL on text kept out {kl:.4f}", refresh=False)
                advance(made)

            yield notify, advance

    def embedding(self, mode: str, head: VQLogitsHead, bits: int) -> VQEmbedding:
        """The quantised input embedding.

        Args:
            mode: `"vq"` or `"tied"`.
            head: the finished output layer.
            bits: R of the input embedding.
        """
        dense: Any = self.parts.backbone.get_input_embeddings()
        weights = token_weights(self.corpus.calibration, dense.num_embeddings)
        if mode == "tied":
            return tie_embedding(dense, weights, head)
        embedding, self.details[f"embedding {bits}"] = fit_embedding(
            dense,
            weights,
            self._input_information(),
            num_codebooks=bits,
            seed=self.seed,
            progress=self.progress,
        )
        return embedding

    def _input_information(self) -> Tensor:
        return input_information(
            self.parts,
            self.corpus.calibration,
            seed=self.seed,
            progress=self.progress("reading backwards"),
        )

    def config(self, size: HeadSize, **fields: Any) -> VQLogitsConfig:
        """Configuration of a model with a head of this size; `fields` are further ones."""
        return head_config(
            self.parts,
            code_type=size.code_type,
            num_codebooks=size.num_codebooks,
            codebook_size=size.codebook_size,
            num_fine_tokens=size.num_fine_tokens,
            nested_codebooks=size.nested_codebooks,
            **fields,
        )

    def head_of(self, size: HeadSize, statistics: CalibrationStatistics, fit: Any) -> VQLogitsHead:
        """The head of a fit; it has to be given the smaller ones that its size holds."""
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


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those too that no checkpoint holds."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _teacher(parts: SourceParts, dtype: torch.dtype | None = None) -> Logits:
    """The dense layer, its product in a type, by default that which the device multiplies fastest.

    In bfloat16 the logits are rounded to it, which is 0.0003 nats of divergence from the exact ones
    on SmolLM2: little in a gradient, but much beside what a good head lacks.
    """
    dtype = dtype or product_dtype(parts.weight.device)
    weight = parts.weight.detach().to(dtype)
    bias = None if parts.bias is None else parts.bias.detach().float()

    def logits(hidden: Tensor) -> Tensor:
        z = (hidden.to(dtype) @ weight.T).float()
        return parts.transform(z if bias is None else z + bias)

    return logits
