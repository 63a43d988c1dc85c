"""Error of fitted parameters against sample size, for the plain and the activation gate.

    python -m benchmarks.gate_rates --work WORK --output benchmarks/results/gate_rates.json

An experiment of the kind of "Is Temperature Sample Efficient for Softmax Gaussian Mixture of
Experts?" by Nguyen, Akbarian and Ho, with a truth of ours: data from a mixture with d = p = 1 and
two components, x uniform; maximum likelihood with the temperature among the parameters, with two
components (exactly specified) and with three (over-specified); Voronoi loss
(`hf_vqlogits.gaussian_moe.voronoi`) over n.

A fit starts at the truth, one component doubled where it is over-specified, plus noise of
`START_NOISE` on every parameter, **the same at every n**, so that the start brings no rate of its
own. `EM_STEPS` of EM are followed by scoring until the likelihood gains nothing more: EM alone
needs thousands of steps where a component is fitted twice. All in float64.

In the plain gate (c beta1, c beta0, c tau) are the same gate for every c > 0, so the likelihood
says nothing about the scale. `scaled` gives the error of what it does determine: beta1 / tau,
beta0 / tau and the experts.

Every repetition is kept in `--work`, in a file of its own: after an interrupt the same command goes
on, and with more `--repetitions` or `--sizes` it adds to what is there.
"""

import argparse
import math
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_vqlogits.gates import LINEAR
from hf_vqlogits.gaussian_moe.em import em
from hf_vqlogits.gaussian_moe.mixture import TENSORS, Mixture
from hf_vqlogits.gaussian_moe.scoring import score_ascent
from hf_vqlogits.gaussian_moe.starts import perturbed
from hf_vqlogits.gaussian_moe.voronoi import VoronoiErrors, voronoi

from .gate_rates_plot import plot
from .log_log import describe, summarise
from .record import record, write
from .work_folder import WorkFolder

SIZES, REPETITIONS = 8, 40
QUICK_SIZES, QUICK_REPETITIONS = 3, 4
SMALLEST, LARGEST, QUICK_LARGEST = 10**2, 10**5, 10**3
HALF_RANGE = 3.0  # x is uniform on (-3, 3)
START_NOISE = 0.1
MIN_DEVIATION = 0.02  # the true ones are 0.5 and 0.6
EM_STEPS = 15
TOLERANCE = 1e-3  # nats of all observations: 5% of a standard error
TOGETHER = 200_000  # observations of all repetitions that are fitted at once
ACTIVATION = "gelu"
# Chosen by the Fisher information, so that n = 100 determines every parameter that any n does:
# with other slopes and temperatures the activation gate needs millions of observations for that.
TEMPERATURES = {LINEAR: 0.5, ACTIVATION: 0.15}


@dataclass(frozen=True)
class Setting:
    """A gate, with as many components as the truth or one more."""

    activation: str
    over: bool

    @property
    def name(self) -> str:
        """For file names and tables."""
        gate = "plain" if self.activation == LINEAR else self.activation
        return f"{gate}-{'over' if self.over else 'exact'}"


SETTINGS = [Setting(activation, over) for activation in TEMPERATURES for over in (False, True)]


