"""End-to-end distillation: KL of the converted model to the original, through the body.

    tokens -> quantised input embedding -> body -> quantised head      the student, trained
    tokens -> dense input embedding     -> body -> dense layer         the teacher

The distillation of the head reads hidden states of the dense input embedding only. Here codewords
and biases of both sides learn what the input side does to these states, and to make up for it; in
a tied model the shared codewords take both gradients. Codes stay. The body is frozen, or trained as
well.

A step costs a pass through the body forwards and one backwards. The loss is taken in chunks of
rows, whose gradients in the hidden states are gathered first: there are never N x V logits, and one
backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vqlogits import VQLogitsHead
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.ops.precision import product_dtype

from .code_learning import CHUNK_BYTES, Logits
from .distillation_state import BODY, END_TO_END, fingerprint
from .held_out import rows_of_step, split
from .streaming import KeptStates, frozen
from .training import (
    Advance,
    Distillation,
    Notify,
    Training,
    divergence,
    relative_rates,
    spread,
)

# Of the root mean square of the body's matrices. SmolLM2-135M at 99%, KL on two texts: 0.0005 took
# it from 0.167 and 0.214 to 0.157 and 0.192 in 90 steps, 0.002 to 0.201 and 0.222 in 60.
BODY_RATE = 0.0005
WARM_UP = 0.1  # of the steps


def distill_end_to_end(
    backbone: PreTrainedModel,
    embedding: VQEmbedding,
    head: VQLogitsHead,
    states: KeptStates,
    *,
    teacher: Logits,
    judge: Logits | None = None,
    steps: int,
    seed: int = 0,
    learning_rate: float | None = None,
    state_file: Path | None = None,
    notify: Notify = lambda made, kl: None,
    advance: Advance = lambda made: None,
) -> Distillation:
    """Train codewords and biases of input embedding and head towards the original model.

    Args:
        backbone: of the original, with its dense input embedding; nothing of it is changed.
        embedding: the quantised input embedding, trained in place; what it shares with the head
            stays shared.
        head: trained in place.
        states: the original's hidden states of the calibration text.
        teacher: the original logits (n, V) of hidden states (n, d).
        judge: the same, exactly, where `teacher` rounds; the positions kept out are judged by it.
        steps: of about a thousand positions each.
        seed: of the order of the text and of what is kept out.
        learning_rate: of Adam, in units of each tensor's root mean square; falls to zero along half
            a cosine. Default: by the divergence of the start and the number of codebooks.
        state_file: where the run is kept after every check, and found after an interrupt; whoever
            has no further use for it removes it.
        notify: called with the steps made and the KL on the positions kept out, when it was judged.
        advance: called with the steps made, more often.

    Returns:
        The KL divergence before and after, and how it went.

    Raises:
        ConversionError: the text is too short to hold some of it out, or `state_file` is of
            another run.
    """
    sides = nn.ModuleList([embedding, head])
    run = _Run(_Student(backbone, embedding), head, states, teacher, judge or teacher, advance)
    training = run.training(sides, steps, seed, notify, "input_distill_steps")
    tensors = [*sides.state_dict().values(), states.blocks]
    key = fingerprint(tensors, (steps, seed, learning_rate))
    with frozen(backbone):
        training.begin(state_file, END_TO_END, key)
        if learning_rate is None:
            learning_rate = training.rate(max(head.num_codebooks, embedding.num_codebooks))
        rates = relative_rates(sides.parameters(), learning_rate)
        training.descend(rates, range(steps), run.backward)
    return training.finish()


def distill_body(
    body: PreTrainedModel,
    head: VQLogitsHead,
    states: KeptStates,
    *,
    teacher: Logits,
    judge: Logits | None = None,
    steps: int,
    seed: int = 0,
    learning_rate: float = BODY_RATE,
    state_file: Path | None = None,
    notify: Notify = lambda made, kl: None,
    advance: Advance = lambda made: None,
) -> Distillation:
    """Train the whole model towards the original: body, head, and a quantised input embedding.

    A body can turn its hidden states towards what the codewords span and away from where they err,
    which no head can. Codes stay, and so does a dense input embedding.

    Args:
        body: a copy of the original's in float32, with the input embedding of the converted model;
            trained in place.
        head: trained in place.
        states: the original's hidden states of the calibration text.
        teacher: the original logits (n, V) of hidden states (n, d).
        judge: the same, exactly, where `teacher` rounds; the positions kept out are judged by it.
        steps: of about a thousand positions each.
        seed: of the order of the text and of what is kept out.
        learning_rate: of the body, in units of its matrices' root mean square; that of codewords
            is by the divergence of the start, as without the body. Both rise in the first tenth of
            the steps and fall to zero along half a cosine.
        state_file: where the run is kept after every check, and found after an interrupt; whoever
            has no further use for it removes it.
        notify: called with the steps made and the KL on the positions kept out, when it was judged.
        advance: called with the steps made, more often.

    Returns:
        The KL divergence before and after, and how it went.

    Raises:
        ConversionError: the text is too short to hold some of it out, or `state_file` is of
            another run.
    """
    whole = nn.ModuleList([body, head])
    run = _Run(_Student(body), head, states, teacher, judge or teacher, advance)
    training = run.training(whole, steps, seed, notify, "body_distill_steps")
    key = fingerprint([*whole.state_dict().values(), states.blocks], (steps, seed, learning_rate))
    training.begin(state_file, BODY, key)
    embedding = body.get_input_embeddings()
    coded = [head, *([embedding] if isinstance(embedding, VQEmbedding) else [])]
    rate = training.rate(max(layer.num_codebooks for layer in coded))
    rates = relative_rates((p for layer in coded for p in layer.parameters()), rate)
    kept = set(embedding.parameters())
    others = [p for p in body.parameters() if p not in rates and p not in kept]
    # One rate for all: norms, whose weights are larger, would move too far by their own size.
    matrices = torch.tensor([spread(p) for p in others if p.dim() > 1])
    rates |= dict.fromkeys(others, learning_rate * float(matrices.square().mean().sqrt()))
    body.requires_grad_(True)
    for parameter in kept - set(rates):
        parameter.requires_grad_(False)
    training.descend(rates, range(steps), run.backward, warm_up=WARM_UP)
    body.requires_grad_(True)
    return training.finish()


class _Run:
    """What both trainings do with a batch of text, and what they judge by.

    Args:
        student: hidden states (n, d) of token ids (rows, context).
        head: behind the student.
        states: the original's.
        teacher: the original logits (n, V) of hidden states (n, d).
        judge: the same, for the positions kept out.
        advance: called with the steps made.
    """

    def __init__(
        self,
        student: "_Student",
        head: VQLogitsHead,
        states: KeptStates,
        teacher: Logits,
        judge: Logits,
        advance: Advance,
    ):
        self._student, self._head, self._states = student, head, states
        self._teacher, self._judge, self._advance = teacher, judge, advance
        self._rows = rows_of_step(states.blocks)

    def training(
        self, module: nn.Module, steps: int, seed: int, notify: Notify, option: str
    ) -> Training:
        """The training of a module, judged on text that is kept out of it."""
        self._held, self._order = split(
            self._states.blocks, steps, seed, option, versions=self._states.versions
        )
        return Training(module, self._measure, notify)

    def backward(self, step: int) -> None:
        """Add a step's gradient."""
        hidden, wanted = self._of_rows(self._order[step * self._rows : (step + 1) * self._rows])
        hidden.backward(gradient_of_divergence(self._head, self._teacher, hidden, wanted))
        self._advance(step + 1)

    @torch.no_grad()
    def _measure(self) -> float:
        total, positions = 0.0, 0
        for some in self._held.split(self._rows):
            hidden, wanted = self._of_rows(some)
            size = _chunk(self._head)
            for h, w in zip(hidden.split(size), wanted.split(size), strict=True):
                total += float(divergence(self._judge(w), self._head(h)))
            positions += len(hidden)
        return total / positions

    def _of_rows(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (n, d) of the student and of the original."""
        return self._student(self._states.blocks[some, :-1]), torch.cat([*self._states(some)])


def gradient_of_divergence(
    head: VQLogitsHead, teacher: Logits, hidden: Tensor, wanted: Tensor
) -> Tensor:
    """Gradient of the mean KL divergence in the student's hidden states; that in the head is added.

    Args:
        head: whose parameters' gradients are added to.
        teacher: the original logits (n, V) of hidden states (n, d).
        hidden: hidden states (N, d) of the student; their graph is left alone.
        wanted: hidden states (N, d) of the original.

    Returns:
        (N, d).
    """
    rows, size = hidden.detach().requires_grad_(), _chunk(head)
    for h, w in zip(rows.split(size), wanted.split(size), strict=True):
        (divergence(teacher(w), head(h)) / len(rows)).backward()
    assert rows.grad is not None
    return rows.grad


class _Student:
    """Hidden states of a backbone that may read tokens by another embedding than its own."""

    def __init__(self, backbone: PreTrainedModel, embedding: VQEmbedding | None = None):
        self._backbone, self._embedding = backbone, embedding
        self._dtype = product_dtype(backbone.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """Hidden states (n, d) float32 of token ids (rows, context)."""
        device = self._backbone.device
        fast = nullcontext() if self._dtype is torch.float32 else self._autocast(device)
        with self._reading(), fast:
            hidden = self._backbone(ids.to(device), use_cache=False).last_hidden_state
        return hidden.float().flatten(0, 1)

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, dtype=self._dtype)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        embedding = self._embedding
        if embedding is None:
            yield
            return

        def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return embedding(*inputs).to(output.dtype)

        hook = self._backbone.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()


def _chunk(head: VQLogitsHead) -> int:
    """Rows whose logits are held at a time."""
    return max(1, CHUNK_BYTES // (4 * head.out_features))
