"""Fine-tune a quantised (or dense) causal language model with a plain loop on 1..N processes.

accelerate launch examples/finetune_accelerate.py --model gpt2-vq --train-data text.txt \
    --output gpt2-vq-tuned --train all --steps 200

Several processes on a machine without GPU: `torchrun --nproc-per-node 2` in the place of
`accelerate launch`, whose `--cpu` starts one process whatever `--num_processes` says.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from finetuning import (
    MAX_GRADIENT_NORM,
    ON_CPU,
    WARMUP,
    collator,
    describe,
    describe_loss,
    prepare,
    rows_a_step,
    run,
    save,
)
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from hf_vqlogits.conversion.code_training import CodeLearner


def train(arguments: argparse.Namespace) -> None:
    """Train, and print loss and perplexity."""
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        cpu=ON_CPU,
    )
    task = prepare(arguments, processes=accelerator.num_processes)
    train_loader = DataLoader(
        task.train,
        batch_size=arguments.batch_size,
        sampler=_order(task.train, arguments, accelerator),
        collate_fn=collator(task),
    )
    eval_loader = DataLoader(task.evaluation, collate_fn=collator(task))
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    model, optimiser, train_loader, eval_loader = accelerator.prepare(
        task.model, optimiser, train_loader, eval_loader
    )
    schedule = get_cosine_schedule_with_warmup(
        optimiser, int(WARMUP * arguments.steps), arguments.steps
    )

    before = mean_loss(model, eval_loader, accelerator)
    accelerator.print(f"before: {describe_loss(before, task)}")
    model.train()
    learner = CodeLearner(model, every=arguments.learn_codes) if arguments.learn_codes else None
    loss = 0.0
    for batch in train_loader:
        with accelerator.accumulate(model):
            output = model(**batch)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
        loss += output.loss.detach() / arguments.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        move = None if learner is None else learner.step()
        if move is not None:
            accelerator.print(describe(move, arguments.steps))
        step = schedule.last_epoch
        if step % arguments.logging_steps == 0:
            mean = accelerator.reduce(loss, "mean").item()
            accelerator.print(f"step {step} of {arguments.steps}: loss {mean:.6f}")
        if arguments.eval_steps and step % arguments.eval_steps == 0:
            current = describe_loss(mean_loss(model, eval_loader, accelerator), task)
            accelerator.print(f"step {step} of {arguments.steps}: {current}")
        loss = 0.0
    if learner is not None:
        learner.close()
    after = mean_loss(model, eval_loader, accelerator)
    accelerator.print(f"after: {describe_loss(after, task)}")
    save(task, model, arguments, accelerator)
    accelerator.end_training()


def _order(
    rows: torch.Tensor, arguments: argparse.Namespace, accelerator: Accelerator
) -> list[int]:
    """Rows of the whole training, in an order that the number of processes does not change."""
    generator = torch.Generator().manual_seed(arguments.seed)
    wanted = arguments.steps * rows_a_step(arguments, processes=accelerator.num_processes)
    passes = -(-wanted // len(rows))
    order = [torch.randperm(len(rows), generator=generator) for _ in range(passes)]
    return torch.cat(order)[:wanted].tolist()


@torch.no_grad()
def mean_loss(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Mean loss over all processes.

    Args:
        model: as the accelerator wrapped it.
        loader: batches of one row each: `gather_for_metrics` drops what was repeated to give all
            processes as many batches, but cannot take it out of a batch's mean.
        accelerator: of this process.
    """
    was_training = model.training
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss[None]) for batch in loader]
    model.train(was_training)
    return torch.cat(losses).double().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
