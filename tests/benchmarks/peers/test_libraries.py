"""Peers by other libraries: what they return against float64 formulas, and exact bytes."""

import builtins

import pytest
import torch

from benchmarks.peers.hqq_weights import hqq_weights
from benchmarks.peers.layer import UnavailableError
from benchmarks.peers.nf4_weights import nf4_weights
from benchmarks.peers.torchao_weights import torchao_weights


def weights() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(40, 128).bfloat16().float()


def relative_error(made: torch.Tensor) -> float:
    return float((made - weights()).square().mean() / weights().square().mean())


def test_torchao_int8_against_a_float64_reference():
    pytest.importorskip("torchao")
    made = torchao_weights(weights(), 8)
    scale = weights().double().abs().amax(1, keepdim=True) / 127.5
    scale = scale.bfloat16().double()
    assert ((made.weight - weights()).abs() / scale).max() < 0.8  # the largest code is 127
    steps = made.weight.double() / scale
    assert (steps - steps.round()).abs().max() < 1e-4
    assert made.total_bytes == 40 * 128 + 40 * 4  # scales in float32
    assert relative_error(made.weight) < 1e-4


@pytest.mark.parametrize("group", [32, 64])
def test_torchao_int4(group):
    pytest.importorskip("torchao")
    made = torchao_weights(weights(), 4, group=group)
    groups = 40 * 128 // group
    assert made.total_bytes == 40 * 128 // 2 + groups * 2 + groups // 2
    assert relative_error(made.weight) < 0.01
    assert all(len(row.unique()) <= 16 for row in made.weight.view(-1, group))


@pytest.mark.parametrize(("bits", "most"), [(4, 0.01), (2, 0.25)])
def test_hqq(bits, most):
    pytest.importorskip("hqq.core.quantize")
    made = hqq_weights(weights(), bits)
    assert made.total_bytes == 40 * 128 * bits // 8 + 80 * 4
    assert relative_error(made.weight) < most
    assert all(len(row.unique()) <= 2**bits for row in made.weight.view(-1, 64))


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    made = nf4_weights(weights(), nested=nested)
    blocks = 40 * 128 // 64
    scales = blocks + 4 * -(-blocks // 256) + 4 if nested else 4 * blocks
    assert made.total_bytes == 40 * 128 // 2 + scales
    levels = functional.get_4bit_type("nf4", device="cpu").double()
    rows = weights().double().view(-1, 64)
    scale = rows.abs().amax(1, keepdim=True)
    nearest = ((rows / scale)[..., None] - levels).abs().argmin(-1)
    expected = (levels[nearest] * scale).view(40, 128)
    tolerance = 0.06 if nested else 1e-5
    near = (made.weight.double() - expected).abs() <= tolerance
    assert near.float().mean() > 0.99  # ties fall either way


@pytest.mark.parametrize(
    ("library", "peer"),
    [
        ("torchao", lambda: torchao_weights(weights(), 8)),
        ("hqq", lambda: hqq_weights(weights(), 4)),
        ("bitsandbytes", lambda: nf4_weights(weights(), nested=True)),
    ],
)
def test_a_missing_library_is_named(library, peer, monkeypatch):
    real = builtins.__import__

    def fake(name, *rest):
        if name.split(".")[0] == library:
            raise ImportError(f"no {library}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(UnavailableError, match=f"{library} cannot be imported: no {library}"):
        peer()
