"""Sign codes learnt while the whole model is trained: the learned mapping of the VQ-Logits paper.

A [`CodeLearner`] watches the head's training forwards. Every so many optimiser steps it moves codes
by majorise-minimise (`code_learning.py`) on the training loss (`loss_slope.py`), a few bits of a
token at most. Every eighth position is kept out of the sums; codes that raise the loss on the
latest of those are not taken, and the next move is half as long.

Codes are buffers: parameters stay the same objects, and with them the optimiser's state. All
processes of a distributed training take part in a step and end with the same codes. Bits of smaller
heads inside stay, for they belong to codebooks that the training leaves alone.
"""

import logging
from collections import deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.ops import unpack_signs

from .code_learning import move_codes
from .distillation import MOST_DAMPING
from .errors import ConversionError
from .loss_slope import LossSums

logger = logging.getLogger(__name__)

EVERY = 64  # optimiser steps
DAMPING = 2.0  # of the first move; figures in docs/fitting.md
KEPT_OUT = 8  # one position of so many
JUDGED = 4096  # positions at most, of all processes


class CodeMove(NamedTuple):
    """What one move did; losses in nats on positions that it was not made from.

    Attributes:
        step: optimiser steps made so far.
        positions: that it was made from, of all processes.
        flips: bits that would change.
        loss_before: with the codes as they were.
        loss_after: with the moved ones.
        damping: of this move.
    """

    step: int
    positions: int
    flips: int
    loss_before: float
    loss_after: float
    damping: float

    @property
    def taken(self) -> bool:
        """Whether the head has the moved codes."""
        return self.loss_after < self.loss_before


