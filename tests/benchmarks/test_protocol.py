import gzip

import torch

from benchmarks import protocol


def test_text_to_train_on_is_what_nothing_else_has_seen(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "NOVEL_TOKENS", 40)
    monkeypatch.setattr(
        protocol, "tokenize", lambda text, _, limit: torch.tensor([*map(ord, text)][:limit])
    )
    (tmp_path / "novels").mkdir()
    for i in range(4):
        text = "".join(map(chr, range(50 * i + 100, 50 * i + 150)))
        file = tmp_path / "novels" / f"train-{i}-of-4.txt.gz"
        file.write_bytes(gzip.compress(text.encode("utf8")))
    context = tiny_case.calibration.shape[1] - 1
    rows = protocol.further_novels(tiny_case, tmp_path, 4 * (context + 1))
    # Each file gives ten tokens to the calibration.
    assert rows.tolist() == [[*range(50 * i + 110, 50 * i + 111 + context)] for i in range(4)]
