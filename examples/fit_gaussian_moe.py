"""Fit a Gaussian mixture of experts with a dense-to-sparse gate to a table, and save it.

python examples/fit_gaussian_moe.py --data table.csv --x x1 x2 --y y --components 3 \
    --activation gelu --output fitted

A .csv file has a line of column names; an .npz file has arrays by name, as numpy.savez writes them,
each of one column or several. `AutoModel.from_pretrained` loads what is saved, after
`import hf_vqlogits`.
"""

import argparse
import csv
import math
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_vqlogits.conversion.checkpoint import check_output, whole_or_nothing
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.gates import ACTIVATIONS
from hf_vqlogits.gaussian_moe import (
    GaussianMoEConfig,
    GaussianMoEModel,
    TemperatureSchedule,
    fit_em,
)


def read_table(file: Path) -> dict[str, np.ndarray]:
    """Columns of a .csv file, or arrays of an .npz file, by name.

    Raises:
        ConversionError: it cannot be read, or a cell is not a number.
    """
    readers = {".csv": _read_csv, ".npz": _read_npz}
    if file.suffix not in readers:
        raise ConversionError(f"{str(file)!r} must end in .csv or .npz.")
    try:
        return readers[file.suffix](file)
    except (OSError, EOFError, csv.Error, ValueError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{str(file)!r} cannot be read: {error}") from error


def _read_csv(file: Path) -> dict[str, np.ndarray]:
    with file.open(newline="", encoding="utf8") as opened:
        lines = csv.reader(opened)
        names = [name.strip() for name in next(lines, [])]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConversionError(f"{str(file)!r} has more than one column {', '.join(twice)}.")
        rows = []
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(names):
                raise ConversionError(
                    f"Line {lines.line_num} of {str(file)!r} has {len(cells)} cells, the line of "
                    f"names has {len(names)}."
                )
            rows.append(cells)
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise ConversionError(f"{str(file)!r} is one array, no .npz file of arrays by name.")
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def matrix(table: dict[str, np.ndarray], names: Sequence[str]) -> Tensor:
    """The named columns beside each other (N, width), in float64.

    Raises:
        ConversionError: a name is unknown, lengths differ, or a value is no number.
    """
    parts = []
    for name in names:
        if name not in table:
            raise ConversionError(f"There is no column {name!r}; there are {', '.join(table)}.")
        values = table[name]
        try:
            if values.dtype.kind == "c":
                raise ValueError("complex ones")
            values = values.astype(np.float64)
        except ValueError as error:
            raise ConversionError(
                f"Column {name!r} holds something else than numbers: {error}."
            ) from error
        if values.ndim not in (1, 2):
            raise ConversionError(
                f"Array {name!r} has the shape {values.shape}; it must have one or two axes."
            )
        parts.append(values if values.ndim == 2 else values[:, None])
    lengths = {name: len(part) for name, part in zip(names, parts, strict=True)}
    if len(set(lengths.values())) > 1:
        raise ConversionError(f"Columns of different lengths cannot be put together: {lengths}.")
    return torch.from_numpy(np.concatenate(parts, 1))


def describe(model: GaussianMoEModel) -> str:
    """The components, one a line, with the last one's gate at zero where that is free."""
    mixture = model.mixture().map(lambda tensor: tensor.detach().double()).anchored()
    lines = [f"temperature {model.temperature:.4g}"]
    for i in range(model.config.num_components):
        values = {
            "beta1": mixture.slopes[i],
            "beta0": mixture.biases[i],
            "A": mixture.coefficients[i],
            "b": mixture.intercepts[i],
            "nu": mixture.covariances[i],
        }
        told = "; ".join(f"{name} {_numbers(value)}" for name, value in values.items())
        lines.append(f"component {i}: {told}")
    return "\n".join(lines)


def _numbers(values: Tensor) -> str:
    if values.ndim == 2:
        return " / ".join(map(_numbers, values))
    return " ".join(f"{value:.4g}" for value in values.reshape(-1).tolist())


def fit(arguments: argparse.Namespace) -> None:
    """Read, fit, save, and print the components.

    Raises:
        ConversionError: something that the user gave cannot work.
    """
    output: Path = arguments.output
    check_output(
        output,
        overwrite=arguments.overwrite,
        source_name=str(arguments.data),
        replaceable=lambda folder: (folder / "config.json").exists(),
    )
    table = read_table(arguments.data)
    x, y = matrix(table, arguments.x), matrix(table, arguments.y)
    try:
        model = GaussianMoEModel(
            GaussianMoEConfig(
                input_size=x.shape[1],
                output_size=y.shape[1],
                num_components=arguments.components,
                activation=arguments.activation,
                temperature=arguments.temperature,
                learn_temperature=arguments.learn_temperature,
                min_deviation=arguments.min_deviation,
            )
        )
        schedule = None
        if arguments.final_temperature is not None:
            schedule = TemperatureSchedule(
                arguments.temperature, arguments.final_temperature, share=0.5
            )
        report = fit_em(
            model,
            x,
            y,
            restarts=arguments.restarts,
            steps=arguments.steps,
            schedule=schedule,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise ConversionError(str(error)) from error
    with whole_or_nothing(output) as folder:
        model.save_pretrained(folder)
    print(describe(model))
    end = "converged" if report.converged else "not converged; give more `--steps`"
    print(f"log-likelihood an observation: {report.log_likelihood:.6f} ({end})")
    print(f"saved in {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        fit(_parse(argv))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help=".csv or .npz file")
    add("--x", nargs="+", default=["x"], metavar="NAME", help="columns of x; default x")
    add("--y", nargs="+", default=["y"], metavar="NAME", help="columns of y; default y")
    add("--components", type=int, default=2, help="default 2")
    add("--activation", choices=tuple(ACTIVATIONS), default="linear", help="of the gate")
    add("--temperature", type=float, default=1.0, help="of the gate; default 1")
    add("--learn-temperature", action="store_true", help="fit it with the rest")
    add(
        "--final-temperature",
        type=float,
        help="let the temperature fall to this over the first half of the steps",
    )
    add("--min-deviation", type=float, default=1e-3, help="least deviation of a component")
    add("--restarts", type=int, default=10, help="k-means starts, of which the best is kept")
    add("--steps", type=int, default=500, help="of EM, at most")
    add("--seed", type=int, default=0)
    add("--output", required=True, type=Path, help="folder for the model")
    add("--overwrite", action="store_true", help="replace a model in the output folder")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    for name in ("temperature", "final_temperature", "min_deviation"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be a positive number, got {value}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