def truth(activation: str) -> Mixture:
    """The mixture that the data come from, the last component's beta0 at zero.

    The plain gate's slopes are those of the other, to be compared up to a common shift.
    """

    def tensor(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Mixture(
        slopes=tensor(-1.2, 0.2)[:, None],
        biases=tensor(0.1, 0.0),
        log_temperature=tensor(TEMPERATURES[activation])[0].log(),
        coefficients=tensor(-1.0, 1.5)[:, None, None],
        intercepts=tensor(-1.0, 1.0)[:, None],
        factors=tensor(0.5, 0.6)[:, None, None],
        activation=activation,
    )


def doubled(mixture: Mixture) -> Mixture:
    """The same density with the first component twice, each with half of its weight."""
    order = torch.tensor([0, *range(len(mixture.biases))])
    half = math.log(2) * mixture.log_temperature.exp()
    more = {
        name: getattr(mixture, name)[order]
        for name in ("slopes", "biases", "coefficients", "intercepts", "factors")
    }
    more["biases"][:2] -= half
    return replace(mixture, **more)


def fit(setting: Setting, n: int, repetitions: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Draw data and fit, for several repetitions at once.

    Args:
        setting: gate and number of components.
        n: observations each.
        repetitions: their numbers, which with the seed decide data and start.
        seed: of all.

    Returns:
        For each repetition what is kept of it.
    """
    true = truth(setting.activation)
    around = doubled(true) if setting.over else true
    drawn = [_draw(true, around, n, f"{seed} {setting.name} {n} {one}") for one in repetitions]
    x, y = torch.stack([x for x, _, _ in drawn]), torch.stack([y for _, y, _ in drawn])
    starts = [start for _, _, start in drawn]
    tensors: dict[str, Any] = {
        name: torch.stack([getattr(one, name) for one in starts]) for name in TENSORS
    }
    start = replace(around, **tensors)
    options: dict[str, Any] = {"min_deviation": MIN_DEVIATION, "learn_temperature": True}
    first = em(start, x, y, steps=EM_STEPS, tolerance=0.0, **options).mixture
    result = score_ascent(first, x, y, tolerance=TOLERANCE, **options)
    fitted, true_density = result.mixture, true.log_density(x, y).mean(-1)
    measured = {"raw": voronoi(fitted, true)}
    begun = {"raw": voronoi(start, true)}
    if setting.activation == LINEAR:
        scaled = true.at_unit_temperature()
        measured["scaled"] = voronoi(fitted.at_unit_temperature(), scaled)
        begun["scaled"] = voronoi(start.at_unit_temperature(), scaled)
    least = fitted.factors.diagonal(dim1=-2, dim2=-1).amin((-2, -1))
    return [
        {
            **{kind: _errors(found, i) for kind, found in measured.items()},
            "start_loss": {kind: float(found.loss[i]) for kind, found in begun.items()},
            "gain_over_truth": float(result.log_likelihood[i] - true_density[i]) * n,
            "converged": bool(result.converged[i]),
            "at_floor": bool(least[i] < 1.01 * MIN_DEVIATION),
            "scoring_steps": len(result.history) - 1,
        }
        for i in range(len(repetitions))
    ]


def _draw(true: Mixture, around: Mixture, n: int, name: str) -> tuple[Tensor, Tensor, Mixture]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    x = (torch.rand(n, 1, generator=generator, dtype=torch.float64) * 2 - 1) * HALF_RANGE
    y = true.sample(x, generator)
    return x, y, perturbed(around, START_NOISE, generator)


def _errors(found: VoronoiErrors, index: int) -> dict[str, Any]:
    """Loss and the mean errors over cells that are exactly covered, and over-covered."""
    sizes = found.sizes[index]
    told: dict[str, Any] = {"loss": float(found.loss[index]), "sizes": sizes.tolist()}
    for kind, cells in (("exact", sizes == 1), ("over", sizes > 1)):
        told[kind] = {
            name: float(error[index][cells].mean()) if cells.any() else None
            for name, error in found.errors.items()
        }
    return told


def measure(
    setting: Setting, n: int, repetitions: int, seed: int, work: WorkFolder
) -> list[dict[str, Any]]:
    """All repetitions at one sample size; those that the folder has not are made and kept."""
    names = {one: f"{setting.name}-{n}-{one}" for one in range(repetitions)}
    missing = [one for one, name in names.items() if not work.has(name)]
    size = max(1, TOGETHER // n)
    for begin in range(0, len(missing), size):
        group = missing[begin : begin + size]
        for one, result in zip(group, fit(setting, n, group, seed), strict=True):
            work.result(names[one], lambda result=result: result)  # type: ignore[misc]
    return [work.result(name, dict) for name in names.values()]


def quantities(setting: Setting) -> Iterator[tuple[str, str, str, float | None]]:
    """What is reported of a setting.

    Yields:
        Its name, the kind of parameters, where it is in a result, and the rate that theory expects;
        None where it expects no polynomial one.
    """
    plain = setting.activation == LINEAR
    yield "Voronoi loss", "raw", "loss", None if plain else -0.5
    yield "temperature", "raw", "exact.temperature", None if plain else -0.5
    yield "gate slopes", "raw", "exact.slopes", None if plain else -0.5
    kind = "raw"
    if plain:
        kind = "scaled"
        yield "Voronoi loss, scaled", kind, "loss", -0.5
        yield "gate slopes, scaled", kind, "exact.slopes", -0.5
    yield "expert coefficients", kind, "exact.coefficients", -0.5
    if setting.over:
        # The plain gate's slopes interact with b as much as b with nu, see voronoi.py.
        yield "gate slopes, twice fitted", kind, "over.slopes", -0.125 if plain else -0.25
        yield "coefficients, twice fitted", kind, "over.coefficients", -0.25
        yield "intercepts, twice fitted", kind, "over.intercepts", -0.125
        yield "variances, twice fitted", kind, "over.covariances", -0.25


def _value(result: dict[str, Any], kind: str, place: str) -> float | None:
    found: Any = result[kind]
    for key in place.split("."):
        found = found[key]
    return found if found is None else float(found)


def rows(found: dict[tuple[Setting, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each quantity of each setting, with points and slopes."""
    settings = list(dict.fromkeys(setting for setting, _ in found))
    sizes = sorted({n for _, n in found})
    told = []
    for setting in settings:
        for name, kind, place, expected in quantities(setting):
            errors = {
                n: [_value(result, kind, place) for result in found[setting, n]] for n in sizes
            }
            told.append(
                {
                    "setting": setting.name,
                    "quantity": name,
                    "expected_slope": expected,
                    **summarise(errors),
                }
            )
    return told


def checks(found: dict[tuple[Setting, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each setting and size how the fits ended, and where they began."""
    told = []
    for (setting, n), results in found.items():
        kinds = results[0]["start_loss"]
        told.append(
            {
                "setting": setting.name,
                "n": n,
                "repetitions": len(results),
                "converged": sum(result["converged"] for result in results),
                "at_floor": sum(result["at_floor"] for result in results),
                "below_truth": sum(result["gain_over_truth"] < 0 for result in results),
                "mean_start_loss": {
                    kind: float(np.mean([result["start_loss"][kind] for result in results]))
                    for kind in kinds
                },
            }
        )
    return told


COLUMNS = {
    "median": "slope of medians (95%)",
    "median_large_n": "upper half of n",
    "mean": "slope of means (95%)",
    "mean_large_n": "upper half of n",
}


def report(told: Sequence[dict[str, Any]]) -> Table:
    """The slopes as a table for the terminal."""
    table = Table("setting", "error of", "expected", *COLUMNS.values())
    for row in told:
        expected = row["expected_slope"]
        cells = [describe(row["slopes"][kind]) for kind in COLUMNS]
        rate = "none" if expected is None else f"{expected:g}"
        table.add_row(row["setting"], row["quantity"], rate, *cells)
    return table


def sample_sizes(count: int, largest: int) -> list[int]:
    """Evenly spread on a logarithmic axis, from `SMALLEST`."""
    return [round(n) for n in np.geomspace(SMALLEST, largest, count)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--quick", action="store_true", help="few small samples; figures mean nothing")
    p.add_argument("--sizes", type=int, help=f"numbers of sample sizes; default {SIZES}")
    p.add_argument("--repetitions", type=int, help=f"at each; default {REPETITIONS}")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", type=Path, required=True, help="folder for what is done")
    p.add_argument("--output", type=Path, required=True, help="JSON; the plot stands beside it")
    options = p.parse_args(argv)
    count = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    repetitions = options.repetitions or (QUICK_REPETITIONS if options.quick else REPETITIONS)
    if count < 2 or repetitions < 2:
        p.error("--sizes and --repetitions must be at least 2: a slope with a band needs both")
    sizes = sample_sizes(count, QUICK_LARGEST if options.quick else LARGEST)
    try:
        work = WorkFolder(options.work, _settings(options.seed))
    except ValueError as error:
        p.error(f"--work: {error}")
    found = {}
    for setting in SETTINGS:
        for n in sizes:
            began = time.perf_counter()
            found[setting, n] = measure(setting, n, repetitions, options.seed, work)
            print(f"{setting.name}, n = {n:,}: {time.perf_counter() - began:.1f} s", flush=True)
    told = rows(found)
    write(
        record(
            "gate_rates",
            sizes=sizes,
            repetitions=repetitions,
            **_settings(options.seed),
            rows=told,
            checks=checks(found),
        ),
        options.output,
    )
    plot(told, options.output.with_suffix(".png"))
    Console(width=170).print(report(told))
    return 0


def _settings(seed: int) -> dict[str, Any]:
    """All that a repetition depends on beside its name."""
    return {
        "seed": seed,
        "half_range": HALF_RANGE,
        "start_noise": START_NOISE,
        "min_deviation": MIN_DEVIATION,
        "em_steps": EM_STEPS,
        "tolerance": TOLERANCE,
        "truth": {
            activation: {
                "slopes": truth(activation).slopes.flatten().tolist(),
                "biases": truth(activation).biases.tolist(),
                "temperature": temperature,
                "coefficients": truth(activation).coefficients.flatten().tolist(),
                "intercepts": truth(activation).intercepts.flatten().tolist(),
                "deviations": truth(activation).factors.flatten().tolist(),
            }
            for activation, temperature in TEMPERATURES.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
