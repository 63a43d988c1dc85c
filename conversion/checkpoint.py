"""Writing a converted model so that the output folder appears whole or not at all."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM

from .errors import ConversionError
from .source import Source

TOKEN_BYTES = 200  # of a tokenizer's files, for a token; Llama 3 and Gemma 3 take 130
OTHER_BYTES = 1_000_000  # configuration, report, card and plot
FULL = (errno.ENOSPC, errno.EDQUOT)
ONLY_WRITING = (*FULL, errno.EFBIG, errno.EROFS)  # what reading never meets


def _is_conversion(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == VQLogitsConfig.model_type


def check_output(
    output: Path,
    *,
    overwrite: bool,
    source_name: str,
    replaceable: Callable[[Path], bool] = _is_conversion,
) -> None:
    """Check, before hours of work, that the output folder may be written.

    Args:
        output: folder to be made.
        overwrite: what `replaceable` accepts may be replaced.
        source_name: folder or hub name of the source.
        replaceable: whether what lies at `output` may be deleted; default earlier conversions.

    Raises:
        ConversionError: the folder exists and must not be replaced, is the source itself or holds
            it, or cannot be made where it would lie.
    """
    try:
        if output.exists():
            _check_replaceable(output, replaceable, overwrite=overwrite, source_name=source_name)
            needed = [_real(output), _real(output).parent]
        else:
            needed = [_folder_to_be_in(output)]
    except OSError as error:
        raise ConversionError(
            f"The output {str(output)!r} cannot be used: {error.strerror}. Choose another."
        ) from error
    for folder in needed:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConversionError(f"The folder {str(folder)!r} cannot be written; choose another.")


def _check_replaceable(
    output: Path, replaceable: Callable[[Path], bool], *, overwrite: bool, source_name: str
) -> None:
    if source_name and Path(source_name).exists():
        source = _real(Path(source_name))
        if _real(output) in (source, *source.parents):
            raise ConversionError(
                f"The output {str(output)!r} is the source model's own folder, or holds it; choose "
                "another."
            )
    if not overwrite:
        raise ConversionError(
            f"The output {str(output)!r} exists; choose another with `--output`, or replace it "
            "with `--overwrite`."
        )
    if not replaceable(output):
        raise ConversionError(
            f"{str(output)!r} is not the output of an earlier conversion, so `--overwrite` does "
            "not delete it; remove it yourself or choose another folder."
        )


def _folder_to_be_in(output: Path) -> Path:
    """The folder that exists and in which the output and its missing parents can be made."""
    nearest = _nearest(output.absolute())
    if nearest.is_symlink() and not nearest.exists():
        raise ConversionError(
            f"The output {str(output)!r} leads through the link {str(nearest)!r} to "
            f"{os.readlink(nearest)!r}, where nothing is; remove the link or choose another."
        )
    if not nearest.is_dir():
        raise ConversionError(
            f"The output {str(output)!r} would lie in {str(nearest)!r}, which is no folder; choose "
            "another."
        )
    return nearest


def check_room(output: Path, needed_bytes: int) -> None:
    """Check that the disk has room for the output.

    Raises:
        ConversionError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(_nearest(_real(output).parent)).free
    if needed_bytes > free:
        raise ConversionError(
            f"No room on the disk of {str(output)!r}: {needed_bytes / 1e6:.0f} MB are needed, "
            f"{free / 1e6:.0f} MB are free. Free some space or choose another folder."
        )


def output_bytes(backbone: torch.nn.Module, other_bytes: int, source: Source) -> int:
    """About how much the output will take, rather more than less.

    Args:
        backbone: of the source.
        other_bytes: of the tensors of the head; with a quantised input embedding also its own,
            less those of the table that goes.
        source: the original.
    """
    tensors = {id(t): t for t in (*backbone.parameters(), *backbone.buffers())}.values()
    tokens = 0 if source.tokenizer is None else len(source.tokenizer)
    carried = sum(path.stat().st_size for path in source.files.values())
    weights = sum(t.numel() * t.element_size() for t in tensors) + other_bytes
    return weights + carried + tokens * TOKEN_BYTES + OTHER_BYTES


