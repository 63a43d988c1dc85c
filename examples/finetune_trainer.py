"""Fine-tune a quantised (or dense) causal language model with Trainer.

python examples/finetune_trainer.py --model gpt2-vq --train-data text.txt \
    --output gpt2-vq-tuned --train all --steps 200
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence

from finetuning import (
    MAX_GRADIENT_NORM,
    ON_CPU,
    WARMUP,
    collator,
    describe,
    describe_loss,
    prepare,
    run,
    save,
)
from transformers import Trainer, TrainingArguments

from hf_vqlogits.conversion.code_callback import LearnCodesCallback


def train(arguments: argparse.Namespace) -> None:
    """Train, and print loss and perplexity."""
    with tempfile.TemporaryDirectory() as scratch:
        training_arguments = _training_arguments(arguments, scratch)
        task = prepare(arguments, processes=training_arguments.world_size)
        learned = LearnCodesCallback(every=arguments.learn_codes) if arguments.learn_codes else None
        trainer = Trainer(
            model=task.model,
            args=training_arguments,
            train_dataset=task.train,
            eval_dataset=task.evaluation,
            data_collator=collator(task),
            callbacks=None if learned is None else [learned],
        )
        trainer.train()
        # Not `evaluate()` before `train()`: on several processes that would leave the model without
        # DDP, and each process would train on its own (Transformers 5.24, Accelerate 1.15).
        before = next(r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r)
        after = trainer.evaluate()["eval_loss"]
        for move in [] if learned is None else learned.history:
            trainer.accelerator.print(describe(move, arguments.steps))
        trainer.accelerator.print(f"before: {describe_loss(before, task)}")
        trainer.accelerator.print(f"after: {describe_loss(after, task)}")
        save(task, trainer.model_wrapped, arguments, trainer.accelerator)


def _training_arguments(arguments: argparse.Namespace, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        use_cpu=ON_CPU,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=1,  # rows repeated to fill a last batch would count twice
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARMUP * arguments.steps),
        max_grad_norm=MAX_GRADIENT_NORM,
        bf16=arguments.mixed_precision == "bf16",
        fp16=arguments.mixed_precision == "fp16",
        seed=arguments.seed,
        logging_steps=arguments.logging_steps,
        eval_on_start=True,
        eval_strategy="steps" if arguments.eval_steps else "no",
        eval_steps=arguments.eval_steps,
        prediction_loss_only=True,  # never gather N x V logits
        remove_unused_columns=False,  # rows are tensors; the collator makes the columns
        save_strategy="no",
        report_to="none",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
