"""The type of large products follows what the device multiplies in hardware."""

import pytest
import torch

from hf_vqlogits.ops.precision import product_dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_multiplies_bfloat16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert product_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_multiplies_bfloat16_where_it_need_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    def is_supported(*, including_emulation: bool) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert product_dtype(torch.device("cuda")) == dtype


def test_a_device_of_which_nothing_is_known_multiplies_float32() -> None:
    assert product_dtype(torch.device("meta")) == torch.float32