@contextmanager
def whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    After an error or an interrupt nothing is left behind, and an earlier `output` is untouched.
    Where `output` is a link, what it names is replaced and the link stays. What another program
    puts at `output` during the block is never deleted.

    Raises:
        ConversionError: the disk filled up, or the system refused to write for another reason;
            something has appeared at `output`; a file elsewhere that the block needs failed.
    """
    output = _real(output)
    replace = os.path.lexists(output)
    scratch = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Cut, since the whole name and more could be longer than a file system allows.
        prefix = f".{output.name[:40]}.partial-"
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        new = scratch / "new"
        new.mkdir()  # that of `mkdtemp` is private
        yield new
        _put_in_place(new, output, scratch / "earlier", replace=replace)
    except Exception as error:
        code = _system_error(error)
        if code is None:
            raise
        left = "nothing was left behind"
        if scratch is not None and _unfinished(output, scratch / "earlier"):
            left = f"the earlier output is in {str(scratch / 'earlier')!r}; move it back"
        # Before there is a scratch folder, only the output's own parents have been touched.
        if scratch is None or _is_of_output(error, code, (scratch, output)):
            if code in FULL:
                raise ConversionError(
                    f"The disk filled up while {str(output)!r} was written; {left}. Free some "
                    "space and run again."
                ) from error
            raise ConversionError(
                f"The output {str(output)!r} cannot be written: {os.strerror(code)}; {left}. "
                "Choose another folder with `--output`."
            ) from error
        names = _file_names(error)
        if not names:
            raise
        raise ConversionError(
            f"While {str(output)!r} was written, {' or '.join(repr(str(n)) for n in names)} "
            f"failed: {os.strerror(code)}; {left}. Mend that and run again."
        ) from error
    finally:
        if scratch is not None and not _unfinished(output, scratch / "earlier"):
            shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(new: Path, output: Path, earlier: Path, *, replace: bool) -> None:
    """Rename `new` to `output`; where that is not finished, what was there comes back."""
    if not replace and os.path.lexists(output):
        raise ConversionError(
            f"Something else has made {str(output)!r} since the writing began; it was left as it "
            "is. Choose another folder with `--output`, or remove it, and run again."
        )
    try:
        if output.exists():
            os.replace(output, earlier)
        os.replace(new, output)
    finally:
        if _unfinished(output, earlier):
            os.replace(earlier, output)


def _unfinished(output: Path, earlier: Path) -> bool:
    return earlier.exists() and not output.exists()


def _system_error(error: Exception) -> int | None:
    """The operating system's number of an error, None for an error of another kind.

    safetensors and tokenizers, written in Rust, raise types of their own, or a bare `Exception`,
    with the number in the text.
    """
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])


def _is_of_output(error: Exception, code: int, folders: tuple[Path, ...]) -> bool:
    """Whether an error of the system's comes from writing into `folders`.

    A write to an open file names none, and neither do safetensors and tokenizers. A failed copy
    names both files, and only the number tells which of them is to blame.
    """
    names = _file_names(error)
    if not names:
        return code in (*ONLY_WRITING, errno.EIO)
    inside = [any(path.is_relative_to(folder) for folder in folders) for path in names]
    return all(inside) or (any(inside) and code in ONLY_WRITING)


def _file_names(error: Exception) -> list[Path]:
    """None, one or two; numbers of open files, which Python gives as well, say nothing."""
    names = (getattr(error, "filename", None), getattr(error, "filename2", None))
    return [Path(os.fsdecode(n)) for n in names if isinstance(n, str | bytes | os.PathLike)]


def write_checkpoint(folder: Path, model: VQLogitsForCausalLM, source: Source) -> None:
    """Write model, tokenizer, chat template and generation configuration into `folder`.

    What the source has as files is carried over byte for byte.
    """
    model.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    for name, path in source.files.items():
        shutil.copyfile(path, folder / name)


def _real(path: Path) -> Path:
    """The path without links; it need not exist."""
    return Path(os.path.realpath(path))


def _nearest(path: Path) -> Path:
    """The path itself where something is there, be it a link to nothing; else its next parent."""
    while True:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path
