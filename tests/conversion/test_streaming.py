import pytest
import torch
from tiny_models import tiny_model

from hf_vqlogits.conversion import streaming
from hf_vqlogits.conversion.streaming import KeptStates, hidden_states


def test_positions_left_out_are_still_seen(monkeypatch):
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 16)  # two rows at a time
    backbone = tiny_model("llama").model
    rows = torch.randint(3, 96, (5, 9))
    with torch.no_grad():
        wanted = backbone(rows[:, :-1]).last_hidden_state
    for skip in (0, 1, 3):
        batches = list(hidden_states(backbone, rows, skip=skip))
        assert [len(labels) for _, labels in batches] == [n * (8 - skip) for n in (2, 2, 1)]
        hidden, labels = map(torch.cat, zip(*batches, strict=True))
        torch.testing.assert_close(hidden, wanted[:, skip:].flatten(0, 1))
        assert torch.equal(labels, rows[:, 1 + skip :].flatten())


@pytest.mark.parametrize("room", [True, False])
def test_kept_states_are_computed_once_where_they_fit(monkeypatch, room):
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 16)
    monkeypatch.setattr(streaming, "KEPT_BYTES", 4 * 6 * 8 * 32 - (not room))
    monkeypatch.setattr(streaming, "product_dtype", lambda device: torch.float32)
    backbone = tiny_model("llama").model
    blocks = torch.randint(3, 96, (6, 9))
    with torch.no_grad():
        wanted = backbone(blocks[:, :-1]).last_hidden_state
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    states = KeptStates(backbone, blocks)
    rows = torch.tensor([4, 0, 4, 5, 2])
    for expected_calls in (3, 3 if room else 6):
        hidden = torch.cat(list(states(rows)))
        torch.testing.assert_close(hidden, wanted[rows].flatten(0, 1))
        assert len(calls) == expected_calls
    list(states(torch.tensor([1, 2])))  # of which one is known
    assert len(calls) == expected_calls + 1


def test_nothing_is_kept_where_nothing_is_wanted_again():
    backbone = tiny_model("llama").model
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    states = KeptStates(backbone, torch.randint(3, 96, (6, 9)), keep=False)
    for expected_calls in (1, 2):
        list(states(torch.arange(3)))
        assert len(calls) == expected_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_hidden_states_take_products_in_the_fast_type(monkeypatch, dtype):
    monkeypatch.setattr(streaming, "product_dtype", lambda device: dtype)
    backbone = tiny_model("llama").model
    seen = set()
    backbone.layers[0].mlp.up_proj.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    rows = torch.randint(3, 96, (5, 9))
    ((exact, _),) = hidden_states(backbone, rows)
    assert seen == {torch.float32}
    seen.clear()
    ((fast, _),) = hidden_states(backbone, rows, fast=True)
    assert seen == {dtype}
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, exact, rtol=0, atol=0.05)  # hidden states are about 1
    assert torch.equal(fast, exact) == (dtype == torch.float32)
