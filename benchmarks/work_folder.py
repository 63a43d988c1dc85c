"""A folder that keeps what finished steps of a long benchmark made, so that none is done twice."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SETTINGS = "settings.json"


class WorkFolder:
    """Results by name, each in a file of its own that appears whole or not at all.

    Args:
        folder: made where it is missing.
        settings: all that results depend on beside their names.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if kept.exists():
            found = json.loads(kept.read_text(encoding="utf8"))
            if found != wanted:
                names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
                told = ", ".join(f"{n} {found.get(n)!r}, not {wanted.get(n)!r}" for n in names)
                raise ValueError(f"{str(folder)!r} is of other settings ({told}); name another.")
        else:
            self._write(kept, lambda partial: partial.write_text(json.dumps(wanted, indent=2)))

    def path(self, name: str) -> Path:
        """Where a file of this name stands."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the JSON result of this name is there."""
        return self.path(f"{name}.json").exists()

    def result(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON result, made where it is not there."""
        file = self.path(f"{name}.json")
        if not file.exists():
            text = json.dumps(make()) + "\n"
            self._write(file, lambda partial: partial.write_text(text, encoding="utf8"))
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
        return found

    def tensors(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Tensors, numbers and strings by name, made where they are not there."""
        file = self.path(f"{name}.pt")
        if not file.exists():
            made = make()
            self._write(file, lambda partial: torch.save(made, partial))
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    def _write(self, file: Path, write: Callable[[Path], Any]) -> None:
        partial = file.with_name(f".{file.name}.partial")
        write(partial)
        os.replace(partial, file)
