"""Fine-tuning in this process, and the judging of what comes out, by the project's protocol.

One loop for every model, dense or quantised: AdamW without weight decay, a tenth of the steps as
warm-up, then half a cosine down to zero; gradients clipped at 1; products in bfloat16 where the
machine multiplies it fast. The same seed gives every model the same rows in the same order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from hf_vqlogits.coded import CodedLayer
from hf_vqlogits.conversion.comparison import HeadScore, compare_heads
from hf_vqlogits.conversion.streaming import hidden_states
from hf_vqlogits.mixture import VQLogitsMixtureHead
from hf_vqlogits.ops.precision import product_dtype

WARMUP = 0.1  # of the steps
MAX_GRADIENT_NORM = 1.0
WHAT = ("head", "all")

Notify = Callable[[int, float], None]


@dataclass(frozen=True)
class Schedule:
    """How much is trained, and in what portions.

    Attributes:
        steps: of the optimiser.
        tokens_per_step: of an optimiser step.
        batch_size: rows of a forward pass.
        context: tokens of a row.
        head_factor: the learning rate of codewords, biases and offsets of coded layers, over that
            of everything else. A dense model has no such parameters.
        mixture_factor: likewise of factors, shifts and gate of a mixture of softmaxes, on top.
    """

    steps: int
    tokens_per_step: int
    batch_size: int
    context: int
    head_factor: float = 1.0
    mixture_factor: float = 1.0

    def __post_init__(self) -> None:
        pass_tokens = self.batch_size * self.context
        if self.steps < 1 or self.tokens_per_step < 1 or self.tokens_per_step % pass_tokens:
            raise ValueError(
                f"`steps` must be at least 1 and `tokens_per_step` a multiple of a forward pass, "
                f"{self.batch_size} rows of {self.context} tokens; got {self.steps} and "
                f"{self.tokens_per_step}."
            )

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return self.tokens_per_step // (self.batch_size * self.context)


def training_rows(blocks: Tensor, context: int) -> Tensor:
    """Rows to train on.

    Args:
        blocks: token ids (rows, c + 1) of the protocol, whose last token begins the next row.
        context: tokens of a row, a divisor of c.

    Returns:
        (rows * c / context, context).

    Raises:
        ValueError: `context` does not divide c.
    """
    size = blocks.shape[1] - 1
    if size % context:
        raise ValueError(f"`context` must divide the protocol's {size} tokens, got {context}.")
    return blocks[:, :-1].reshape(-1, context)


def fine_tune(
    model: PreTrainedModel,
    rows: Tensor,
    schedule: Schedule,
    *,
    learning_rate: float,
    seed: int,
    what: str = "all",
    notify: Notify = lambda step, loss: None,
) -> list[float]:
    """Train a causal language model on the cross-entropy of the next token, in place.

    Args:
        model: dense or quantised; left in evaluation mode, with `requires_grad` as `what` says.
        rows: token ids (rows, context).
        schedule: steps and portions.
        learning_rate: after the warm-up.
        seed: of the order of the rows and of dropout.
        what: `"all"`, or `"head"`: the output layer alone, which in a dense tied model is the
            input embedding as well.
        notify: called after every step with the steps made and the step's loss.

    Returns:
        The loss of every step, nats a token.

    Raises:
        ValueError: `what` is something else.
    """
    if what not in WHAT:
        raise ValueError(f"`what` must be one of {', '.join(WHAT)}; got {what!r}.")
    model.requires_grad_(what == "all")
    model.get_output_embeddings().requires_grad_(True)
    groups = parameter_groups(model, learning_rate, schedule)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warm_up = math.ceil(WARMUP * schedule.steps)
    rates = get_cosine_schedule_with_warmup(optimiser, warm_up, schedule.steps)
    device = model.device
    dtype = product_dtype(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(seed)
    wanted = schedule.steps * schedule.passes * schedule.batch_size
    batches = iter(_order(len(rows), wanted, seed).split(schedule.batch_size))
    losses = []
    model.train()
    for step in range(schedule.steps):
        optimiser.zero_grad()
        loss = 0.0
        for _ in range(schedule.passes):
            ids = rows[next(batches)].to(device)
            with autocast:
                part = model(input_ids=ids, labels=ids, use_cache=False).loss / schedule.passes
            part.backward()
            loss += float(part.detach())
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimiser.step()
        rates.step()
        losses.append(loss)
        notify(step + 1, loss)
    model.eval()
    return losses


def parameter_groups(
    model: nn.Module, learning_rate: float, schedule: Schedule
) -> list[dict[str, Any]]:
    """Trainable parameters, each once and with its rate: of coded layers, mixtures, the others."""
    factors: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, CodedLayer):
            factors |= {id(parameter): schedule.head_factor for parameter in module.parameters()}
    for module in model.modules():
        if isinstance(module, VQLogitsMixtureHead):
            for parameter in module.component_parameters():
                factors[id(parameter)] = schedule.head_factor * schedule.mixture_factor
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": some, "lr": factor * learning_rate} for factor, some in groups.items()]


def _order(rows: int, wanted: int, seed: int) -> Tensor:
    """Indices of rows, in another order every time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-wanted // rows)
    order = [torch.randperm(rows, generator=generator) for _ in range(passes)]
    return torch.cat(order)[:wanted]


def first_tokens(blocks: Tensor, tokens: int) -> Tensor:
    """The first rows (rows, context + 1) of a text that hold so many tokens, at least one."""
    return blocks[: max(1, tokens // (blocks.shape[1] - 1))]


@torch.no_grad()
def judge(model: PreTrainedModel, texts: Mapping[str, Tensor]) -> dict[str, HeadScore]:
    """Score a model on texts of token ids (rows, context + 1), in evaluation mode and float32."""
    was_training = model.training
    model.eval()
    backbone: Any = model.base_model
    head = model.get_output_embeddings()
    scores = {
        text: compare_heads(hidden_states(backbone, blocks), head, {})["dense"]
        for text, blocks in texts.items()
    }
    model.train(was_training)
    return scores


def agreement(score: HeadScore, other: HeadScore) -> float:
    """Share of positions where two models' most likely tokens are the same."""
    return float((score.choices == other.choices).double().mean())


def compare(
    scores: Mapping[str, HeadScore], dense: Mapping[str, HeadScore]
) -> tuple[float, dict[str, dict[str, float]]]:
    """A model beside the dense one, text by text.

    Args:
        scores: text -> score of the model.
        dense: text -> score of the dense model.

    Returns:
        The factor, exp of the mean over the texts of log(perplexity / dense perplexity), and for
        every text both perplexities, their quotient, the share of greedy tokens that agree, and
        the tokens judged.
    """
    logs = [score.nats - dense[text].nats for text, score in scores.items()]
    told = {
        text: {
            "dense_perplexity": dense[text].perplexity,
            "perplexity": score.perplexity,
            "factor": score.perplexity / dense[text].perplexity,
            "greedy_agreement": agreement(score, dense[text]),
            "tokens": score.tokens,
        }
        for text, score in scores.items()
    }
    return math.exp(min(sum(logs) / len(logs), 700.0)), told
