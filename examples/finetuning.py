"""What the two fine-tuning examples share: options, text, what is trained, the output folder."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_vqlogits import VQLogitsConfig
from hf_vqlogits.conversion.checkpoint import check_output, check_room, whole_or_nothing
from hf_vqlogits.conversion.code_training import CodeMove, trainable_head
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.text import load_text, prefix_ids, split_lines, tokenize
from hf_vqlogits.integrations.peft import lora_config

DEFAULT_CONTEXT = 512
HELD_OUT = 0.2
WARMUP = 0.1
MAX_GRADIENT_NORM = 1.0
MOST_NATS = 700.0  # beyond, a perplexity is no float64
# Without being told, Accelerate takes several processes on a machine without GPU for as many
# trainings that know nothing of each other.
ON_CPU = not torch.accelerator.is_available()


@dataclass
class Task:
    """What is to be trained on what.

    Attributes:
        model: in float32, with its trainable parameters marked.
        tokenizer: its tokenizer.
        train: token ids (rows, context).
        evaluation: token ids (rows, context), disjoint from `train`.
        prefix: how many special tokens, such as `<bos>`, begin each row.
        dtype: type of the weights as the model was stored, and will be again.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    evaluation: Tensor
    prefix: int
    dtype: torch.dtype


def run(train: Callable[[argparse.Namespace], None], description: str, argv: Any = None) -> int:
    """Parse the command line and train; a mistake of the user's becomes one line and exit code 2.

    Args:
        train: the example's own part.
        description: for `--help`.
        argv: the command line's words; default those of the process.

    Returns:
        The exit code.
    """
    arguments = _parse(description, argv)
    try:
        train(arguments)
    except ConversionError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name; a dense model works as well")
    add("--train-data", required=True, help="text file, directory, .gz, or a `datasets` name")
    add("--eval-data", help="likewise; default: the last fifth of the training text's lines")
    add("--output", required=True, type=Path, help="folder for the fine-tuned model")
    add("--overwrite", action="store_true", help="replace a model in the output folder")
    add(
        "--train",
        choices=("head", "all", "lora"),
        default="all",
        help="the output layer alone, everything, or LoRA on the body together with the head",
    )
    add("--lora-rank", type=_at_least(1), default=16)
    add("--merge-adapter", action="store_true", help="with LoRA: write a whole model instead")
    add("--steps", type=_at_least(1), default=200, help="optimiser steps")
    add("--batch-size", type=_at_least(1), default=4, help="rows a process and forward pass")
    add("--gradient-accumulation-steps", type=_at_least(1), default=1)
    add("--learning-rate", type=_positive, default=1e-4, help="after warm-up; cosine decay to 0")
    add("--context", type=_at_least(2), help=f"tokens a row; default {DEFAULT_CONTEXT} at most")
    add(
        "--learn-codes",
        type=_at_least(0),
        default=0,
        metavar="EVERY",
        help="move the output layer's codes every so many steps, which should see some 65,000 "
        "tokens; default 0: they stay",
    )
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: full precision")
    add("--logging-steps", type=_at_least(1), default=10)
    add("--eval-steps", type=_at_least(1), help="evaluate every so many steps as well")
    add("--seed", type=_at_least(0), default=0)
    arguments = parser.parse_args(argv)
    if arguments.merge_adapter and arguments.train != "lora":
        parser.error("--merge-adapter needs --train lora: otherwise there is no adapter")
    if arguments.learn_codes > arguments.steps:
        parser.error(
            f"--learn-codes {arguments.learn_codes} is above --steps {arguments.steps}: the codes "
            "would never be moved"
        )
    if arguments.mixed_precision == "fp16" and ON_CPU:
        parser.error("--mixed-precision fp16 needs a GPU; on a CPU use bf16, or leave it out")
    return arguments


def _at_least(lowest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return integer


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def prepare(arguments: argparse.Namespace, *, processes: int) -> Task:
    """Check everything, then load model and text.

    Args:
        arguments: the command line.
        processes: number of processes that train together.

    Raises:
        ConversionError: something that the user gave cannot work.
    """
    _check_output(arguments)
    set_seed(arguments.seed)
    model, tokenizer, dtype = _load(arguments.model)
    check_room(arguments.output, model.get_memory_footprint())
    text = load_text(arguments.train_data)
    if arguments.eval_data is None:
        text, evaluation_text = split_lines(text, 1 - HELD_OUT)
    else:
        evaluation_text = load_text(arguments.eval_data)
    context = _context(arguments.context, model)
    rows = rows_a_step(arguments, processes=processes)
    prefix = prefix_ids(tokenizer)
    train_ids, evaluation_ids = (tokenize(t, tokenizer) for t in (text, evaluation_text))
    train = _rows(train_ids, prefix, context, rows, "an optimiser step on the training text")
    evaluation = _rows(evaluation_ids, prefix, context, 1, "evaluation")
    highest = int(max(train.max(), evaluation.max()))
    if highest >= model.config.get_text_config().vocab_size:
        raise ConversionError(
            f"The tokenizer gives token {highest}, but {arguments.model!r} has a vocabulary of "
            f"{model.config.get_text_config().vocab_size}: they do not belong together."
        )
    model = select_trainable(model, arguments.train, lora_rank=arguments.lora_rank)
    if arguments.learn_codes:
        trainable_head(model)  # refuses what would be refused after the first evaluation
    return Task(model, tokenizer, train, evaluation, len(prefix), dtype)


def _holds_model(folder: Path) -> bool:
    """Unlike a conversion, fine-tuning may replace any earlier model or adapter."""
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def rows_a_step(arguments: argparse.Namespace, *, processes: int) -> int:
    """Rows of an optimiser step, over all processes."""
    rows: int = arguments.batch_size * arguments.gradient_accumulation_steps
    return rows * processes


def _check_output(arguments: argparse.Namespace) -> None:
    check_output(
        arguments.output,
        overwrite=arguments.overwrite,
        source_name=arguments.model,
        replaceable=_holds_model,
    )


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    if (Path(name) / "adapter_config.json").exists():
        raise ConversionError(
            f"{name!r} is a PEFT adapter, not a whole model; write it with `--merge-adapter` to "
            "train it further."
        )
    try:
        stored = AutoConfig.from_pretrained(name).dtype or torch.float32
        # Steps of an optimiser are lost in the rounding of 16-bit weights.
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        where = "" if Path(name).exists() else "there is no such folder, and as a hub name: "
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"The model {name!r} cannot be loaded: {where}{reason}") from error
    return model, tokenizer, stored


