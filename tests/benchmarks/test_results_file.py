"""A results file that several runs fill."""

import json
import sys

import pytest

from benchmarks import record, results_file
from benchmarks.results_file import ResultsFile


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality", "--only", "a"])
    return tmp_path / "new" / "results.json"


def opened(output, **settings):
    return ResultsFile(output, "quality", settings={"seed": 0, "notes": ("one",), **settings})


def test_rows_of_several_runs_stand_in_one_file(output, monkeypatch):
    first = opened(output)
    assert not output.exists()
    assert not first.rows
    first.add([{"peer": "dense", "bytes": 3}, {"peer": "dense", "bytes": 4}])
    first.add([{"peer": "GPTQ", "bytes": 2}])
    monkeypatch.setattr(sys, "argv", ["quality", "--only", "b", "--work", "/some/where"])
    monkeypatch.setattr(record, "machine", lambda: {"processor": "another"})
    second = opened(output)
    assert second.has(peer="GPTQ")
    assert second.has(peer="dense", bytes=4)
    assert not second.has(peer="dense", bytes=2)
    assert not second.has(model="dense")
    second.add([{"peer": "HQQ", "bytes": 1}])
    result = json.loads(output.read_text())
    assert [row["peer"] for row in result["rows"]] == ["dense", "dense", "GPTQ", "HQQ"]
    assert [row["run"] for row in result["rows"]] == [0, 0, 0, 1]
    assert [run["command"] for run in result["runs"]] == [
        "python -m benchmarks.quality --only a",
        "python -m benchmarks.quality --only b --work WORK",
    ]
    assert result["runs"][1]["machine"] == {"processor": "another"}
    assert "torch" in result["runs"][0]["versions"]
    assert {name: result[name] for name in ("benchmark", "seed", "notes")} == {
        "benchmark": "quality",
        "seed": 0,
        "notes": ["one"],
    }
    assert [*output.parent.iterdir()] == [output]


def test_the_same_run_taken_up_again_is_one_run(output):
    opened(output).add([{"peer": "dense"}])
    opened(output).add([{"peer": "GPTQ"}])
    result = json.loads(output.read_text())
    assert len(result["runs"]) == 1
    assert [row["run"] for row in result["rows"]] == [0, 0]


def test_other_settings_are_refused_and_nothing_is_lost(output):
    opened(output).add([{"peer": "dense"}])
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"is of other settings \(seed 0, not 1\); move it away"):
        opened(output, seed=1)
    with pytest.raises(ValueError, match=r"\(quick None, not True\)"):
        opened(output, quick=True)
    assert output.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"benchmark": "quality", "rows": []}'])
def test_files_that_are_no_results_are_refused(output, text):
    output.parent.mkdir()
    output.write_text(text)
    with pytest.raises(ValueError, match=r"holds no results of benchmarks\.quality to add to"):
        opened(output)
    assert output.read_text() == text


def test_results_of_another_benchmark_are_refused(output):
    opened(output).add([{"peer": "dense"}])
    with pytest.raises(ValueError, match=r"holds no results of benchmarks\.speed to add to"):
        ResultsFile(output, "speed", settings={})


def test_an_interrupted_write_leaves_what_was_there(output, monkeypatch):
    results = opened(output)
    results.add([{"peer": "dense"}])
    before = output.read_bytes()

    def fail(result, path):
        path.write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(results_file, "write", fail)
    with pytest.raises(OSError, match="No space"):
        results.add([{"peer": "GPTQ"}])
    assert output.read_bytes() == before
