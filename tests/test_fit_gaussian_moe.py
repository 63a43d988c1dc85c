"""The example that fits a Gaussian mixture of experts to a table."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def table(n=300):
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, n)
    left = draw.uniform(size=n) < 1 / (1 + np.exp(4 * x))
    y = np.where(left, -1 - x, 2 + 3 * x) + 0.1 * draw.standard_normal(n)
    return x, y


@pytest.fixture
def files(tmp_path):
    x, y = table()
    lines = ["x, y,other", *(f"{a},{b},1" for a, b in zip(x, y, strict=True)), ""]
    (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf8")
    np.savez(tmp_path / "table.npz", x=np.stack([x, x**2], 1), y=y, z=-y)
    return tmp_path


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs the example in this process; returns exit code, output and errors."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("fit_gaussian_moe")

    def run(*words):
        capsys.readouterr()
        try:
            code = module.main([str(word) for word in words])
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("options", [[], ["--learn-temperature", "--activation", "gelu"]])
def test_csv_gives_the_two_lines(files, example, options):
    output = files / "model"
    code, out, _ = example("--data", files / "table.csv", "--output", output, *options)
    assert code == 0
    found = sorted((float(a), float(b)) for a, b in re.findall(r"; A (\S+); b (\S+); nu", out))
    assert np.allclose(found, [(-1, -1), (3, 2)], atol=0.15)
    model = AutoModel.from_pretrained(output)
    x, y = (torch.from_numpy(column).float() for column in table())
    told = float(re.search(r"an observation: (\S+) \(converged", out)[1])
    assert float(model.log_density(x, y).mean().detach()) == pytest.approx(told, abs=1e-3)


def test_npz_with_several_columns_and_a_falling_temperature(files, example):
    output = files / "model"
    code, out, _ = example(
        *("--data", files / "table.npz", "--y", "y", "z", "--output", output),
        *("--temperature", 4, "--final-temperature", 0.5, "--restarts", 2, "--steps", 60),
    )
    assert code == 0
    model = AutoModel.from_pretrained(output)
    assert (model.config.input_size, model.config.output_size) == (2, 2)
    assert model.temperature == pytest.approx(0.5)
    assert "temperature 0.5" in out


def test_a_model_is_replaced_only_when_told(files, example):
    words = ("--data", files / "table.csv", "--output", files / "model", "--restarts", 1)
    assert example(*words)[0] == 0
    code, _, err = example(*words)
    assert code == 2
    assert "error:" in err
    assert example(*words, "--overwrite", "--components", 1)[0] == 0
    assert AutoModel.from_pretrained(files / "model").config.num_components == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "none.csv"], "'none.csv' cannot be read: .*No such file"),
        (["--data", "table.txt"], "'table.txt' must end in .csv or .npz"),
        (["--data", "table.csv", "--x", "z"], "There is no column 'z'; there are x, y, other"),
        (["--data", "words.csv"], "Column 'y' holds something else than numbers: .*'b'"),
        (["--data", "short.csv"], "Line 3 of 'short.csv' has 1 cells, the line of names has 2"),
        (["--data", "twice.csv"], "has more than one column x"),
        (["--data", "broken.npz"], "'broken.npz' cannot be read"),
        (["--data", "nothing.npz"], "'nothing.npz' cannot be read: No data left in file"),
        (["--data", "array.npz"], "'array.npz' is one array, no .npz file of arrays by name"),
        (["--data", "complex.npz"], "Column 'x' holds something else than numbers: complex ones"),
        (["--data", "huge.npz"], "no numbers of the model's type, torch.float32"),
        (["--data", "nan.csv"], "`y` holds 1 values that are NaN or infinite, the first in row 1"),
        (["--data", "empty.csv"], "0 observations cannot tell 2 components apart"),
        (["--data", "uneven.npz"], r"`x` has \(4,\) rows and `y` \(3,\)"),
        (["--data", "table.csv", "--components", "0"], "`num_components` must be at least 1"),
        (["--data", "table.csv", "--components", "301"], "300 observations cannot tell 301"),
        (["--data", "table.csv", "--temperature", "0"], "--temperature must be a positive number"),
        (["--data", "table.csv", "--min-deviation", "nan"], "--min-deviation must be a positive"),
        (["--data", "table.csv", "--final-temperature", "2"], "`end` must not be above `start`"),
        (
            ["--data", "table.csv", "--final-temperature", "0.5", "--learn-temperature"],
            "`schedule` sets the temperature .* choose one",
        ),
        (["--data", "table.csv", "--steps", "0"], "`steps` must be at least 1, got 0"),
        (["--data", "table.csv", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--data", "table.csv", "--activation", "cube"], "invalid choice: 'cube'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(files, example, monkeypatch, words, message):
    monkeypatch.chdir(files)
    for name, text in {
        "words.csv": "x,y\n1,a\n2,b\n".replace("a", "1"),
        "short.csv": "x,y\n1,2\n3\n",
        "twice.csv": "x,x\n1,2\n",
        "nan.csv": "x,y\n1,2\n3,nan\n5,6\n",
        "empty.csv": "x,y\n",
        "broken.npz": "no archive",
        "nothing.npz": "",
    }.items():
        Path(name).write_text(text, encoding="utf8")
    np.savez("uneven.npz", x=np.zeros(4), y=np.zeros(3))
    np.savez("complex.npz", x=np.zeros(4, dtype=complex), y=np.zeros(4))
    np.savez("huge.npz", x=np.arange(9.0), y=1e160 * np.arange(9.0) ** 2)
    with open("array.npz", "wb") as file:
        np.save(file, np.zeros(4))
    code, out, err = example(*words, "--output", "model")
    assert code == 2
    assert re.search(message, err)
    assert "Traceback" not in err
    assert not out
    assert not Path("model").exists()


def test_runs_as_a_command(files):
    command = [sys.executable, str(EXAMPLES / "fit_gaussian_moe.py"), "--data", "none.csv"]
    done = subprocess.run(
        [*command, "--output", "model"], cwd=files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: 'none.csv' cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
