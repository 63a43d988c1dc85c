"""The token blocks that a conversion calibrates on, and those that it is judged by."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import ConversionError
from .hub import SECONDS, offline_unless_answered
from .source import Source
from .text import (
    WIKITEXT,
    blocks,
    load_text,
    prefix_ids,
    sample_token_ids,
    split_lines,
    tokenize,
)
from .wording import last_part

logger = logging.getLogger(__name__)

CONTEXT = 512
CALIBRATION_TOKENS = 100_000
EVALUATION_TOKENS = 25_000
LIMITS = ("max_position_embeddings", "max_seq_len")  # names of a family's longest context; MPT
SELF = "self"
SELF_TOKENS = 40_000  # what a model can write unasked: a few minutes on two cores
HELD_OUT = 0.2
OWN_TOKENS = 2_000  # a look at what the model writes: some ten seconds on two cores
OWN_CONTEXT = 64
# What `generate` of models that are made for more than text meets, where it lacks something.
CANNOT_WRITE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
CHARACTERS = 16  # read for each token wanted; prose has three to six


@dataclass
class Corpus:
    """Text of a conversion, as token ids.

    Attributes:
        calibration: (rows, context + 1).
        evaluation: (rows, context + 1), disjoint from it.
        calibration_source: what it is, for readers elsewhere: of a local path the last part.
        evaluation_source: likewise.
        notes: what the user should know about the choice.
        unscored: first labels of each evaluation row that are no text: the rest of a prefix of
            several tokens, and the random token that starts a row the model wrote.
        own: (rows, context + 1), some text that the model wrote, to compare the calibration text
            with; None where that is such text itself, or the model could not.
        own_unscored: likewise of `own`.
        kept_out: (rows, context + 1), calibration text that no fit sees, for what is to hold on
            other text; None where nothing was kept out.
    """

    calibration: Tensor
    evaluation: Tensor
    calibration_source: str
    evaluation_source: str
    notes: list[str]
    unscored: int = 0
    own: Tensor | None = None
    own_unscored: int = 0
    kept_out: Tensor | None = None

    @property
    def context(self) -> int:
        """Positions of a row."""
        return self.calibration.shape[1] - 1


def prepare_corpus(
    source: Source,
    *,
    calibration_data: str | os.PathLike[str] | None,
    calibration_tokens: int | None,
    eval_data: str | os.PathLike[str] | None,
    seed: int,
    show_progress: bool,
) -> Corpus:
    """Read, or let the model write, the text of a conversion.

    Of a long text only the beginning is read, `CHARACTERS` for each token wanted.

    Args:
        source: model and tokenizer.
        calibration_data: see [`convert_to_vq`].
        calibration_tokens: how many to use at most; of text that the model writes unasked, for
            want of any other, at most `SELF_TOKENS`. Default `CALIBRATION_TOKENS`, of text that
            the model writes `SELF_TOKENS`.
        eval_data: see [`convert_to_vq`].
        seed: of the model's own text.
        show_progress: show a bar while the model writes.

    Raises:
        ConversionError: a text cannot be had or is too short, there is no tokenizer to read it, or
            `calibration_tokens` is less than a row of it.
    """
    asked = None if calibration_data is None else os.fspath(calibration_data)
    held_name = None if eval_data is None else os.fspath(eval_data)
    context = min([CONTEXT, *(getattr(source.model.config, n, None) or CONTEXT for n in LIMITS)])
    notes: list[str] = []
    prefix = [] if source.tokenizer is None else prefix_ids(source.tokenizer)
    unscored = max(0, len(prefix) - 1)
    tokens = calibration_tokens or CALIBRATION_TOKENS
    characters = _characters(tokens, split=held_name is None)
    text = None if asked == SELF else _calibration_text(source, asked, characters, notes)
    held_text = None
    if held_name is not None:
        _check_apart(asked or WIKITEXT, held_name)
        most = CHARACTERS * EVALUATION_TOKENS
        held_text = load_text(held_name, split="test", max_characters=most)
    if text is None:
        tokens = calibration_tokens or SELF_TOKENS
        if asked is None:
            tokens = _own_tokens(tokens, notes)
        calibration, evaluation = _own_text(source, tokens, context, prefix, seed, show_progress)
        shown = read = "text written by the model itself"
    else:
        name = asked or WIKITEXT
        shown = read = _shown(name)
        _check_tokens(tokens, context, prefix, name)
        if len(text) >= characters:
            read = f"the first {len(text):,} characters of {shown}"
        if held_text is None:
            text, held_text = split_lines(text, 1 - HELD_OUT)
        calibration = _read(source, text, tokens, context, prefix, name)
    held_shown = _shown(held_name) if held_name else f"a held-out fifth of {read}"
    if held_text is not None:
        held_name = held_name or held_shown
        evaluation = _read(source, held_text, EVALUATION_TOKENS, context, prefix, held_name)
    else:
        unscored = len(prefix)
    own = None if text is None else _sample(source, min(OWN_CONTEXT, context), prefix, seed, notes)
    return Corpus(
        calibration, evaluation, shown, held_shown, notes, unscored, own, own_unscored=len(prefix)
    )


def _check_apart(name: str, held_name: str) -> None:
    """Refuse to judge by the calibration text; of data sets other splits are read unless named."""
    places = [Path(text).expanduser() for text in (name, held_name)]
    if all(place.exists() for place in places):
        same = places[0].samefile(places[1])
    else:
        same = name == held_name and name.count(":") > 1
    if same:
        raise ConversionError(
            f"`eval_data` {held_name!r} is the calibration text, by which no head can be judged; "
            "give other text, or leave it out: then a fifth of that text is kept for it."
        )


def _shown(name: str) -> str:
    """A text's name for readers elsewhere: of a file or folder the last part of its path."""
    return last_part(name) if Path(name).expanduser().exists() else name


