import json

import pytest
import torch

from benchmarks import gate_rates
from benchmarks.gate_rates import SETTINGS, Setting, doubled, fit, main, sample_sizes, truth
from benchmarks.work_folder import WorkFolder
from hf_vqlogits.gaussian_moe.voronoi import voronoi

EXACT, OVER = Setting("gelu", False), Setting("gelu", True)


def test_sizes_reach_from_a_hundred_to_a_hundred_thousand():
    assert [setting.name for setting in SETTINGS] == [
        "plain-exact",
        "plain-over",
        "gelu-exact",
        "gelu-over",
    ]
    sizes = sample_sizes(gate_rates.SIZES, gate_rates.LARGEST)
    assert (sizes[0], sizes[-1]) == (100, 100_000)
    assert len(sizes) >= 7
    assert gate_rates.REPETITIONS >= 20


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_the_doubled_truth_is_the_truth(activation):
    true = truth(activation)
    twice = doubled(true)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    y = true.sample(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(twice.log_density(x, y), true.log_density(x, y))
    found = voronoi(twice, true)
    assert found.sizes.tolist() == [2, 1]
    assert float(found.loss) == pytest.approx(0, abs=1e-12)


def test_fits_end_at_the_maximum_near_the_truth():
    for setting in SETTINGS:
        for result in fit(setting, 400, [0, 1], seed=0):
            assert result["converged"] or setting.over
            assert result["gain_over_truth"] > 0
            assert set(result["start_loss"]) == {"raw", "scaled"} & result.keys()
            assert ("scaled" in result) == (setting.activation == "linear")
            assert sum(result["raw"]["sizes"]) == 2 + setting.over


def test_a_repetition_does_not_depend_on_its_neighbours():
    alone, together = fit(EXACT, 200, [1], seed=0)[0], fit(EXACT, 200, [0, 1], seed=0)[1]
    assert alone["start_loss"] == together["start_loss"]
    assert alone["raw"]["loss"] == pytest.approx(together["raw"]["loss"], rel=0.05)
    other = fit(EXACT, 200, [1], seed=1)[0]
    assert other["raw"]["loss"] != pytest.approx(alone["raw"]["loss"], rel=0.01)


def test_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_rates, "TOGETHER", 200)  # two at once
    calls = []
    real = gate_rates.fit

    def watched(setting, n, repetitions, seed):
        calls.append(list(repetitions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(setting, n, repetitions, seed)

    monkeypatch.setattr(gate_rates, "fit", watched)
    work = WorkFolder(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        gate_rates.measure(EXACT, 100, 4, 0, work)
    found = gate_rates.measure(EXACT, 100, 4, 0, work)
    assert calls == [[0, 1], [2, 3], [2, 3]]
    assert len(found) == 4


def test_command_writes_results_table_and_plot(tmp_path, capsys):
    output = tmp_path / "rates.json"
    words = ["--quick", "--sizes", "2", "--repetitions", "2", "--work", str(tmp_path / "work")]
    assert main([*words, "--output", str(output)]) == 0
    told = json.loads(output.read_text())
    assert told["sizes"] == [100, 1000]
    assert told["truth"]["gelu"]["temperature"] == 0.15
    assert {row["setting"] for row in told["rows"]} == {setting.name for setting in SETTINGS}
    plain = [row for row in told["rows"] if row["setting"] == "plain-exact"]
    assert [row["expected_slope"] for row in plain] == [None, None, None, -0.5, -0.5, -0.5]
    assert all(len(row["points"]) <= 2 for row in told["rows"])
    assert {check["repetitions"] for check in told["checks"]} == {2}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "gelu-over" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--seed", "1", "--output", str(output)])
    assert "is of other settings (seed 0, not 1)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--sizes", "1", "--work", str(tmp_path), "--output", str(output)])
    assert "must be at least 2" in capsys.readouterr().err
