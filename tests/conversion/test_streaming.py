import torch
from tiny_models import tiny_model

from hf_vqlogits.conversion import streaming
from hf_vqlogits.conversion.streaming import hidden_states


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