def _characters(calibration_tokens: int, *, split: bool) -> int:
    """How much of the calibration text to read, where it is `split` for evaluation as well."""
    tokens = float(calibration_tokens)
    if split:
        tokens = max(tokens / (1 - HELD_OUT), EVALUATION_TOKENS / HELD_OUT)
    return math.ceil(CHARACTERS * tokens)


def _check_tokens(tokens: int, context: int, prefix: list[int], name: str) -> None:
    least = context + 1 - len(prefix)
    if tokens < least:
        raise ConversionError(
            f"`calibration_tokens` {tokens:,} is less than a row of {name}, a context of {context} "
            f"positions: at least {least:,} tokens are needed; give a larger number."
        )


def _own_tokens(tokens: int, notes: list[str]) -> int:
    """How many tokens the model writes where nobody asked for its text."""
    if tokens > SELF_TOKENS:
        notes.append(
            f"the model wrote {SELF_TOKENS:,} tokens, not {tokens:,}, as writing is slow; "
            "--calibration-data self makes it write as many as --calibration-tokens says"
        )
    return min(tokens, SELF_TOKENS)


def _calibration_text(
    source: Source, wanted: str | None, characters: int, notes: list[str]
) -> str | None:
    """The text asked for; without a wish WikiText-2, or None where the model must write it."""
    if wanted is not None:
        return load_text(wanted, max_characters=characters)
    if source.tokenizer is None:
        notes.append("there is no tokenizer, so the model wrote its own calibration text")
        return None
    with offline_unless_answered(WIKITEXT.split(":")[0]) as silent:
        try:
            return load_text(WIKITEXT, max_characters=characters)
        except ConversionError as error:
            why = f" (the hub did not answer within {SECONDS:.0f} s)" if silent else ""
            logger.warning("%s The model writes its own calibration text instead.", error)
            notes.append(
                f"WikiText-2 could not be had{why}, so the model wrote its own calibration and "
                "evaluation text; give --calibration-data for figures on real text"
            )
            return None


def _read(
    source: Source, text: str, tokens: int, context: int, prefix: list[int], name: str
) -> Tensor:
    if source.tokenizer is None:
        raise ConversionError(
            f"{source.name!r} has no tokenizer to read {name!r} with; give `tokenizer`, or "
            "`calibration_data` 'self'."
        )
    ids = tokenize(text, source.tokenizer, tokens)
    return blocks(ids, context, prefix=prefix, name=name)


def _own_text(
    source: Source, tokens: int, context: int, prefix: list[int], seed: int, show_progress: bool
) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation rows that the model wrote, at least one of each."""
    rows = sample_token_ids(
        source.model,
        tokens=max(tokens, context - len(prefix) + 1),
        context=context,
        prefix=prefix,
        seed=seed,
        progress=show_progress,
    )
    held = max(1, int(len(rows) * HELD_OUT))
    return rows[:-held], rows[-held:]


def _sample(
    source: Source, context: int, prefix: list[int], seed: int, notes: list[str]
) -> Tensor | None:
    """A little of what the model writes by itself; None, and a note, where it cannot."""
    try:
        return sample_token_ids(
            source.model, tokens=OWN_TOKENS, context=context, prefix=prefix, seed=seed
        )
    except CANNOT_WRITE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        notes.append(
            "the calibration text was not compared with what the model writes by itself, as "
            f"writing failed: {reason}"
        )
        return None
