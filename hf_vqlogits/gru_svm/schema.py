"""What the columns of traffic records are, and which classes their labels stand for."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("continuous", "categorical", "label", "ignored")
EVERY_OTHER = "*"


@dataclass(frozen=True, eq=False)
class RecordSchema:
    """The columns of comma-separated records, in their order, and the classes.

    Attributes:
        columns: name -> kind, one of `KINDS`; one column is the label, and the continuous and
            categorical ones are the features, a time step each. Pairs will do as well.
        classes: a label as it stands in the records -> its class; the label `"*"` stands for every
            other one. Classes are numbered in the order in which they first appear here.
        header: whether the first line names the columns, which may then stand in any order.

    Raises:
        ValueError: a kind is unknown, there is not one label, no feature, or less than two classes.

    Example:
        >>> schema = RecordSchema(
        ...     columns={"bytes": "continuous", "flag": "categorical", "attack": "label"},
        ...     classes={"no": "normal", "*": "attack"},
        ... )
        >>> schema.features, schema.class_names
        (('bytes', 'flag'), ('normal', 'attack'))
    """

    columns: Mapping[str, str]
    classes: Mapping[str, str]
    header: bool = False

    def __post_init__(self) -> None:
        for name in ("columns", "classes"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not isinstance(self.header, bool):
            raise ValueError(f"`header` must be true or false, got {self.header!r}.")
        for name, kind in self.columns.items():
            if kind not in KINDS:
                raise ValueError(f"`columns`: {name!r} must be one of {KINDS}, got {kind!r}.")
        labels = [name for name, kind in self.columns.items() if kind == "label"]
        if len(labels) != 1:
            raise ValueError(f"`columns` must have one column of kind 'label', got {labels}.")
        if not self.features:
            raise ValueError(
                "`columns` must have a column of kind 'continuous' or 'categorical': without a "
                "feature there is nothing to learn from."
            )
        if len(self.class_names) < 2:
            raise ValueError(
                f"`classes` must name at least two classes, got {list(self.class_names)}; map "
                "every label to its class, '*' standing for all others."
            )

    def __eq__(self, other: object) -> bool:
        """Orders count: they are those of the values in a line, and the numbers of the classes."""
        return isinstance(other, RecordSchema) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features, in the order of the columns."""
        return tuple(n for n, kind in self.columns.items() if kind in ("continuous", "categorical"))

    @property
    def label(self) -> str:
        """Name of the label's column."""
        return next(name for name, kind in self.columns.items() if kind == "label")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return tuple(dict.fromkeys(self.classes.values()))

    def class_of(self, label: str) -> int | None:
        """Number of a label's class; None where the label belongs to none."""
        found = self.classes.get(label, self.classes.get(EVERY_OTHER))
        return None if found is None else self.class_names.index(found)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in pairs: JSON files are often written with sorted keys."""
        return {
            "columns": [list(pair) for pair in self.columns.items()],
            "classes": [list(pair) for pair in self.classes.items()],
            "header": self.header,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RecordSchema":
        """From plain data.

        Raises:
            ValueError: it is no mapping, or fields are missing, unknown or wrong.
        """
        names = {"columns", "classes", "header"}
        given = set(fields) if isinstance(fields, Mapping) else None
        if given is None or not {"columns", "classes"} <= given <= names:
            told = type(fields).__name__ if given is None else sorted(given)
            raise ValueError(
                "A schema of records needs the fields `columns` and `classes`, and may have "
                f"`header`, got {told}."
            )
        return cls(**fields)

    @classmethod
    def from_json_file(cls, path: Path) -> "RecordSchema":
        """From a JSON file.

        Raises:
            ValueError: it is not JSON, or not a schema.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf8")))
        except ValueError as error:
            raise ValueError(f"The schema {str(path)!r} cannot be used: {error}") from error


def _texts(name: str, given: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, str]:
    try:
        pairs = list(given.items() if isinstance(given, Mapping) else map(tuple, given))
        found = dict(pairs)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a mapping or pairs of texts, got {given!r}.") from None
    if not all(isinstance(text, str) and text.strip() == text for p in pairs for text in p):
        raise ValueError(
            f"`{name}` must be made of texts without spaces at their ends, got {found!r}."
        )
    if len(found) != len(pairs):
        raise ValueError(f"`{name}` must have every key once, got {[key for key, _ in pairs]}.")
    return found
