"""Writing a converted model so that the output folder appears whole or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM

from .errors import ConversionError
from .source import Source


def check_output(output: Path, *, overwrite: bool, source_name: str) -> None:
    """Check, before hours of work, that the output folder may be written.

    Args:
        output: folder to be made.
        overwrite: an earlier conversion there may be replaced.
        source_name: folder or hub name of the source.

    Raises:
        ConversionError: the folder exists and must not be replaced, is the source itself, or its
            parent cannot be written.
    """
    if output.exists() and Path(source_name).exists() and output.samefile(source_name):
        raise ConversionError(
            f"The output {str(output)!r} is the source model's own folder; choose another."
        )
    if output.exists():
        if not overwrite:
            raise ConversionError(
                f"The output {str(output)!r} exists; choose another with `--output`, or replace it "
                "with `--overwrite`."
            )
        if not _is_conversion(output):
            raise ConversionError(
                f"{str(output)!r} is not the output of an earlier conversion, so `--overwrite` "
                "does not delete it; remove it yourself or choose another folder."
            )
    parent = _existing_parent(output)
    if not os.access(parent, os.W_OK):
        raise ConversionError(f"The folder {str(parent)!r} cannot be written; choose another.")


def check_room(output: Path, needed_bytes: int) -> None:
    """Check that the disk has room for the output.

    Raises:
        ConversionError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(_existing_parent(output)).free
    if needed_bytes > free:
        raise ConversionError(
            f"No room on the disk of {str(output)!r}: {needed_bytes / 1e6:.0f} MB are needed, "
            f"{free / 1e6:.0f} MB are free."
        )


@contextmanager
def whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    After an error or an interrupt nothing is left behind, and an earlier `output` is untouched.

    Raises:
        ConversionError: the disk filled up.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())  # mkdtemp makes private folders
        if output.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
            os.replace(output, replaced)
            os.replace(partial, output)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, output)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConversionError(
                f"The disk filled up while {str(output)!r} was written; nothing was left behind. "
                "Free some space and run again."
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(folder: Path, model: VQLogitsForCausalLM, source: Source) -> None:
    """Write model, tokenizer, chat template and generation configuration into `folder`.

    What the source has as files is carried over byte for byte.
    """
    model.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    for name, path in source.files.items():
        shutil.copyfile(path, folder / name)


def _is_conversion(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == VQLogitsConfig.model_type


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