class CodeLearner:
    """Learns the sign codes of a model that is being trained, beside its optimiser.

    What it sums up takes the memory of two dense output layers in float32; a move takes, in the
    first process, some six more while it lasts. Works with one process, DDP and FSDP 2, gradient
    accumulation, checkpointed activations and mixed precision. Where the head holds smaller ones
    (`nested_codebooks`), only the bits that come after theirs are moved.

    Args:
        model: with a trainable [`VQLogitsHead`], wrapped or not; or that head.
        every: optimiser steps between two moves. They should see some 65,000 positions or more.
        damping: lambda of the first move; doubled after one that did not lower the loss.

    Attributes:
        damping: of the next move.
        history: all moves so far.

    Raises:
        ConversionError: there is no trainable head of sign codes, the codes are the input
            embedding's too, or something other than FSDP 2 spreads the codebook over processes. In
            the first forward: its loss is no cross-entropy.
        ValueError: `every` is below 1, or `damping` not positive or above `MOST_DAMPING`.

    Example:
        >>> learner = CodeLearner(model, every=64)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     learner.step()
        >>> learner.close()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *, every: int = EVERY, damping: float = DAMPING):
        if every < 1:
            raise ValueError(f"`every` is {every}; it must be at least one optimiser step.")
        if not 0 < damping <= MOST_DAMPING:
            raise ValueError(
                f"`damping` is {damping}; it must be positive and at most {MOST_DAMPING:g}, where "
                f"moves are given up, {DAMPING:g} for example."
            )
        self._head = trainable_head(model)
        whole(self._head)  # refuses what could not be read later
        self.damping = damping
        self.history: list[CodeMove] = []
        self._every, self._steps, self._forwards = every, 0, 0
        self._sums: LossSums | None = None
        self._kept: deque[tuple[Tensor, Tensor, float]] = deque()
        self._hook: Any = self._head.register_forward_pre_hook(self._watch, with_kwargs=True)

    def step(self) -> CodeMove | None:
        """Count an optimiser step, and move the codes if it is time; on all processes alike.

        Returns:
            What the move did, or None where none was tried.

        Raises:
            ConversionError: the head was not asked for a loss since the last move.
        """
        if self._hook is None:
            return None
        self._steps += 1
        if self._steps % self._every:
            return None
        move = self._move()
        self._start_window()
        if move is None:
            return None
        self.history.append(move)
        logger.info("Codes after %d steps: %s", move.step, move)
        if move.flips and not move.taken:
            self.damping *= 2
        if self.damping > MOST_DAMPING:
            logger.info("No move of the codes lowers the loss any more; they stay as they are.")
            self.close()
        return move

    def close(self) -> None:
        """Stop watching the head; what was learnt stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._start_window()

    def _start_window(self) -> None:
        self._sums, self._forwards = None, 0
        self._kept.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _watch(self, head: VQLogitsHead, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the head, which checks what it is given after this."""
        hidden, labels = _arguments(*args, **kwargs)
        if labels is None or not (head.training and torch.is_grad_enabled()) or _again(hidden):
            return
        loss = kwargs.get("output_loss", "cross_entropy")
        if loss != "cross_entropy":
            raise ConversionError(
                f"Codes are learnt by the curvature of cross-entropy, but `output_loss` is "
                f"{loss!r}; train without learning codes."
            )
        self._forwards += 1
        counted = (labels != kwargs.get("ignore_index", -100)) & (labels >= 0)
        counted &= labels < head.out_features
        if hidden.shape[:-1] != labels.shape or not bool(counted.any()):
            return
        with torch.no_grad():
            # The steps of a loss scaler that overflow are not made.
            counted &= torch.isfinite(hidden).all(-1)
            place = torch.arange(labels.shape[-1], device=labels.device)
            turn = self._steps % self._every  # of the window, to be the same after a resume
            out = counted & (place % KEPT_OUT == turn % KEPT_OUT)
            smoothing = float(kwargs.get("label_smoothing", 0.0))
            self._keep(hidden[out], labels[out], smoothing)
            if self._sums is None:
                self._sums = LossSums(head)
            summed = counted & ~out
            self._sums.add(head, hidden[summed], labels[summed], smoothing)

    def _keep(self, hidden: Tensor, labels: Tensor, smoothing: float) -> None:
        """Keep the latest positions to judge by."""
        self._kept.append((hidden, labels, smoothing))
        total = sum(len(labels) for _, labels, _ in self._kept)
        while total - len(self._kept[0][1]) >= max(1, JUDGED // _processes()):
            total -= len(self._kept.popleft()[1])

    @torch.no_grad()
    def _move(self) -> CodeMove | None:
        head, sums = self._head, self._sums
        now = whole(head)
        if sums is None:
            sums = LossSums(now)
        kept = sum(len(labels) for _, labels, _ in self._kept)
        counts = torch.tensor([self._forwards, kept], dtype=torch.float64, device=now.codes.device)
        if _processes() > 1:
            sums.reduce()
            dist.all_reduce(counts)
        forwards, judged = counts.tolist()
        if not forwards:
            raise ConversionError(
                f"In {self._every} steps the head was never asked for a loss, from which codes are "
                "learnt: pass `labels` to the model. A loss that is computed from the logits, as "
                "with Trainer's `label_smoothing_factor`, does not pass through the head."
            )
        if not (judged and sums.positions and sums.finite):
            logger.warning(
                "The codes stay after %d steps: %s.",
                self._steps,
                "no label counted" if sums.finite else "a loss was not finite",
            )
            return None
        moved = whole(head)
        if _rank() == 0:
            metric = sums.metric(moved)
            frozen = max(moved.nested_codebooks, default=0)
            move_codes(moved, metric, sums.slope(metric), self.damping, frozen)
        if _processes() > 1:
            # Not into the head's own tensors: edits by collectives are not counted, and layouts
            # derived from the codes would stay those of the old ones.
            for codes in _codes(moved).values():
                dist.broadcast(codes, 0)
        losses = torch.stack([self._loss(now), self._loss(moved)])
        if _processes() > 1:
            dist.all_reduce(losses)
            dist.broadcast(losses, 0)  # or rounding might decide for each process on its own
        before, after = (losses / judged).tolist()
        flips = sum(_flips(codes, _codes(now)[name]) for name, codes in _codes(moved).items())
        move = CodeMove(self._steps, sums.positions, flips, before, after, self.damping)
        if move.taken:
            for name, codes in _codes(head).items():
                codes.copy_(_codes(moved)[name])
        return move

    def _loss(self, head: VQLogitsHead) -> Tensor:
        """Summed loss of the positions that this process kept out."""
        total = torch.zeros((), dtype=torch.float64, device=head.codes.device)
        for hidden, labels, smoothing in self._kept:
            loss = head(hidden.float(), labels, reduction="sum", label_smoothing=smoothing)
            total += loss.double()
        return total


def trainable_head(model: nn.Module) -> VQLogitsHead:
    """The one head whose codes can be learnt.

    Raises:
        ConversionError: there is none; the message says why.
    """
    heads = [module for module in model.modules() if isinstance(module, VQLogitsHead)]
    if not heads:
        raise ConversionError(
            f"{type(model).__name__} has no `VQLogitsHead`, so there are no codes to learn; "
            "convert it with `convert_to_vq` first."
        )
    # PEFT keeps the original head, frozen, beside the one that it trains.
    trainable = [head for head in heads if head.codebook.requires_grad]
    if len(trainable) != 1:
        raise ConversionError(
            f"Codes are learnt for one trainable head, but {len(trainable)} of the "
            f"{len(heads)} of {type(model).__name__} have a `codebook` that requires gradients; "
            "unfreeze the head, or pass the one that is meant."
        )
    (head,) = trainable
    if head.code_type != "sign":
        raise ConversionError(
            f"Codes are learnt for sign codes only, and this head's `code_type` is "
            f"{head.code_type!r}; convert the model with the method 'signs', or leave its codes."
        )
    if head.num_mixtures > 1:
        raise ConversionError(
            f"Codes are learnt for one softmax, and this head is a mixture of {head.num_mixtures}; "
            "learn them before `split_head`, or leave them."
        )
    if any(isinstance(m, VQEmbedding) and m.codes is head.codes for m in model.modules()):
        raise ConversionError(
            "The head's codes are the input embedding's too (`embeddings` 'tied'), whose part in "
            "the loss the head does not see; leave the codes, or convert with `embeddings` 'keep' "
            "or 'vq'."
        )
    return head


@torch.no_grad()
def whole(head: VQLogitsHead) -> VQLogitsHead:
    """A copy of a head of sign codes in float32, whatever FSDP 2 has spread put together.

    Raises:
        ConversionError: something else has spread the codebook.
    """
    tensors = {name: _gathered(tensor) for name, tensor in head.named_parameters()}
    wanted = (head.num_codebooks, head.in_features)
    if tuple(tensors["codebook"].shape) != wanted:
        raise ConversionError(
            f"The codebook has the shape {tuple(tensors['codebook'].shape)} in this process, and "
            f"not {wanted}: it is spread by something other than FSDP 2, such as FSDP 1 or "
            "DeepSpeed's ZeRO 3. Train with FSDP 2 or DDP, or leave the codes."
        )
    tensors |= {name: tensor.clone() for name, tensor in head.named_buffers()}
    sizes: Any = SimpleNamespace(
        code_type=head.code_type,
        num_codebooks=head.num_codebooks,
        codebook_size=head.codebook_size,
        num_fine_tokens=head.num_fine_tokens,
        nested_codebooks=head.nested_codebooks,
        logit_scale=head.logit_scale,
        final_logit_softcapping=head.final_logit_softcapping,
        vocab_size=head.out_features,
        hidden_size=head.in_features,
    )
    with torch.device("meta"):
        copy = VQLogitsHead(sizes)
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)


def _gathered(tensor: Tensor) -> Tensor:
    if dist.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
    return tensor.detach().float()


def _again(hidden: Tensor) -> bool:
    """Whether a checkpointed head runs a second time and the first one was counted.

    A reentrant checkpoint runs first without gradients, then within the backward pass on detached
    hidden states; the other kind runs twice on the same ones.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and not (hidden.is_leaf and hidden.requires_grad)


def _arguments(
    hidden_states: Tensor, labels: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor | None]:
    return hidden_states, labels


def _codes(head: VQLogitsHead) -> dict[str, Tensor]:
    both = {"codes": head.codes, "fine_codes": head.fine_codes}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _flips(codes: Tensor, others: Tensor) -> int:
    bits = 8 * codes.shape[-1]
    return int((unpack_signs(codes ^ others, bits, dtype=torch.int8) > 0).sum())


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _processes() > 1 else 0
