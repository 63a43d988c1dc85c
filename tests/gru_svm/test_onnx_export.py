from importlib import metadata

import numpy as np
import pytest
import torch

from hf_vqlogits.gru_svm import (
    GRUSVMConfig,
    GRUSVMForSequenceClassification,
    export_onnx,
)

onnxruntime = pytest.importorskip("onnxruntime")


def make(**fields):
    torch.manual_seed(0)
    model = GRUSVMForSequenceClassification(GRUSVMConfig(hidden_size=6, **fields))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"sequence_length": 9},
        {"sequence_length": 4, "input_size": 3, "num_labels": 5, "output_loss": "cross_entropy"},
    ],
)
def test_any_number_of_rows(tmp_path, fields):
    model = make(**fields).train()
    path = tmp_path / "model.onnx"
    export_onnx(model, path)
    assert model.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    model.eval()
    run = session(path)
    assert [given.name for given in run.get_inputs()] == ["input_values"]
    for rows in (1, 2, 7):
        inputs = torch.randn(rows, model.config.sequence_length, model.config.input_size)
        (logits,) = run.run(["logits"], {"input_values": inputs.numpy()})
        np.testing.assert_allclose(logits, model(inputs).logits.detach().numpy(), atol=1e-5)


def test_packages_that_are_missing_or_too_old_are_named(tmp_path, monkeypatch):
    def version(name):
        if name == "onnx":
            raise metadata.PackageNotFoundError
        return "0.6.2"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match='pip install "onnx>=1.20" "onnxscript>=0.7"'):
        export_onnx(make(), tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a number of time steps, got .* None"):
        export_onnx(make(sequence_length=None), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch.bfloat16 on cpu"):
        export_onnx(make().bfloat16(), tmp_path / "model.onnx")
