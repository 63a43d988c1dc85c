"""Export to ONNX, for runtimes without PyTorch."""

import os
import warnings
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor, nn

from .modeling_gru_svm import GRUSVMForSequenceClassification

# onnxscript 0.6.0 writes a graph of a GRU that onnxruntime refuses to run.
NEEDED = {"onnx": "1.20", "onnxscript": "0.7"}


class _Logits(nn.Module):
    """The model with logits alone, as the graph is to have them."""

    def __init__(self, model: GRUSVMForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor) -> Tensor:
        return self.model(input_values).logits


def missing_packages() -> str:
    """What the export needs and is not installed, as pip takes it; empty where all is there."""
    missing = []
    for name, lowest in NEEDED.items():
        try:
            enough = Version(metadata.version(name)) >= Version(lowest)
        except metadata.PackageNotFoundError:
            enough = False
        if not enough:
            missing.append(f'"{name}>={lowest}"')
    return " ".join(missing)


def export_onnx(model: GRUSVMForSequenceClassification, path: str | os.PathLike[str]) -> None:
    """Write the model as an ONNX file that takes any number of rows.

    The input is `input_values` (rows, T, I) in float32, the output `logits` (rows, C), whose argmax
    is the class. The number of time steps is fixed: PyTorch 2.13 unrolls a GRU while it exports.

    Args:
        model: in float32, on the CPU; dropout is off in the export.
        path: the file; weights are in it.

    Raises:
        ImportError: a package is missing or too old; the message has the command that installs it.
        ValueError: the model has no `sequence_length`, is on another device, or in another type
            than float32.
    """
    missing = missing_packages()
    if missing:
        raise ImportError(f"The export to ONNX needs more packages: pip install {missing}")
    weight = model.classifier.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(
            f"The model must be in float32 on the CPU, got {weight.dtype} on {weight.device}; "
            "call `model.float().cpu()` first."
        )
    steps = model.config.sequence_length
    if steps is None:
        raise ValueError(
            "The export needs a number of time steps, got `sequence_length` None; set "
            "`model.config.sequence_length` to that of the inputs to come."
        )
    inputs = torch.zeros(2, steps, model.config.input_size)
    was_training = model.training
    try:
        # What PyTorch's exporter warns of is its own: deprecated calls, and the list of weights
        # that `nn.GRU` keeps.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(model.eval()),
                (inputs,),
                os.fspath(path),
                dynamo=True,
                dynamic_shapes={"input_values": {0: torch.export.Dim("rows")}},
                input_names=["input_values"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    finally:
        model.train(was_training)
