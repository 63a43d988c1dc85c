"""Traffic records read from text; what cannot be read is reported by line and never dropped."""

import csv
import gzip
import logging
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from .schema import RecordSchema

logger = logging.getLogger(__name__)

MALFORMED = ("refuse", "leave_out")
TOLD = 5  # problems in a message; all are in `problems`


@dataclass(frozen=True)
class RecordProblem:
    """What is wrong with a line.

    Attributes:
        line: its number in the text, from 1.
        reason: what was found and what was expected.
    """

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class RecordError(ValueError):
    """Records that cannot be used.

    Attributes:
        problems: every line that is to blame.
    """

    def __init__(self, message: str, problems: Sequence[RecordProblem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass
class TrafficRecords:
    """Records by column.

    Attributes:
        schema: what the columns are.
        columns: of each feature, N numbers (float64) or N texts.
        lines: the N line numbers, for reports.
        labels: the N numbers of the classes, int64; None of records without labels.
        problems: lines left out, and why.
    """

    schema: RecordSchema
    columns: dict[str, np.ndarray]
    lines: np.ndarray
    labels: np.ndarray | None = None
    problems: tuple[RecordProblem, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, rows: np.ndarray) -> "TrafficRecords":
        """The records at these places, in their order; `problems` stay with the whole."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        labels = None if self.labels is None else self.labels[rows]
        return TrafficRecords(self.schema, columns, self.lines[rows], labels)


def read_records(
    source: str | os.PathLike[str] | Iterable[str],
    schema: RecordSchema,
    *,
    labelled: bool = True,
    malformed: str = "refuse",
) -> TrafficRecords:
    """Read comma-separated records.

    Args:
        source: a file in UTF-8, also gzipped (`.gz`), or lines of text.
        schema: what the columns are. Spaces around a value do not count.
        labelled: whether the records have their label. Without, lines hold the features alone, or
            with a header whatever columns of the schema there are beside them.
        malformed: `"refuse"` to raise, or `"leave_out"` to leave out the lines that cannot be read
            and list them in `problems`; the first are logged.

    Returns:
        The records, N of them.

    Raises:
        ValueError: `malformed` is neither.
        RecordError: lines have too few or too many values, a value that is no finite number in a
            continuous column, an empty one in a categorical one, or a label outside the classes;
            the header lacks columns; the text is damaged, or holds no record.
        OSError: the file cannot be opened.
    """
    if malformed not in MALFORMED:
        raise ValueError(f"`malformed` must be one of {MALFORMED}, got {malformed!r}.")
    name = repr(str(source)) if isinstance(source, str | os.PathLike) else "the text given"
    with _opened(source, name) as lines:
        reader = csv.reader(lines)
        order = _order(reader, schema, labelled=labelled, name=name)
        rows, problems = _rows(reader, schema, order, labelled=labelled)
    if problems and (malformed == "refuse" or not rows):
        raise RecordError(
            f"{len(problems):,} of {len(rows) + len(problems):,} records of {name} are malformed: "
            f"{told(problems)}. Mend them, or have them left out and listed with "
            "`malformed='leave_out'`.",
            problems,
        )
    if not rows:
        raise RecordError(f"There is no record in {name}.")
    if problems:
        logger.warning(
            "%s of %s records of %s are malformed and left out: %s.",
            f"{len(problems):,}",
            f"{len(rows) + len(problems):,}",
            name,
            told(problems),
        )
    values: dict[str, Any] = {feature: [] for feature in schema.features}
    for _, found, _ in rows:
        for feature, value in zip(schema.features, found, strict=True):
            values[feature].append(value)
    columns = {
        feature: np.array(found, dtype=np.float64 if _is_number(schema, feature) else object)
        for feature, found in values.items()
    }
    classes = np.array([row[2] for row in rows], dtype=np.int64) if labelled else None
    numbers = np.array([row[0] for row in rows], dtype=np.int64)
    return TrafficRecords(schema, columns, numbers, classes, tuple(problems))


def told(problems: Sequence[RecordProblem]) -> str:
    """The first problems, and how many more there are."""
    more = f"; and {len(problems) - TOLD:,} more" if len(problems) > TOLD else ""
    return "; ".join(map(str, problems[:TOLD])) + more


Row = tuple[int, list[float | str], int]  # line, values of the features, class


def _rows(
    reader: Any, schema: RecordSchema, order: dict[str, int], *, labelled: bool
) -> tuple[list[Row], list[RecordProblem]]:
    rows: list[Row] = []
    problems: list[RecordProblem] = []
    width = len(order)
    line = reader.line_num
    for fields in _read(reader):
        # Of a record in several lines, by quotes, the first one counts.
        line, end = line + 1, reader.line_num
        try:
            if isinstance(fields, csv.Error):
                raise RecordError(f"it cannot be read: {fields}")
            rows.append(_row(line, fields, schema, order, width, labelled=labelled))
        except RecordError as error:
            through = f"; a quotation mark takes in the lines up to {end}" if end > line else ""
            problems.append(RecordProblem(line, f"{error}{through}"))
        line = end
    return rows, problems


def _read(reader: Any) -> Iterator[list[str] | csv.Error]:
    """The fields of each record, or why it has none; the reader goes on with the next line."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


def _row(
    line: int,
    fields: list[str],
    schema: RecordSchema,
    order: dict[str, int],
    width: int,
    *,
    labelled: bool,
) -> Row:
    if len(fields) != width:
        raise RecordError(f"{width} values are expected, found {len(fields)}")
    values: list[float | str] = []
    for name in schema.features:
        text = fields[order[name]].strip()
        if _is_number(schema, name):
            values.append(_number(text, name))
        elif text:
            values.append(text)
        else:
            raise RecordError(f"column {name!r} is empty")
    if not labelled:
        return line, values, -1
    label = fields[order[schema.label]].strip()
    found = schema.class_of(label) if label else None
    if found is None:
        raise RecordError(
            f"the label {label!r} of column {schema.label!r} belongs to none of the classes "
            f"{list(schema.class_names)}"
        )
    return line, values, found


def _number(text: str, name: str) -> float:
    try:
        value = float(text) if "_" not in text else math.nan  # Python reads 1_000, nobody else
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecordError(f"column {name!r} must hold a finite number, found {text!r}")
    return value


def _is_number(schema: RecordSchema, name: str) -> bool:
    return schema.columns[name] == "continuous"


def _order(reader: Any, schema: RecordSchema, *, labelled: bool, name: str) -> dict[str, int]:
    """Place of each column in a line."""
    if not schema.header:
        expected = schema.columns if labelled else schema.features
        return {column: place for place, column in enumerate(expected)}
    found = [text.strip() for text in next(reader, [])]
    needed = (*schema.features, schema.label) if labelled else schema.features
    missing = [column for column in needed if column not in found]
    if missing:
        raise RecordError(
            f"The header of {name} lacks the columns {missing}; it has {found}. Name them there, "
            "or mend the schema."
        )
    unknown = [column for column in found if column not in schema.columns]
    if unknown or len(set(found)) != len(found):
        raise RecordError(
            f"The header of {name} must name columns of the schema, each once, found {found}; "
            "list what is no feature there as 'ignored'."
        )
    return {column: place for place, column in enumerate(found)}


@contextmanager
def _opened(source: str | os.PathLike[str] | Iterable[str], name: str) -> Iterator[Iterable[str]]:
    try:
        if not isinstance(source, str | os.PathLike):
            yield source
            return
        path = Path(source)
        file: IO[str]
        open_text: Any = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise RecordError(f"{name} is not text in UTF-8: {error}.") from error
    except (gzip.BadGzipFile, zlib.error, EOFError, csv.Error) as error:
        raise RecordError(f"{name} is damaged: {error}. Copy it again.") from error
