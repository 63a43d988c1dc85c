"""Loading the model that is to be converted, and checking it before anything is computed."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from hf_vqlogits.loading import listed

from .errors import ConversionError
from .families import refuse_unsupported

logger = logging.getLogger(__name__)

# Files that a converted folder carries over byte for byte.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TELLING = (OSError, ValueError, RuntimeError, AssertionError, ImportError, StrictDataclassError)


@dataclass
class Source:
    """A model to convert.

    Attributes:
        name: what the user called it.
        model: the causal language model, in evaluation mode.
        tokenizer: its tokenizer, or None when a model object came without one.
        files: files of the source that are carried over unchanged, by name.
        hub_name: what the hub calls the model, or None where it did not come from there.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    files: dict[str, Path]
    hub_name: str | None = None

    @property
    def padded_tokens(self) -> int:
        """Rows of the output layer above the tokenizer's ids; some families pad."""
        if self.tokenizer is None:
            return 0
        return max(0, self.model.config.get_text_config().vocab_size - len(self.tokenizer))


def load_source(
    model_or_path: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Source:
    """Load model and tokenizer by hub name or folder, or take a loaded model, and check them.

    Args:
        model_or_path: hub name, folder, or a causal language model.
        tokenizer: for a model object.
        gguf_file: name of a GGUF file within the folder or repository.
        device: where to compute; default a GPU when there is one, for a model object where it is.
        dtype: type of the weights; default as stored.

    Raises:
        ConversionError: the device or type cannot be used, or the model cannot be had, lacks
            weights, is of an unsupported kind, has weights that are not finite, or does not fit its
            tokenizer.
    """
    check_device(device)
    check_dtype(dtype)
    if isinstance(model_or_path, PreTrainedModel):
        if gguf_file is not None:
            raise ConversionError("`gguf_file` needs a folder or hub name, not a loaded model.")
        model = model_or_path
        if dtype is not None:
            torch.nn.Module.to(model, check_dtype(dtype))
        name, files = model.config.name_or_path or type(model).__name__, {}
        hub_name = name if _is_in_cache(name) else None
        refuse_unsupported(model.config)
    else:
        name = os.fspath(model_or_path)
        hub_name = None if os.path.exists(name) else name
        model = _load_model(name, gguf_file, dtype)
        tokenizer = tokenizer or _load_tokenizer(name, gguf_file)
        files = {} if gguf_file else dict(_carried_files(name))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        torch.nn.Module.to(model, device)
    model = _dequantised(model)
    _check_finite(model)
    source = Source(name, model.eval(), tokenizer, files, hub_name)
    _check_tokenizer(source)
    return source


def _is_in_cache(name: str) -> bool:
    """Whether the local cache holds a model of this name from the hub.

    A model object tells the name that it was loaded by, which may as well be that of a folder, even
    one that is there no more.
    """
    try:
        return not os.path.exists(name) and isinstance(
            try_to_load_from_cache(name, "config.json"), str
        )
    except HFValidationError:
        return False


def check_device(device: str | torch.device | None) -> None:
    """Check that tensors can be made on the device.

    Raises:
        ConversionError: names the device and the reason.
    """
    if device is None:
        return
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        # There is no common type: a name is refused, a backend was not built in, a driver is not
        # there.
        raise ConversionError(
            f"`device` {str(device)!r} cannot be used: {_first_line(error)} Leave it out, or give "
            "'cpu' or a device of this machine."
        ) from error
    if found.type == "meta":
        raise ConversionError("`device` 'meta' holds no values to compute with; give 'cpu'.")


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of that name.

    Raises:
        ConversionError: it is none that a model can be computed in.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or found in DTYPES:
        return found
    raise ConversionError(
        f"`dtype` {str(dtype)!r} is no type that a model can be computed in; use float32, bfloat16 "
        "or float16."
    )


def _load_model(
    name: str, gguf_file: str | None, dtype: str | torch.dtype | None
) -> PreTrainedModel:
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    wanted = check_dtype(dtype) or "auto"
    if gguf_file is not None and dtype is None:
        wanted = torch.float32  # dequantised weights have no type of their own
    try:
        config = AutoConfig.from_pretrained(name, **extra)
        refuse_unsupported(config)
        # Other shapes are let pass and refused below: Transformers names them in a log only.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True, **extra
        )
    except ConversionError:
        raise
    except ImportError as error:
        raise ConversionError(f"Loading {name!r} needs a package: {_first_line(error)}") from error
    except Exception as error:
        # What a wrong field or a damaged file makes Transformers, PyTorch and safetensors raise has
        # no common type: ZeroDivisionError and EOFError are among it.
        reason = _first_line(error)
        if isinstance(error, UnpicklingError):  # its own text advises to run what the file holds
            reason = "a weights file is damaged or holds something else than tensors."
        raise ConversionError(
            f"The model {name!r} cannot be loaded: {reason} Give the name of a causal language "
            "model on the hub, or a folder with its config.json and weights."
        ) from error
    model, info = loaded
    _check_complete(name, info)
    if gguf_file is not None:
        # The weights are plain floats by now; with this entry `save_pretrained` would refuse.
        model.config.__dict__.pop("quantization_config", None)
        for attribute, plain in (("hf_quantizer", None), ("is_quantized", False)):
            setattr(model, attribute, plain)
    return model


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuse what Transformers would fill in with random values."""
    if info["missing_keys"]:
        raise ConversionError(
            f"The checkpoint {name!r} lacks {listed(info['missing_keys'])}, which would be random "
            "values. It is incomplete, or of a model without an output layer; give a complete "
            "causal language model."
        )
    shapes = (
        f"{tensor} is {tuple(there)} instead of {tuple(here)}"
        for tensor, there, here in info["mismatched_keys"]
    )
    if info["mismatched_keys"]:
        raise ConversionError(
            f"The weights of {name!r} contradict its config.json: {listed(shapes)}. They belong "
            "to different models; give a folder with files of one."
        )


def _load_tokenizer(name: str, gguf_file: str | None) -> PreTrainedTokenizerBase | None:
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
    except Exception as error:  # the tokenizers library raises nothing more special
        logger.warning("%s has no tokenizer that can be loaded: %s", name, _first_line(error))
        return None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Some classes load without their files, and know nothing but special tokens then.
        logger.warning("%s has no tokenizer: its vocabulary is missing.", name)
        return None
    return tokenizer


def _first_line(error: BaseException) -> str:
    """What an error says first, as a sentence; by the name of its type where it says too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A field's name stands before the colon, what is wrong with it in the next line.
    line = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if not line or not isinstance(error, TELLING):
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    return line if line.endswith((".", "!", "?")) else line + "."


