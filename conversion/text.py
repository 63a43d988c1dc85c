"""Text for calibration and evaluation: reading it, turning it into tokens, cutting it up."""

import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ConversionError

logger = logging.getLogger(__name__)

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
DEFAULT_CONFIGS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),  # the name before the hub had owners
    "Salesforce/wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
SUFFIXES = (".txt", ".gz")
STREAMED_BYTES = 1 << 30  # larger data sets are streamed rather than downloaded as a whole
READ_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 18
_DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Between two letters that a blank separates every pre-tokeniser in use begins a new word (GPT-2:
# ` ?\p{L}+`), so a cut there leaves the tokens as they are in the whole text. After a newline it
# need not: GPT-2 joins a newline with the blanks around it.
_WORD_START = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


def load_text(source: str, *, split: str = "train", max_characters: int | None = None) -> str:
    """Read a text as a whole.

    Args:
        source: see [`stream_text`].
        split: see [`stream_text`].
        max_characters: stop after about so many; None reads everything.

    Raises:
        ConversionError: see [`stream_text`]; or there is nothing but white space.
    """
    pieces, characters = [], 0
    for piece in stream_text(source, split=split):
        pieces.append(piece)
        characters += len(piece)
        if max_characters is not None and characters >= max_characters:
            break
    text = "".join(pieces)
    if not text or text.isspace():
        raise ConversionError(f"{source!r} has no text in it; give a source with English prose.")
    return text


def stream_text(source: str, *, split: str = "train") -> Iterator[str]:
    """Read a text piece by piece.

    Args:
        source: a text file, a `.gz` of one, a folder (all `.txt` and `.gz` files in it, in the
            order of their names), or a data set of the `datasets` library as
            `name[:configuration[:split]]`, for example `Salesforce/wikitext:wikitext-2-raw-v1`.
            What exists as a file or folder is never looked for as a data set.
        split: of a data set whose `source` names none.

    Yields:
        Pieces of any length, which joined give the text.

    Raises:
        ConversionError: there is no such thing, it cannot be read or had, it is binary, or its
            columns leave open which is the text.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise ConversionError(
                f"The folder {source!r} has no {' or '.join(SUFFIXES)} files; put the text there."
            )
        return chain.from_iterable(map(_read_file, files))
    if source and path.exists():
        return _read_file(path)
    name, *rest = source.split(":")
    if path.suffix in SUFFIXES or len(rest) > 2 or not _DATASET_NAME.fullmatch(name):
        raise ConversionError(
            f"There is no file or folder {source!r}; give the path of a text, or a data set as "
            "name[:configuration[:split]]."
        )
    return _read_dataset(source, split)


def _read_file(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            while piece := file.read(READ_CHARACTERS):
                if "\0" in piece:
                    raise ConversionError(
                        f"{str(path)!r} is binary (it has NUL bytes), not text; give UTF-8 text."
                    )
                yield piece
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{str(path)!r} is not UTF-8 text ({error.reason}); convert it, or give another file."
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise ConversionError(f"{str(path)!r} cannot be read: {error}.") from error


def _read_dataset(source: str, split: str) -> Iterator[str]:
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    name, config, named_split = (*source.split(":"), "", "")[:3]
    name, default_config = DEFAULT_CONFIGS.get(name, (name, None))
    chosen = config or default_config
    try:
        size = load_dataset_builder(name, chosen).info.download_size or 0
        streaming = size > STREAMED_BYTES
        rows = load_dataset(name, chosen, split=named_split or split, streaming=streaming)
        column = None
        for row in rows:
            column = column or _text_column(row, source)
            line = row[column] or ""
            yield line if line.endswith("\n") else line + "\n"
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConversionError(
            f"There is no file {source!r}, and as a data set it cannot be had: {reason}. Check the "
            "name and the connection to the hub, or give a text file."
        ) from error


def _text_column(row: dict[str, object], source: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings or row.get("text", 0) is None:  # no text in the first row only
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ConversionError(
        f"The data set {source!r} has no column `text`, and which of its columns is the text is "
        f"not clear: {', '.join(row) or 'none'}. Give a data set with a column `text`, or a file."
    )


def builtin_english_text() -> str:
    """About 700 kB of English that every CPython carries: the topics of its `help()`.

    Raises:
        ConversionError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConversionError(
            "This Python lacks its own documentation (`pydoc_data`); give a text file instead."
        ) from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def split_lines(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text in two between lines, for calibration and a held-out rest.

    Args:
        text: any.
        fraction: share of the lines in the first part, in (0, 1).

    Returns:
        The two parts; joined they are the text.

    Raises:
        ConversionError: there are too few lines for two parts.
    """
    lines = text.count("\n") + bool(text and not text.endswith("\n"))
    first = int(lines * fraction)
    if not 0 < first < lines:
        raise ConversionError(
            f"A text of {lines} lines cannot be split into {fraction:.0%} and a held-out "
            "rest; give evaluation text of its own, or text with more lines."
        )
    end = 0
    for _ in range(first):
        end = text.index("\n", end) + 1
    return text[:end], text[end:]


def tokenize(
    texts: str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> Tensor:
    """Token ids of a text of any length, without special tokens.

    The tokenizer sees pieces of a quarter of a million characters, cut where a new word begins, so
    memory does not grow with the text and reading stops when there are enough tokens.

    Args:
        texts: the text, or pieces of it as from [`stream_text`].
        tokenizer: of the model.
        max_tokens: how many to return at most.

    Returns:
        int64 (tokens,).
    """
    ids: list[Tensor] = []
    count = 0
    for piece in _pieces([texts] if isinstance(texts, str) else texts):
        # `verbose=False`: nothing is wrong with a text longer than the model's context here.
        found = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(torch.tensor(found, dtype=torch.int64))
        count += len(found)
        if max_tokens is not None and count >= max_tokens:
            break
    return torch.cat([torch.empty(0, dtype=torch.int64), *ids])[:max_tokens]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > PIECE_CHARACTERS:
            end = _cut(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _cut(text: str) -> int:
    """Last place near `PIECE_CHARACTERS` where a word, else a line begins."""
    words = list(_WORD_START.finditer(text, PIECE_CHARACTERS // 2, PIECE_CHARACTERS))
    if words:
        return words[-1].start()
    return text.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that a tokenizer puts before every text by default, `<bos>` for example.

    Models trained with them (Gemma) give hidden states without sense to texts that lack them.

    Args:
        tokenizer: of the model.

    Returns:
        Their ids in order; empty for tokenizers that put none (GPT-2, SmolLM2).
    """
    text = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    starts = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[: next(starts, 0)]


def blocks(
    ids: Tensor, context: int, *, prefix: Sequence[int] = (), name: str = "The text"
) -> Tensor:
    """Cut token ids into contexts side by side, each behind a prefix where one is given.

    Row i is ids[i * context : (i + 1) * context + 1]; behind p tokens of a prefix, with n =
    context + 1 - p, it is ids[i * n : (i + 1) * n]. Every token (without a prefix all but the
    first) is the label of exactly one position, up to a last incomplete row, which is dropped.

    Args:
        ids: (tokens,).
        context: positions of a row.
        prefix: tokens that begin each row, from [`prefix_ids`]; the first p - 1 labels of a row
            are of the prefix itself and do not count.
        name: of the text, for the error.

    Returns:
        (rows, context + 1); without a prefix a view of `ids`.

    Raises:
        ConversionError: there is not one whole row, or no room in it beside the prefix.
    """
    size = context + 1 - len(prefix)
    if size < 1:
        raise ConversionError(
            f"A context of {context} tokens has no room for text after the {len(prefix)} that the "
            "tokenizer puts before every text."
        )
    if len(ids) < size:
        raise ConversionError(
            f"{name} has {len(ids):,} tokens, but at least {size:,} (one context"
            f"{'' if prefix else ' and the token after it'}) are needed; give more text."
        )
    if not prefix:
        return ids.unfold(0, size, context)
    rows = ids.unfold(0, size, size)
    return torch.cat([ids.new_tensor(prefix).expand(len(rows), -1), rows], 1)


@torch.no_grad()
def sample_token_ids(
    model: PreTrainedModel,
    *,
    tokens: int,
    context: int,
    prefix: Sequence[int] = (),
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Let a model write text: sampling at temperature 1 from its whole distribution.

    As in data-free quantisation of language models (LLM-QAT, Liu et al. 2023), each row starts
    with a token drawn at random, so that the rows differ from the start, and what a model would
    begin a chat with does not dominate. An end-of-text token does not end a row.

    Args:
        model: any causal language model.
        tokens: how many to write at least.
        context: tokens of a row after the first.
        prefix: p tokens before the random one, from [`prefix_ids`]; they take the place of as many
            of the `context`.
        batch_size: rows at a time.
        seed: the same seed gives the same text; the global generator is left as it was.
        progress: show a bar.

    Returns:
        int64 (rows, context + 1) on the CPU, rows = ceil(tokens / (context - p)).

    Raises:
        ConversionError: the prefix leaves no room to write.
    """
    written = context - len(prefix)  # tokens of a row
    if written < 1:
        raise ConversionError(
            f"A context of {context} tokens has no room to write after the {len(prefix)} that the "
            "tokenizer puts before every text."
        )
    rows = -(-tokens // written)
    vocabulary = model.config.get_text_config().vocab_size
    own_config = model.generation_config
    generate: Any = model.generate  # of a mix-in that the base class does not declare
    device = model.device
    done = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = torch.randint(vocabulary, (rows, 1))
        start = torch.cat([start.new_tensor(prefix).expand(rows, -1), start], 1).to(device)
        # `generate` fills what a call leaves open from the model's own settings (top_p, penalties,
        # end-of-text), none of which may bend the distribution here.
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=written
        )
        try:
            with tqdm(total=rows * written, desc="writing", disable=not progress) as bar:
                for batch in start.split(batch_size):
                    mask = torch.ones_like(batch)
                    done.append(generate(batch, attention_mask=mask).cpu())
                    bar.update(len(batch) * written)
        finally:
            model.generation_config = own_config
    return torch.cat(done)
