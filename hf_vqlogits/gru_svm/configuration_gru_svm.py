"""Configuration of a GRU over a feature sequence with a linear or support vector output layer."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

OUTPUT_LOSSES = ("squared_hinge", "cross_entropy")


@strict
class GRUSVMConfig(PreTrainedConfig):
    r"""Configuration of [`GRUSVMForSequenceClassification`].

    The defaults are those of Agarap (2017), "A Neural Network Architecture Combining Gated
    Recurrent Unit (GRU) and Support Vector Machine (SVM) for Intrusion Detection in Network Traffic
    Data": 21 features of a connection, each a time step with one value. What that paper sets for
    the training stands in `examples/train_gru_svm.py`.

    Args:
        input_size (`int`, *optional*, defaults to 1):
            Values of a time step; at least 1.
        sequence_length (`int`, *optional*, defaults to 21):
            Time steps of an input, by which inputs are checked; None allows any number.
        hidden_size (`int`, *optional*, defaults to 256):
            Size of the GRU's state; at least 1.
        dropout (`float`, *optional*, defaults to 0.15):
            Share of the last state's values that are dropped in training; at least 0, below 1. The
            paper keeps 0.85 of them.
        output_loss (`str`, *optional*, defaults to `"squared_hinge"`):
            `"squared_hinge"`: the objective of a support vector machine, one score for two classes
            and one-versus-rest for more. `"cross_entropy"`: softmax, a score for every class.
        svm_c (`float`, *optional*, defaults to 0.5):
            C, the factor of the squared hinge losses beside the regulariser; positive.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Deviation of the output layer's initial weights; positive.
        num_labels (`int`, *optional*, defaults to 2):
            Number of classes; at least 2. Or give `id2label`.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> config = GRUSVMConfig(sequence_length=41, num_labels=5)
        >>> config.hidden_size, config.output_loss, config.num_scores
        (256, 'squared_hinge', 5)
    """

    model_type = "gru_svm"

    input_size: int = 1
    sequence_length: int | None = 21
    hidden_size: int = 256
    dropout: float | int = 0.15
    output_loss: str = "squared_hinge"
    svm_c: float | int = 0.5
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the fields and check them.

        The strict dataclass repeats the check, but wraps what it raises in an error of its own
        that is no `ValueError`.
        """
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def num_scores(self) -> int:
        """Width of the output layer: one score for the two classes of a binary machine."""
        binary = self.output_loss == "squared_hinge" and self.num_labels == 2
        return 1 if binary else int(self.num_labels or 0)

    def validate_architecture(self) -> None:
        """Check the fields.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        for name in ("input_size", "sequence_length", "hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"`dropout` must be at least 0 and below 1, got {self.dropout}: it is the share "
                "dropped, where the paper gives the share kept."
            )
        if self.output_loss not in OUTPUT_LOSSES:
            raise ValueError(
                f"`output_loss` must be one of {OUTPUT_LOSSES}, got {self.output_loss!r}."
            )
        for name in ("svm_c", "initializer_range"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if self.num_labels is None or self.num_labels < 2:
            raise ValueError(
                f"`num_labels` must be at least 2, got {self.num_labels}: with one class there is "
                "nothing to tell apart."
            )
        keys = list(self.id2label or ())
        if set(keys) != set(range(self.num_labels)):
            raise ValueError(
                f"`id2label` must name the classes 0 to {self.num_labels - 1}, got the keys {keys}."
            )
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"`problem_type` must be 'single_label_classification' or None, got "
                f"{self.problem_type!r}: a row has one class, by `output_loss`."
            )
