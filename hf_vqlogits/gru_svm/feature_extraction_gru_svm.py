"""From traffic records to the input of a GRU-SVM; saved with the model, as a feature extractor."""

import copy
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from . import encoding
from .records import RecordError, RecordProblem, TrafficRecords, read_records, told
from .schema import RecordSchema

logger = logging.getLogger(__name__)

CONTINUOUS = ("quantile", "standardise")


class GRUSVMFeatureExtractor(FeatureExtractionMixin):
    """Turns traffic records into sequences of numbers, a time step for each feature.

    It is fitted once, on training data; what it learnt there (categories, cuts of the bins, means)
    is saved in `preprocessor_config.json` beside the model and never changes.

    Args:
        schema: what the columns are.
        continuous: `"quantile"`: numbers become the index of a quantile bin, divided by the number
            of cuts; `"standardise"`: (value - mean) / standard deviation.
        num_bins: of `"quantile"`; at least 2. 10 are the paper's deciles.
        encodings: what `fit` learnt, by feature; None before.

    Raises:
        ValueError: a field is out of range, or `encodings` do not fit the schema.

    Example:
        >>> from hf_vqlogits.gru_svm import RecordSchema
        >>> schema = RecordSchema(
        ...     columns={"bytes": "continuous", "flag": "categorical", "attack": "label"},
        ...     classes={"no": "normal", "yes": "attack"},
        ... )
        >>> extractor = GRUSVMFeatureExtractor(schema)
        >>> records = extractor.read(["10,SF,no", "20,S0,yes", "30,SF,no"])
        >>> extractor.fit(records)(records, return_tensors="pt")["input_values"].shape
        torch.Size([3, 2, 1])
    """

    model_input_names = ["input_values"]  # noqa: RUF012 - as Transformers declares it

    def __init__(
        self,
        schema: RecordSchema | Mapping[str, Any],
        continuous: str = "quantile",
        num_bins: int = 10,
        encodings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("feature_extractor_type", None)
        super().__init__(**kwargs)
        if not isinstance(schema, RecordSchema):
            schema = RecordSchema.from_dict(schema)
        if continuous not in CONTINUOUS:
            raise ValueError(f"`continuous` must be one of {CONTINUOUS}, got {continuous!r}.")
        if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 2:
            raise ValueError(f"`num_bins` must be an integer of at least 2, got {num_bins!r}.")
        self.schema = schema
        self.continuous = continuous
        self.num_bins = num_bins
        self.encodings = None if encodings is None else _checked(schema, continuous, encodings)

    @property
    def id2label(self) -> dict[int, str]:
        """Number and name of the classes, for the model's configuration."""
        return dict(enumerate(self.schema.class_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Name and number of the classes."""
        return {name: number for number, name in self.id2label.items()}

    @property
    def sequence_length(self) -> int:
        """Number of the features, for the model's configuration."""
        return len(self.schema.features)

    @property
    def constant_features(self) -> tuple[str, ...]:
        """Features that had one value in the training data; they stay, and tell nothing."""
        return tuple(n for n, fitted in self._fitted().items() if encoding.is_constant(fitted))

    def read(
        self,
        source: str | os.PathLike[str] | Iterable[str],
        *,
        labelled: bool = True,
        malformed: str = "refuse",
    ) -> TrafficRecords:
        """Read records of this schema; see [`read_records`]."""
        return read_records(source, self.schema, labelled=labelled, malformed=malformed)

    def fit(self, records: TrafficRecords) -> "GRUSVMFeatureExtractor":
        """Learn categories, bins or means from training data, and from nothing else.

        A feature that is constant is kept, named in a warning, and gives the same input for every
        record. A class without a record is named in a warning.

        Args:
            records: the training data.

        Returns:
            This object.

        Raises:
            RuntimeError: it is fitted already.
            TypeError: they are no records.
            ValueError: the records have another schema, all features are constant, all records are
                of one class, or numbers are too large.
        """
        if self.encodings is not None:
            raise RuntimeError(
                "The feature extractor is fitted already, and a model may rely on what it learnt; "
                "make a new one."
            )
        self._check_schema(records)
        self._check_classes(records)
        fitted = {name: self._fit_column(name, records) for name in self.schema.features}
        constant = [name for name, found in fitted.items() if encoding.is_constant(found)]
        if len(constant) == len(fitted):
            raise ValueError(
                f"Every feature is constant in the {len(records):,} records: there is nothing to "
                "tell classes apart by."
            )
        if constant:
            logger.warning(
                "These features have one value in all %s training records and tell nothing: %s.",
                f"{len(records):,}",
                ", ".join(constant),
            )
        self.encodings = fitted
        return self

    def __call__(self, records: TrafficRecords, return_tensors: str | None = None) -> BatchFeature:
        """Inputs of the model, and the labels where there are any.

        Unknown categories get an index of their own, 0, and are logged with their lines;
        [`unknown_categories`] returns them.

        Args:
            records: N of them, in the order of the result.
            return_tensors: `"pt"` or `"np"`; None is `"np"`.

        Returns:
            `input_values` float32 (N, T, 1), T the number of features, and `labels` int64 (N,).

        Raises:
            RuntimeError: it is not fitted.
            TypeError: they are no records.
            ValueError: the records have another schema.
        """
        fitted = self._fitted()
        unknown = self.unknown_categories(records)
        if unknown:
            logger.warning(
                "%s values are categories that the training data do not have: %s.",
                f"{len(unknown):,}",
                told(unknown),
            )
        steps = [encoding.encode(records.columns[name], fitted[name]) for name in fitted]
        features: dict[str, Any] = {"input_values": np.stack(steps, axis=1)[..., None]}
        if records.labels is not None:
            features["labels"] = records.labels
        return BatchFeature(features, tensor_type=return_tensors)

    def unknown_categories(self, records: TrafficRecords) -> list[RecordProblem]:
        """Values that are not among the categories of the training data, by line.

        Raises:
            RuntimeError: it is not fitted.
            TypeError: they are no records.
            ValueError: the records have another schema.
        """
        fitted = self._fitted()
        self._check_schema(records)
        found = [
            RecordProblem(
                int(records.lines[row]),
                f"column {name!r} has the category {records.columns[name][row]!r}, which the "
                "training data do not have",
            )
            for name, how in fitted.items()
            if "categories" in how
            for row in encoding.unknown(records.columns[name], how).nonzero()[0]
        ]
        return sorted(found, key=lambda problem: problem.line)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        output = copy.deepcopy(self.__dict__)
        output["schema"] = self.schema.to_dict()
        output["feature_extractor_type"] = type(self).__name__
        return output

    def _fit_column(self, name: str, records: TrafficRecords) -> encoding.Encoding:
        values = records.columns[name]
        if self.schema.columns[name] == "categorical":
            return encoding.fit_categories(values)
        if self.continuous == "quantile":
            return encoding.fit_quantiles(values, self.num_bins)
        try:
            return encoding.fit_standardisation(values)
        except ValueError as error:
            raise ValueError(f"Column {name!r} cannot be standardised: {error}.") from error

    def _fitted(self) -> dict[str, encoding.Encoding]:
        if self.encodings is None:
            raise RuntimeError(
                "The feature extractor is not fitted: call `fit` with the training records, or "
                "load one with `from_pretrained`."
            )
        return self.encodings

    def _check_schema(self, records: TrafficRecords) -> None:
        if not isinstance(records, TrafficRecords):
            raise TypeError(
                f"`records` must be TrafficRecords, got {type(records).__name__}; `read` makes "
                "them from a file or from lines."
            )
        missing = [name for name in self.schema.features if name not in records.columns]
        if missing or records.schema != self.schema:
            what = f"lack the columns {missing}" if missing else "have another schema"
            raise ValueError(f"The records {what}; read them with this extractor's own `read`.")

    def _check_classes(self, records: TrafficRecords) -> None:
        if records.labels is None:
            return
        names = self.schema.class_names
        counts = np.bincount(records.labels, minlength=len(names))
        present = [name for name, count in zip(names, counts, strict=True) if count]
        if len(present) == 1:
            raise RecordError(
                f"All {len(records):,} training records are of the class {present[0]!r}; records "
                f"of {' or '.join(repr(n) for n in names if n not in present)} are needed as well."
            )
        absent = [name for name in names if name not in present]
        if absent:
            logger.warning(
                "No training record is of the classes %s: they cannot be learnt.", ", ".join(absent)
            )


def _checked(
    schema: RecordSchema, continuous: str, encodings: Mapping[str, Any]
) -> dict[str, encoding.Encoding]:
    """Encodings in the order of the features, which sorted JSON has lost."""
    numbers = {"edges"} if continuous == "quantile" else {"mean", "deviation"}
    for name in schema.features:
        wanted = {"categories"} if schema.columns[name] == "categorical" else numbers
        found = encodings.get(name)
        if not isinstance(found, Mapping) or set(found) != wanted or not _plausible(found):
            raise ValueError(
                f"`encodings` must hold {sorted(wanted)} of the feature {name!r}, got {found!r}: "
                "the saved feature extractor is damaged, or of another schema."
            )
    unknown = sorted(set(encodings) - set(schema.features))
    if unknown:
        raise ValueError(f"`encodings` has {unknown}, which are no features of the schema.")
    return {name: dict(encodings[name]) for name in schema.features}


def _plausible(found: Mapping[str, Any]) -> bool:
    if "categories" in found:
        names = found["categories"]
        return bool(names) and all(isinstance(n, str) for n in names) and _ascending(names)
    numbers = found["edges"] if "edges" in found else [found["mean"], found["deviation"]]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return False
    return _ascending(numbers) if "edges" in found else found["deviation"] >= 0


def _ascending(values: list[Any]) -> bool:
    return values == sorted(set(values))