def _carried_files(name: str) -> Iterator[tuple[str, Path]]:
    for file in CARRIED_FILES:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None:
            yield file, Path(path)


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None and getattr(model.config, "quantization_config", None) is None:
        return model
    try:
        model = model.dequantize()
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"{model.config.name_or_path!r} is itself quantised and cannot be dequantised here "
            f"({_first_line(error)}). Convert the original, unquantised model; its body can be "
            "quantised afterwards with `from_pretrained(..., quantization_config=...)`."
        ) from error
    model.config.__dict__.pop("quantization_config", None)
    return model


def _check_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            cause = "the checkpoint is damaged or its training diverged. Repair it first."
            if tensor.dtype == torch.float16:
                cause = "float16 ends at 65,504. Try `dtype` (`--dtype`) float32 or bfloat16."
            raise ConversionError(
                f"The weight {name!r} holds {count} values that are NaN or infinite; {cause}"
            )


def _check_tokenizer(source: Source) -> None:
    if source.tokenizer is None:
        return
    vocab_size = source.model.config.get_text_config().vocab_size
    highest = max(source.tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise ConversionError(
            f"The tokenizer has ids up to {highest}, but the model's vocabulary has {vocab_size} "
            "tokens: they do not belong together, or tokens were added without "
            "`resize_token_embeddings`."
        )
