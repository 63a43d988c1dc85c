"""Checks of a checkpoint while it is loaded: what is damaged is named, never filled in silently."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from .nested import check_stored

# Statistics of the calibration text, of use to `to_dense` only: zero where a checkpoint lacks them.
OPTIONAL_TENSORS = [r"^lm_head\.hidden_mean$", r"^lm_head\.fold_direction$"]
LISTED = 5  # names, in a message

# Of `from_pretrained`, where the configuration is looked for.
PLACE = (
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token"),
)


def as_stored(
    path: str | os.PathLike[str] | None,
    kwargs: dict[str, Any],
    config_class: Any,
    *,
    refuse_others: bool,
) -> tuple[dict[str, Any], int | None]:
    """Arguments of `from_pretrained` that load the head as the checkpoint has it.

    Rows of codes lie side by side in a file, so that a smaller head inside is read with the whole.

    Args:
        path: of the checkpoint.
        kwargs: the arguments; the size asked for is in `num_codebooks`, or in a `config` into which
            the Auto classes have put it.
        config_class: of the model.
        refuse_others: refuse sizes that are not stored; else they change nothing here.

    Returns:
        The arguments, and the size that the model is to be cut to, or None.

    Raises:
        ValueError: no head of the size asked for is stored; names those that are.
    """
    config: Any = kwargs.get("config")
    has_config = isinstance(config, PreTrainedConfig)
    asked = getattr(config, "num_codebooks", None) if has_config else kwargs.get("num_codebooks")
    if path is None or asked is None:
        return kwargs, None
    try:
        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        stored = config_class.from_pretrained(path, **place)
    except OSError:
        return kwargs, None  # weights without a configuration, to which a given one belongs
    if refuse_others:
        sizes = [*stored.nested_codebooks, stored.num_codebooks]
        check_stored(asked, sizes, f"the checkpoint {str(path)!r}")
    if asked not in stored.nested_codebooks:
        return kwargs, None
    kwargs = {name: value for name, value in kwargs.items() if name != "num_codebooks"}
    if has_config:
        kwargs["config"] = config = copy.deepcopy(config)
        config.num_codebooks = stored.num_codebooks
        config.nested_codebooks = stored.nested_codebooks
    return kwargs, asked


@contextmanager
def readable_file_errors(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn the reader's error about a damaged file into one that names the checkpoint.

    Raises:
        ValueError: a weight file is truncated or not safetensors.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"A weight file of the checkpoint {str(path)!r} is truncated or damaged ({error}); "
            "copy or convert it again."
        ) from error


def refuse_mismatched(
    path: str | os.PathLike[str] | None, mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    """Refuse a checkpoint whose tensors have other shapes than its configuration says.

    Args:
        path: of the checkpoint, for the message.
        mismatched: names of tensors, with their shape in the file and in the model.

    Raises:
        ValueError: names the tensors and shapes.
    """
    named = [
        f"{name} is {tuple(there)} instead of {tuple(here)}"
        for name, there, here in sorted(mismatched)
    ]
    if named:
        raise ValueError(
            f"The tensors of the checkpoint {str(path)!r} contradict its config.json, they belong "
            f"to different models: {listed(named)}."
        )


def refuse_incomplete(
    path: str | os.PathLike[str] | None,
    missing: Iterable[str],
    *,
    only: tuple[str, ...] = ("",),
    kind: str = "a VQ-Logits checkpoint",
    remedy: str = "Convert the original model with `convert_to_vq`.",
) -> None:
    """Refuse a checkpoint that lacks tensors.

    Transformers would initialise them at random with a warning, and the model would talk nonsense.

    Args:
        path: of the checkpoint, for the message.
        missing: names of the tensors that the model has and the checkpoint has not.
        only: beginnings of the names that count: quantised bodies have tensors that no checkpoint
            holds.
        kind: what the checkpoint should be, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: names the tensors.
    """
    names = sorted(name for name in missing if name.startswith(only))
    if names:
        raise ValueError(
            f"The checkpoint {str(path)!r} lacks {listed(names)}: it is incomplete, or it is not "
            f"{kind}. {remedy}"
        )


def refuse_unexpected(
    path: str | os.PathLike[str] | None, unexpected: Iterable[str], *, only: tuple[str, ...]
) -> None:
    """Refuse a checkpoint whose coded parts have more tensors than its configuration says.

    Transformers would leave them out with a warning, and the logits would be others.

    Args:
        path: of the checkpoint, for the message.
        unexpected: names of the tensors that the checkpoint has and the model has not.
        only: beginnings of the names that count.

    Raises:
        ValueError: names the tensors.
    """
    names = sorted(name for name in unexpected if name.startswith(only))
    if names:
        raise ValueError(
            f"The checkpoint {str(path)!r} holds {listed(names)}, of which its config.json knows "
            "nothing: they belong to different models."
        )


def listed(names: Iterable[str]) -> str:
    """Names in order, of many the first `LISTED` and how many more there are."""
    named = sorted(names)
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return ", ".join(named[:LISTED]) + more
