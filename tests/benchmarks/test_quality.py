"""The whole comparison on a tiny random model."""

import json
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import quality
from benchmarks.peers import catalogue
from benchmarks.peers.layer import UnavailableError
from benchmarks.protocol import Case
from benchmarks.results_file import ResultsFile
from benchmarks.work_folder import WorkFolder
from hf_vqlogits.conversion.families import LogitTransform, take_apart

VOCAB, SIZE = 2000, 64


@pytest.fixture
def case():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=SIZE, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    ids = torch.randint(0, VOCAB, (24, 17))
    return Case("gpt2-novels", take_apart(model), None, ids[:20], {"novels": ids[20:]})


def unavailable(layer, quick):
    raise UnavailableError("not here")
    yield


def some_families(monkeypatch, *names):
    families = {name: catalogue.FAMILIES[name] for name in names}
    monkeypatch.setattr(quality, "FAMILIES", families | {"HQQ": unavailable})


def test_results_plot_and_table(case, tmp_path, monkeypatch, capsys):
    names = set(catalogue.FAMILIES) - {"torchao", "HQQ", "bitsandbytes nf4"}
    some_families(monkeypatch, *(name for name in catalogue.FAMILIES if name in names))
    monkeypatch.setattr(quality, "load_case", lambda *_, **__: case)
    output = tmp_path / "new" / "quality.json"
    words = ["quality", "--quick", "--only", "gpt2-novels", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    quality.main()

    result = json.loads(output.read_text())
    rows = {(row["peer"], row["setting"]): row for row in result["rows"]}
    assert {peer for peer, _ in rows} == names
    assert len(rows) == len(result["rows"])
    assert result["seed"] == 0
    assert "torch" in result["runs"][0]["versions"]
    dense = rows["dense", "bfloat16"]
    assert dense["bytes"] == 2 * VOCAB * SIZE
    assert dense["factor"] == pytest.approx(1, abs=0.01)
    assert dense["texts"]["novels"]["tokens"] == 4 * 16
    ours = rows[catalogue.OURS, "1% kept"]
    bits = VOCAB * SIZE // (SIZE + 1) // 100
    codes = (VOCAB + VOCAB // 10) * -(-bits // 8) + 4 * (VOCAB // 10)
    assert ours["bytes"] == codes + 2 * bits * (SIZE + 1)
    assert ours["bits_per_weight"] == pytest.approx(8 * ours["bytes"] / (VOCAB * SIZE))
    found = ours["rate_distortion"]
    assert 0 < found["spread_bound"] <= found["fixed_bound"] < 1
    assert found["error"] == ours["details"]["error"]
    float32 = rows[catalogue.OURS, "1% kept, float32 codewords"]
    assert float32["bytes"] == float32["details"]["storage"]["total_bytes"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "GPTQ" in printed
    assert "HQQ: not here" in printed


def test_heads_that_are_no_plain_matrix_are_refused(case, tmp_path):
    case.parts.transform = LogitTransform(softcap=30.0)
    with pytest.raises(ValueError, match="gpt2-novels is not a plain matrix"):
        quality.measure(case, *files(tmp_path), ["dense"], seed=0, quick=True)


def files(folder):
    settings = {"seed": 0, "quick": True}
    results = ResultsFile(folder / "quality.json", "quality", settings=settings)
    return results, WorkFolder(folder / "work", settings)


def test_what_is_done_is_not_done_again(case, tmp_path, monkeypatch, capsys):
    some_families(monkeypatch, "dense", "low rank")
    monkeypatch.setattr(quality, "load_case", lambda *_, **__: case)
    output = tmp_path / "quality.json"
    words = ["quality", "--quick", "--only", "gpt2-novels", "--output", str(output)]
    words += ["--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", words)

    def interrupt(layer, quick):
        raise KeyboardInterrupt
        yield

    real = quality.FAMILIES["low rank"]
    monkeypatch.setitem(quality.FAMILIES, "low rank", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    monkeypatch.setitem(quality.FAMILIES, "low rank", real)
    monkeypatch.setitem(quality.FAMILIES, "dense", interrupt)
    monkeypatch.setattr(quality.Quantiser, "calibrate", None)
    quality.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["peer"] for row in rows] == ["dense", "low rank"]
    assert all(row["calibration_tokens"] == case.calibration.numel() for row in rows)

    # With nothing missing not even the statistics are wanted.
    monkeypatch.setattr(sys, "argv", [*words[:-2], "--peers", "low rank"])
    quality.main()
    assert json.loads(output.read_text())["rows"] == rows

    before = output.read_bytes()
    for more in (words, words[:-2]):  # refused by the work folder, and by the results
        monkeypatch.setattr(sys, "argv", [*more, "--seed", "1"])
        with pytest.raises(SystemExit):
            quality.main()
        assert "is of other settings (seed 0, not 1)" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_some_families_are_made_alone(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "load_case", lambda *_, **__: case)
    output = tmp_path / "quality.json"
    words = ["quality", "--quick", "--only", "gpt2-novels", "--output", str(output)]
    for peers in (["low rank"], ["dense", "round to nearest"]):
        monkeypatch.setattr(sys, "argv", [*words, "--peers", *peers])
        quality.main()
    rows = json.loads(output.read_text())["rows"]
    assert [*dict.fromkeys((row["peer"], row["run"]) for row in rows)] == [
        ("low rank", 0),
        ("dense", 1),
        ("round to nearest", 1),
    ]
    assert "round to nearest" in capsys.readouterr().out


def test_libraries_take_part(case, tmp_path, monkeypatch):
    for name in ("torchao", "bitsandbytes"):
        pytest.importorskip(name)
    results, work = files(tmp_path)
    peers = ["torchao", "bitsandbytes nf4"]
    quality.measure(case, results, work, peers, seed=0, quick=True)
    assert [row["peer"] for row in results.rows] == ["torchao", "torchao", "bitsandbytes nf4"]
    assert all(row["factor"] == pytest.approx(1, abs=0.05) for row in results.rows)
