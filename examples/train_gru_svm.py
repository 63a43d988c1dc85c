"""Train a GRU-SVM (or GRU-softmax) on traffic records with Trainer.

python examples/train_gru_svm.py --train-data KDDTrain+_20Percent.txt.gz \
    --test-data KDDTest+.txt.gz --output gru-svm

The defaults are those of the paper (Agarap, 2017), which docs/gru_svm.md compares with others.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from hf_vqlogits.conversion.checkpoint import check_output, whole_or_nothing
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.gru_svm import (
    GRUSVMConfig,
    GRUSVMFeatureExtractor,
    GRUSVMForSequenceClassification,
    RecordSchema,
    TrafficRecords,
    export_onnx,
    nsl_kdd_schema,
)
from hf_vqlogits.gru_svm.configuration_gru_svm import OUTPUT_LOSSES
from hf_vqlogits.gru_svm.feature_extraction_gru_svm import CONTINUOUS
from hf_vqlogits.gru_svm.onnx_export import missing_packages

HELD_OUT = 0.2
DEFAULTS = GRUSVMConfig()


class Rows(Dataset[dict[str, Tensor]]):
    """Inputs and labels, a dictionary a record, as Trainer takes them."""

    def __init__(self, features: dict[str, Tensor]):
        self.features = features

    def __len__(self) -> int:
        return len(self.features["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.features.items()}


def train(arguments: argparse.Namespace) -> None:
    """Train, judge by the test records and save."""
    with _mistakes():
        _check(arguments)
        extractor, train_rows, test_rows = _records(arguments)
        set_seed(arguments.seed)
        model = GRUSVMForSequenceClassification(_config(arguments, extractor))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_training_arguments(arguments, scratch),
            train_dataset=train_rows,
            eval_dataset=test_rows,
            compute_metrics=_accuracy,
        )
        trainer.train()
        found = trainer.predict(test_rows)
    predicted, labels = found.predictions.argmax(-1), found.label_ids
    print(f"accuracy: {(predicted == labels).mean():.4f}")
    print(f"of {len(labels):,} records, by class, and predicted as:")
    print(_confusion(predicted, labels, extractor.schema.class_names))
    if trainer.is_world_process_zero():
        _check_output(arguments)  # again: something may have appeared there meanwhile
        model = model.cpu()
        with whole_or_nothing(arguments.output) as folder:
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            if arguments.onnx:
                export_onnx(model, folder / "model.onnx")
        print(f"saved in {arguments.output}")


@contextmanager
def _mistakes() -> Iterator[None]:
    """Tell what is wrong with options and files in one line; faults of the training stay faults."""
    try:
        yield
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise ConversionError(
            f"{error.filename or 'A file'} cannot be read: {error.strerror or error}."
        ) from error


def _check(arguments: argparse.Namespace) -> None:
    _check_output(arguments)
    for name in ("epochs", "learning_rate"):
        value = getattr(arguments, name)
        if not 0 < value < math.inf:
            raise ConversionError(f"`--{name.replace('_', '-')}` must be positive, got {value:g}.")
    for name in ("batch_size", "gradient_accumulation_steps"):
        value = getattr(arguments, name)
        if value < 1:
            raise ConversionError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if not 0 <= arguments.seed < 2**32:
        raise ConversionError(f"`--seed` must lie between 0 and 2^32 - 1, got {arguments.seed}.")
    if arguments.schema is not None and arguments.classes is not None:
        raise ConversionError(
            "`--classes` chooses the classes of NSL-KDD; with `--schema`, whose file names the "
            "classes itself, leave it out."
        )
    missing = missing_packages() if arguments.onnx else ""
    if missing:
        raise ConversionError(f"`--onnx` needs more packages: pip install {missing}")


def _check_output(arguments: argparse.Namespace) -> None:
    check_output(
        arguments.output,
        overwrite=arguments.overwrite,
        source_name="",
        replaceable=lambda folder: (folder / "config.json").exists(),
    )


def _records(arguments: argparse.Namespace) -> tuple[GRUSVMFeatureExtractor, Rows, Rows]:
    if arguments.schema is None:
        schema = nsl_kdd_schema(arguments.classes or "two")
    else:
        schema = RecordSchema.from_json_file(arguments.schema)
    extractor = GRUSVMFeatureExtractor(
        schema, continuous=arguments.continuous, num_bins=arguments.num_bins
    )
    records = _read(extractor, arguments.train_data, arguments)
    if arguments.test_data is None:
        records, test = _split(records, arguments.seed)
    else:
        test = _read(extractor, arguments.test_data, arguments)
    extractor.fit(records)
    return (
        extractor,
        Rows(dict(extractor(records, return_tensors="pt"))),
        Rows(dict(extractor(test, return_tensors="pt"))),
    )


def _read(
    extractor: GRUSVMFeatureExtractor, path: str, arguments: argparse.Namespace
) -> TrafficRecords:
    how = "leave_out" if arguments.leave_out_malformed else "refuse"
    try:
        records = extractor.read(path, malformed=how)
    except ValueError as error:
        option = "have them left out and listed with `--leave-out-malformed`"
        python = "have them left out and listed with `malformed='leave_out'`"
        raise ConversionError(str(error).replace(python, option)) from error
    for problem in records.problems:
        print(f"left out: {path}: {problem}", file=sys.stderr)
    return records


def _split(records: TrafficRecords, seed: int) -> tuple[TrafficRecords, TrafficRecords]:
    held_out = int(HELD_OUT * len(records))
    if not held_out:
        raise ConversionError(
            f"{len(records)} records are too few to keep a fifth out of the training; give more, "
            "or `--test-data`."
        )
    order = np.random.default_rng(seed).permutation(len(records))
    return records.select(order[held_out:]), records.select(order[:held_out])


def _config(arguments: argparse.Namespace, extractor: GRUSVMFeatureExtractor) -> GRUSVMConfig:
    return GRUSVMConfig(
        sequence_length=extractor.sequence_length,
        hidden_size=arguments.hidden_size,
        dropout=arguments.dropout,
        output_loss=arguments.output_loss,
        svm_c=arguments.svm_c,
        id2label=extractor.id2label,
        label2id=extractor.label2id,
    )


def _training_arguments(arguments: argparse.Namespace, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        use_cpu=not torch.accelerator.is_available(),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,  # the loss is a sum over a batch
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,  # AdamW without decay is the paper's Adam; the SVM has its regulariser
        max_grad_norm=0.0,  # the objective is a sum over the batch, which a norm of 1 would cut
        seed=arguments.seed,
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
    )


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    predictions: Any = found.predictions
    return {"accuracy": float((predictions.argmax(-1) == found.label_ids).mean())}


def _confusion(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """The confusion matrix as lines, a class each."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    width = max(*map(len, names), 7)
    lines = [" " * width + "".join(f"  {name:>{width}}" for name in names)]
    for name, row in zip(names, counts, strict=True):
        lines.append(f"{name:>{width}}" + "".join(f"  {count:>{width},}" for count in row))
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train-data", required=True, help="comma-separated records, may be .gz")
    add("--test-data", help="likewise; default: a fifth of the training records, kept out")
    add("--schema", type=Path, help="JSON file on columns and classes; default: NSL-KDD")
    add("--classes", choices=("two", "five"), help="of NSL-KDD; default two")
    add("--output", required=True, type=Path, help="folder for model and feature extractor")
    add("--overwrite", action="store_true", help="replace a model in the output folder")
    add("--output-loss", choices=OUTPUT_LOSSES, default=DEFAULTS.output_loss)
    add("--continuous", choices=CONTINUOUS, default=CONTINUOUS[0], help="how numbers are scaled")
    add("--num-bins", type=int, default=10, help="quantile bins")
    add("--leave-out-malformed", action="store_true", help="list malformed lines and go on")
    add("--hidden-size", type=int, default=DEFAULTS.hidden_size)
    add("--dropout", type=float, default=DEFAULTS.dropout, help="share dropped")
    add("--svm-c", type=float, default=DEFAULTS.svm_c)
    add("--epochs", type=float, default=5)
    add("--batch-size", type=int, default=256)
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--learning-rate", type=float, default=1e-5, help="constant; the paper's is small")
    add("--onnx", action="store_true", help="write model.onnx as well")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for a mistake of the user's."""
    try:
        train(_parse(argv))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
