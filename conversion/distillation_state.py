"""The state of an interrupted distillation, in one file: that of each stage that has begun."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConversionError
from .sizes import HeadSize

HEAD, MIXTURE, END_TO_END, BODY = "head", "mixture", "end to end", "body"  # the stages, in order
FORMAT = "stages of a distillation"


def fingerprint(tensors: Iterable[Tensor], options: tuple[Any, ...]) -> str:
    """What tells a run from others: the tensors it starts from, its text and its options."""
    digest = hashlib.sha256(repr(options).encode())
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_state_file(file: Path, *steps: int | None) -> None:
    """Check, before hours of work, that a state could be written, and that none is overwritten.

    Args:
        file: of the state.
        steps: of each stage, as asked for; None for a default.

    Raises:
        ConversionError: there are no steps to keep the state of, the folder cannot be written, or
            the file holds something else.
    """
    if all(asked == 0 for asked in steps):
        raise ConversionError(
            f"`distill_state` {str(file)!r} keeps a distillation, but there are no steps to make; "
            "raise `distill_steps`, or leave it out."
        )
    folder = file.absolute().parent
    if file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(
            f"`distill_state` {str(file)!r} must name a file in a folder that can be written."
        )
    if file.exists():
        _read(file)


def state_files(sizes: Sequence[HeadSize], state_file: Path) -> dict[HeadSize, Path]:
    """Where the distillations of one head, or of several sizes of sign codes, are kept.

    Args:
        sizes: at least one.
        state_file: as asked for.

    Returns:
        Files by size: that one, or where there are several sizes one for each, with its bits behind
        the name.
    """
    if len(sizes) == 1:
        return {sizes[0]: state_file}
    name = state_file.name
    return {size: state_file.with_name(f"{name}.{size.num_codebooks}") for size in sizes}


def save_state(file: Path, stage: str, key: str, state: dict[str, Any]) -> None:
    """Write the state of a stage beside those of others, so that the file is always whole.

    Raises:
        ConversionError: the file cannot be written.
    """
    stages = {**(_read(file) if file.exists() else {}), stage: {"key": key, "state": state}}
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
        with open(handle, "wb") as stream:
            torch.save({FORMAT: stages}, stream)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # the latter from the writer within torch.save
        raise ConversionError(
            f"The state of the distillation cannot be written to {str(file)!r}: {error}. Free some "
            "space, or name another file."
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def load_state(file: Path, stage: str, key: str) -> dict[str, Any] | None:
    """The state of a stage in the file; None where there is no file, or only stages before it.

    Raises:
        ConversionError: the file is of another run, or damaged.
    """
    stages = _read(file) if file.exists() else {}
    if not stages or (stage != HEAD and stage not in stages):
        return None
    if stage not in stages or stages[stage]["key"] != key:
        raise ConversionError(
            f"{str(file)!r} is of another distillation (another model, text, size or option, or "
            "another number of threads or machine, whose fit has other digits); remove it or name "
            "another file."
        )
    return stages[stage]["state"]


def _read(file: Path) -> dict[str, Any]:
    try:
        stages: dict[str, Any] = torch.load(file, weights_only=True)[FORMAT]
        return {name: {"key": s["key"], "state": s["state"]} for name, s in stages.items()}
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ConversionError(
            f"{str(file)!r} holds no state of a distillation; remove it or name another file."
        ) from error
