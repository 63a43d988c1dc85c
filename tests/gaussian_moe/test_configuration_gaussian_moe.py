import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

import hf_vqlogits  # noqa: F401 - registers
from hf_vqlogits.gaussian_moe import GaussianMoEConfig


def test_survives_saving(tmp_path):
    fields = {
        "input_size": 3,
        "output_size": 2,
        "num_components": 5,
        "activation": "gelu",
        "temperature": 0.25,
        "learn_temperature": True,
        "min_deviation": 0.01,
    }
    GaussianMoEConfig(**fields).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GaussianMoEConfig)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gaussian_moe"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 0}, "`input_size` must be at least 1, got 0"),
        ({"output_size": -1}, "`output_size` must be at least 1, got -1"),
        ({"num_components": 0}, "`num_components` must be at least 1, got 0"),
        ({"activation": "relu6"}, "`activation` must be one of .* got 'relu6'"),
        ({"temperature": 0.0}, "`temperature` must be positive and finite, got 0.0"),
        ({"temperature": -1}, "`temperature` must be positive and finite, got -1"),
        ({"temperature": float("nan")}, "`temperature` must be positive and finite, got nan"),
        ({"min_deviation": 0.0}, "`min_deviation` must be positive and finite, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GaussianMoEConfig(**fields)


def test_types_are_checked():
    with pytest.raises(StrictDataclassFieldValidationError, match="num_components"):
        GaussianMoEConfig(num_components="two")
