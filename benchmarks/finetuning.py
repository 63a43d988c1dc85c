"""Whole-model fine-tuning of a converted model beside the dense one, with both examples.

    python -m benchmarks.finetuning --data DATA --output benchmarks/results/finetuning.json

Both models see the same text, tokens and schedule; texts are the protocol's. The head is fitted to
`--calibration-tokens` of them, evenly spaced, and distilled as by default; both models are judged
by the first `--evaluation-tokens` of each text.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_vqlogits  # noqa: F401 - registers the model type
from hf_vqlogits.conversion.assessment import assess
from hf_vqlogits.conversion.checkpoint import write_checkpoint
from hf_vqlogits.conversion.options import DISTILL_STEPS
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import choose_size
from hf_vqlogits.conversion.source import Source

from .models import dense_model
from .protocol import Case, load_case
from .record import record, write
from .training import first_tokens, judge

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMANDS = {
    "Trainer": [sys.executable, str(EXAMPLES / "finetune_trainer.py")],
    "Accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        str(EXAMPLES / "finetune_accelerate.py"),
    ],
}
EXAMPLE_ROWS = 16  # on which the examples judge themselves, before and after
SCHEDULE = {
    "--train": "all",
    "--batch-size": "4",
    "--context": "256",
    "--mixed-precision": "bf16",
}


def perplexities(folder: Path, case: Case, tokens: int) -> dict[str, float]:
    """Perplexity of a saved model on the first so many tokens of every text of the protocol."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = {text: first_tokens(blocks, tokens) for text, blocks in case.evaluation.items()}
    return {text: score.perplexity for text, score in judge(model, texts).items()}


def prepare(
    case: Case, folder: Path, *, reduction: float, calibration_tokens: int, seed: int
) -> dict[str, Path]:
    """Write the dense and the converted model, and the protocol's text."""
    dense = dense_model(case.parts)
    dense.save_pretrained(folder / "dense")
    case.tokenizer.save_pretrained(folder / "dense")
    corpus = case.corpus()
    corpus.calibration = corpus.calibration[
        :: max(1, corpus.calibration.numel() // calibration_tokens)
    ]
    corpus.evaluation = corpus.evaluation[:EXAMPLE_ROWS]
    quantiser = Quantiser(case.parts, corpus, seed, show_progress=True)
    statistics = quantiser.calibrate(to_distill=True)
    vocab_size, hidden_size = case.parts.weight.shape
    size = choose_size(
        "signs", vocab_size=vocab_size, hidden_size=hidden_size, param_reduction=reduction
    )
    head = quantiser.sign_heads([size], statistics)[size]
    quantiser.distill(head, DISTILL_STEPS, statistics)
    source = Source(case.name, dense.eval(), case.tokenizer, {})
    report = assess(quantiser, source, statistics, size, head, method="signs", rungs={})
    (folder / "vq").mkdir()
    write_checkpoint(folder / "vq", report.model, source)
    for name, rows in (("train", case.calibration), ("eval", corpus.evaluation)):
        text = case.tokenizer.batch_decode(rows[:, :-1])
        (folder / f"{name}.txt").write_text("\n".join(text), encoding="utf8")
    return {"dense": folder / "dense", "vq": folder / "vq"}


def main() -> None:
    """Measure and write the results."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"))
    p.add_argument("--models", type=Path, default=Path("../shared/models"))
    p.add_argument("--model", default="smollm2")
    p.add_argument("--param-reduction", type=float, default=0.99)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--learning-rate", default="1e-4")
    p.add_argument("--calibration-tokens", type=int, default=100_000)
    p.add_argument("--evaluation-tokens", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="a twentieth of the text")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    judged = options.evaluation_tokens
    case = load_case(options.model, options.data, options.models, quick=options.quick)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = prepare(
            case,
            folder,
            reduction=options.param_reduction,
            calibration_tokens=options.calibration_tokens,
            seed=options.seed,
        )
        for name, path in models.items():
            rows.append({"model": name, "example": None, "texts": perplexities(path, case, judged)})
        for example, command in COMMANDS.items():
            for name, path in models.items():
                tuned = folder / f"{name}-{example}"
                schedule = {
                    **SCHEDULE,
                    "--model": str(path),
                    "--train-data": str(folder / "train.txt"),
                    "--eval-data": str(folder / "eval.txt"),
                    "--output": str(tuned),
                    "--steps": str(options.steps),
                    "--learning-rate": options.learning_rate,
                    "--seed": str(options.seed),
                }
                words = [word for pair in schedule.items() for word in pair]
                subprocess.run([*command, *words], check=True)
                texts = perplexities(tuned, case, judged)
                rows.append({"model": name, "example": example, "texts": texts})
    result = record(
        "finetuning",
        param_reduction=options.param_reduction,
        steps=options.steps,
        learning_rate=float(options.learning_rate),
        calibration_tokens=options.calibration_tokens,
        distill_steps=DISTILL_STEPS,
        evaluation_tokens_of_each_text=judged,
        schedule=SCHEDULE,
        seed=options.seed,
        rows=rows,
    )
    write(result, options.output)
    for row in rows:
        print(f"{row['model']:6} {row['example'] or 'before':10}", row["texts"])


if __name__ == "__main__":
    main()
