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