def _context(wanted: int | None, model: PreTrainedModel) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit is not None and wanted > limit:
        raise ConversionError(f"`--context` {wanted} is above the {limit} positions of the model.")
    return wanted


def _rows(ids: Tensor, prefix: list[int], context: int, least: int, purpose: str) -> Tensor:
    size = context - len(prefix)
    if size < 1:
        raise ConversionError(
            f"`--context` {context} has no room for text after the {len(prefix)} special tokens "
            "that the tokenizer puts before every text."
        )
    needed = least * size
    if len(ids) < needed:
        raise ConversionError(
            f"The text has {len(ids):,} tokens, but {purpose} needs {needed:,} ({least} rows of "
            f"{size}); give more text, or a smaller `--context` or `--batch-size`."
        )
    rows = ids[: len(ids) // size * size].view(-1, size)
    return torch.cat([torch.tensor(prefix, dtype=ids.dtype).expand(len(rows), -1), rows], 1)


def select_trainable(
    model: PreTrainedModel, what: str, *, lora_rank: int
) -> PreTrainedModel | PeftModel:
    """Mark what is to be trained.

    Args:
        model: quantised or dense.
        what: `"head"` (codebook and biases; the output layer of a dense model, with the input
            embedding where they are tied), `"all"`, or `"lora"`.
        lora_rank: rank of the adapters.

    Returns:
        The model; for LoRA with adapters around it.
    """
    if what == "lora":
        return get_peft_model(model, lora_config(model, r=lora_rank, lora_alpha=2 * lora_rank))
    if what == "head":
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
    return model


def describe(move: CodeMove, steps: int) -> str:
    """One line on a move of the codes.

    Args:
        move: what it did.
        steps: of the training.
    """
    outcome = f"{move.flips} bits of the codes" if move.taken else "no codes"
    return (
        f"step {move.step} of {steps}: moved {outcome}, loss on tokens kept out "
        f"{move.loss_before:.4f} -> {move.loss_after:.4f}"
    )


def describe_loss(loss: float, task: Task) -> str:
    """The perplexity that a mean cross-entropy stands for; a loss of margins as it is.

    Args:
        loss: mean over tokens kept out.
        task: what is trained.
    """
    if getattr(task.model.config, "output_loss", "cross_entropy") != "cross_entropy":
        return f"loss {loss:.4f}"
    return f"perplexity {math.exp(loss) if loss < MOST_NATS else math.inf:.4f}"


def collator(task: Task) -> Callable[[list[Tensor]], dict[str, Any]]:
    """What makes a batch of rows for this task's model.

    A quantised model is told to give the loss alone; in evaluation it would otherwise compute
    N x V logits as well.
    """
    extra = {"skip_logits": True} if isinstance(task.model.config, VQLogitsConfig) else {}

    def collate(rows: list[Tensor]) -> dict[str, Any]:
        ids = torch.stack(rows)
        labels = ids.clone()
        # Nothing predicts a row's first token, but Trainer counts it in the mean for classes whose
        # name does not end in ForCausalLM, GPT2LMHeadModel for one.
        labels[:, : max(1, task.prefix)] = -100
        return {"input_ids": ids, "labels": labels, **extra}

    return collate


def save(
    task: Task, model: torch.nn.Module, arguments: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Write the output folder, whole or not at all; to be called on all processes.

    Args:
        task: what was trained.
        model: as the accelerator wrapped it.
        arguments: the command line.
        accelerator: of this process.
    """
    unwrapped = accelerator.unwrap_model(model)
    if arguments.merge_adapter:
        model = unwrapped = unwrapped.merge_and_unload()
    if arguments.merge_adapter or arguments.train != "lora":
        unwrapped.to(task.dtype)  # PEFT keeps adapters in float32 by itself
    state = accelerator.get_state_dict(model)  # collects what FSDP has spread
    if accelerator.is_main_process:
        _check_output(arguments)  # again: something may have appeared there meanwhile
        with whole_or_nothing(arguments.output) as folder:
            unwrapped.save_pretrained(folder, state_dict=state)
            task.tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()
