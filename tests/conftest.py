"""Fixtures shared by the tests: tiny random models, no network, no GPU."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # noqa: F401  (before anything that imports Triton)
import offline  # noqa: F401  (before anything that imports libraries of the hub)
import pytest
import torch
import transformers
from tiny import VOCABULARY, perturb, text_config
from torch import Tensor

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM

# Assisted generation calls `generate` of the assistant in a deprecated way.
BY_TRANSFORMERS_ITSELF = "Passing `generation_config` together with"

transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def make_model() -> Callable[..., VQLogitsForCausalLM]:
    """Builder of tiny models with perturbed weights, in evaluation mode."""

    def make(family: str = "gpt2", **fields: Any) -> VQLogitsForCausalLM:
        torch.manual_seed(0)
        backbone = fields.pop("text_config", None) or text_config(family)
        cap = getattr(backbone, "final_logit_softcapping", None)
        fields = {"num_codebooks": 19, "final_logit_softcapping": cap} | fields
        model = VQLogitsForCausalLM(VQLogitsConfig(text_config=backbone, **fields)).eval()
        perturb(model)
        return model

    return make


@pytest.fixture
def ids() -> Tensor:
    """Token ids (2, 7) without special ones."""
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def no_deprecated_use() -> Iterator[None]:
    """Fail where Transformers logs that something is deprecated; it seldom warns otherwise."""
    seen: list[str] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "deprecat" in text and not text.startswith(BY_TRANSFORMERS_ITSELF):
                seen.append(text)

    watch = Watch()
    logger = logging.getLogger("transformers")
    logger.addHandler(watch)
    yield
    logger.removeHandler(watch)
    assert not seen
