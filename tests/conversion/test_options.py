"""What the converter's own tests do not reach; its refusals are in `test_convert.py`."""

import pytest
import torch

from hf_vqlogits.conversion import options
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.errors import ConversionError

LONG, SHORT = (torch.zeros(rows, 1025, dtype=torch.long) for rows in (40, 2))


def corpus(blocks):
    return Corpus(blocks, blocks, "text", "text", [])


@pytest.mark.parametrize(
    ("option", "default"),
    [("distill_steps", "DISTILL_STEPS"), ("input_distill_steps", "INPUT_DISTILL_STEPS")],
)
def test_steps_of_a_distillation(option, default, monkeypatch):
    monkeypatch.setattr(options, default, 77)
    assert options.distillation_steps(option, None, "signs", corpus(LONG)) == 77
    assert options.distillation_steps(option, None, "kmeans", corpus(LONG)) == 0
    assert options.distillation_steps(option, 5, "kmeans", corpus(LONG)) == 5
    assert options.distillation_steps(option, 0, "signs", corpus(SHORT)) == 0
    with pytest.raises(ConversionError, match=f"tokens .* there are .*`{option}` 0"):
        options.distillation_steps(option, 5, "signs", corpus(SHORT))
    short = corpus(SHORT)
    for _ in range(2):
        assert options.distillation_steps(option, None, "signs", short) == 0
    assert short.notes == ["too little calibration text for a distillation: fitted only"]


def test_ranges():
    options.check_range("seed", 0, 0, 3)
    options.check_range("seed", 3, 0, 3)
    with pytest.raises(ConversionError, match="`seed` must be at least 0, got -1"):
        options.check_range("seed", -1, 0, 3)
    with pytest.raises(ConversionError, match="`seed` must be at most 3, got 4"):
        options.check_range("seed", 4, 0, 3)
