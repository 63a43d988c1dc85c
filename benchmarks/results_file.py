"""A results file that several runs fill, each with its own rows: hours need not be spent at once.

Every row says by its `run` which entry of the file's `runs` (command, machine, versions) made it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .record import record, write


class ResultsFile:
    """Rows of this run, after those that the file holds already.

    Args:
        output: the file, which may not exist yet; rows in it are kept.
        benchmark: name of the module.
        packages: whose versions matter besides the usual ones.
        settings: all that rows depend on beside their own columns.

    Raises:
        ValueError: the file holds rows of other settings, or is none of this benchmark.
    """

    def __init__(
        self, output: Path, benchmark: str, *packages: str, settings: Mapping[str, Any]
    ) -> None:
        self._output = output
        wanted = {"benchmark": benchmark, **json.loads(json.dumps(settings))}
        self._result: dict[str, Any] = wanted | {"runs": [], "rows": []}
        if output.exists():
            self._result = self._read(wanted)
        self._run = record(benchmark, *packages)

    def _read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = json.loads(self._output.read_text(encoding="utf8"))
            known = {name: found[name] for name in found if name not in ("runs", "rows")}
            whole = isinstance(found["runs"], list) and isinstance(found["rows"], list)
        except (ValueError, TypeError, KeyError):
            known, whole = {}, False
        if not whole or known.get("benchmark") != wanted["benchmark"]:
            raise ValueError(
                f"{str(self._output)!r} holds no results of benchmarks.{wanted['benchmark']} to "
                "add to; move it away, or name another file."
            )
        if known != wanted:
            names = sorted(n for n in {*known, *wanted} if known.get(n) != wanted.get(n))
            told = ", ".join(f"{n} {known.get(n)!r}, not {wanted.get(n)!r}" for n in names)
            raise ValueError(
                f"{str(self._output)!r} is of other settings ({told}); move it away, or name "
                "another file."
            )
        return dict(found)

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """All rows, of former runs and of this one."""
        rows: Sequence[Mapping[str, Any]] = self._result["rows"]
        return rows

    def has(self, **columns: Any) -> bool:
        """Whether a row of these columns is there."""
        return any(columns.items() <= row.items() for row in self.rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, and write the file."""
        runs = self._result["runs"]
        if self._run not in runs:
            runs.append(self._run)
        run = runs.index(self._run)
        self._result["rows"] += [{**row, "run": run} for row in rows]
        partial = self._output.with_name(f".{self._output.name}.partial")
        write(self._result, partial)
        partial.replace(self._output)
