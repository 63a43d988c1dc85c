"""The state of an interrupted distillation, in one file."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vqlogits import VQLogitsHead

from .errors import ConversionError


def fingerprint(
    head: VQLogitsHead,
    blocks: Tensor,
    steps: int,
    seed: int,
    learning_rate: float | None,
    frozen_bits: int,
) -> str:
    """What tells a run from others: the head it starts from, its text and its options."""
    digest = hashlib.sha256(repr((steps, seed, learning_rate, frozen_bits)).encode())
    for tensor in (*head.state_dict().values(), blocks):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_state_file(file: Path, steps: int | None) -> None:
    """Check, before hours of work, that a state could be written, and that none is overwritten.

    Raises:
        ConversionError: there are no steps to keep the state of, the folder cannot be written, or
            the file holds something else.
    """
    if steps == 0:
        raise ConversionError("`distill_state` keeps a distillation, but `distill_steps` is 0.")
    folder = file.absolute().parent
    if file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(
            f"`distill_state` {str(file)!r} must name a file in a folder that can be written."
        )
    if file.exists():
        _read(file)


def save_state(file: Path, key: str, state: dict[str, Any]) -> None:
    """Write the state so that the file is always whole.

    Raises:
        ConversionError: the file cannot be written.
    """
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
        with open(handle, "wb") as stream:
            torch.save({"key": key, "state": state}, stream)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # the latter from the writer within torch.save
        raise ConversionError(
            f"The state of the distillation cannot be written to {str(file)!r}: {error}. Free some "
            "space, or name another file."
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def load_state(file: Path, key: str) -> dict[str, Any] | None:
    """The state in the file; None where there is no file.

    Raises:
        ConversionError: the file is of another run, or damaged.
    """
    if not file.exists():
        return None
    found, state = _read(file)
    if found != key:
        raise ConversionError(
            f"{str(file)!r} is of another distillation (another model, text, size or option); "
            "remove it or name another file."
        )
    return state


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        content = torch.load(file, weights_only=True)
        return content["key"], content["state"]
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ConversionError(
            f"{str(file)!r} holds no state of a distillation; remove it or name another file."
        ) from error
