"""A GRU over a feature sequence, with the output layer of an SVM or of softmax.

Letters: N rows, T time steps, I values of a time step, H size of the state, C classes.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from ..loading import (
    readable_file_errors,
    refuse_incomplete,
    refuse_mismatched,
    refuse_unexpected,
)
from .configuration_gru_svm import GRUSVMConfig
from .squared_hinge import at_least_one, check_labels, l2_svm_objective

MADE_BY = "Train the model with `examples/train_gru_svm.py` or Trainer, or copy it again."


class GRUSVMForSequenceClassification(PreTrainedModel):
    """A GRU whose last state a linear layer turns into scores of the classes.

    With `output_loss="squared_hinge"` the linear layer is a support vector machine: f(x) for two
    classes, told apart by its sign, or one-versus-rest. With `"cross_entropy"` the same network
    ends in softmax. Either way the class is the argmax of the logits.

    Example:
        >>> model = GRUSVMForSequenceClassification(GRUSVMConfig(sequence_length=41)).eval()
        >>> model(torch.randn(3, 41, 1)).logits.shape
        torch.Size([3, 2])
    """

    config_class = GRUSVMConfig
    main_input_name = "input_values"
    # Trainer: the loss knows what to do with the number of rows of a whole, accumulated batch.
    accepts_loss_kwargs = True

    def __init__(self, config: GRUSVMConfig):
        # `from_pretrained` sets the fields it is given after the configuration was checked.
        config.validate_architecture()
        super().__init__(config)
        self.gru = nn.GRU(config.input_size, config.hidden_size, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_scores)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=self.config.initializer_range)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.GRU):
            tensors: dict[str, Tensor] = dict(module.named_parameters())
            draws: dict[str, Callable[[Tensor], Tensor]] = {
                "weight_ih_l0": nn.init.xavier_uniform_,
                "weight_hh_l0": nn.init.orthogonal_,
            }
            for name, draw in draws.items():
                # By blocks: the three gates have a matrix each.
                blocks = [draw(torch.empty_like(block)) for block in tensors[name].chunk(3)]
                initialization.copy_(tensors[name], torch.cat(blocks))
            # The gates start open towards the past (PyTorch's z keeps the state): else the first
            # features were forgotten over the dozens of steps that follow.
            bias = torch.zeros_like(tensors["bias_ih_l0"])
            bias[: 2 * module.hidden_size] = 1.0
            initialization.copy_(tensors["bias_ih_l0"], bias)
            initialization.zeros_(tensors["bias_hh_l0"])

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as [`PreTrainedModel.from_pretrained`] does, and check it.

        Raises:
            ValueError: tensors are missing, truncated, left over, or of another shape than the
                configuration says; the message says which.
        """
        path, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        keep_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        with readable_file_errors(path):
            loaded: Any = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if not keep_mismatched:
            refuse_mismatched(path, info["mismatched_keys"])
        refuse_unexpected(path, info["unexpected_keys"], only=("",))
        refuse_incomplete(path, info["missing_keys"], kind="a GRU-SVM checkpoint", remedy=MADE_BY)
        return (model, info) if with_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the model is initialised as those of Transformers are."""
        return False

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Scores of the classes and, with labels, the loss.

        Args:
            input_values: (N, T, I), or (N, T) where I is 1.
            attention_mask: (N, T), 1 for real steps and 0 for padding after them; None: no padding.
            labels: integers (N,); -100 does not count.
            num_items_in_batch: rows that count in the whole batch of which this is a part, as
                Trainer gives it with gradient accumulation. The losses of the parts sum up.

        Returns:
            `logits` (N, C): for softmax and one-versus-rest the scores; for the binary machine
            (-f(x), f(x)), whose argmax is the sign of f (0 counts as class 0). `loss`: the L2-SVM
            objective, a sum over the batch, or the mean cross-entropy in nats.

        Raises:
            TypeError: `labels` are no integers.
            ValueError: shapes contradict the configuration, padding does not come last, or a label
                is outside the classes.
        """
        states = self.last_states(self._checked(input_values), attention_mask)
        scores = self.classifier(self.dropout(states))  # (N, num_scores)
        loss = None if labels is None else self._loss(scores, labels, num_items_in_batch)
        binary = self.config.num_scores == 1
        return SequenceClassifierOutput(
            loss=loss, logits=torch.cat([-scores, scores], -1) if binary else scores
        )

    def last_states(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The GRU's state after each row's last real step.

        Args:
            input_values: (N, T, I).
            attention_mask: (N, T), as for `forward`.

        Returns:
            (N, H).

        Raises:
            ValueError: the mask has another shape, a row without a real step, or padding that does
                not come last.
        """
        if attention_mask is None:
            return self.gru(input_values)[1][0]
        real = attention_mask != 0
        _check_padding(real, tuple(input_values.shape[:2]))
        # Padding is zeroed, as a NaN in it would reach the gradient.
        outputs = self.gru(input_values.masked_fill(~real[..., None], 0))[0]  # (N, T, H)
        last = real.sum(-1) - 1
        return outputs.gather(1, last[:, None, None].expand(-1, 1, outputs.shape[-1]))[:, 0]

    def _checked(self, input_values: Tensor) -> Tensor:
        config = self.config
        if input_values.ndim == 2 and config.input_size == 1:
            input_values = input_values[..., None]
        steps = config.sequence_length or "any number of"
        if (
            input_values.ndim != 3
            or input_values.shape[-1] != config.input_size
            or input_values.shape[1] < 1
            or (config.sequence_length or input_values.shape[1]) != input_values.shape[1]
        ):
            raise ValueError(
                f"`input_values` must have the shape (rows, {steps} time steps, "
                f"{config.input_size} values) of `sequence_length` and `input_size`, got "
                f"{tuple(input_values.shape)}."
            )
        return input_values.to(self.classifier.weight.dtype)

    def _loss(self, scores: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        labels = labels.to(scores.device)
        if torch.is_tensor(num_items):
            num_items = num_items.to(scores.device)
        if self.config.output_loss == "squared_hinge":
            return l2_svm_objective(
                scores,
                labels,
                self.classifier.weight,
                c=self.config.svm_c,
                num_items=num_items,
            )
        check_labels(labels, rows=len(scores), classes=self.config.num_scores)
        total = nn.functional.cross_entropy(
            scores.to(torch.promote_types(scores.dtype, torch.float32)),
            labels.long(),
            reduction="sum",
        )
        return total / at_least_one((labels != -100).sum() if num_items is None else num_items)


def _check_padding(real: Tensor, shape: tuple[int, ...]) -> None:
    if real.shape != shape:
        raise ValueError(
            f"`attention_mask` must have the shape {shape} of rows and time steps, got "
            f"{tuple(real.shape)}."
        )
    wrong = ~real[:, 0] | (real[:, 1:] & ~real[:, :-1]).any(-1)
    allowed = "must be 1 for the real steps, at least one, and 0 for the padding after them"
    if torch.compiler.is_compiling():  # a compiled graph cannot say which
        torch._assert_async(~wrong.any(), f"`attention_mask` of every row {allowed}.")
    elif bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`attention_mask` of row {row} {allowed}, got {real[row].int().tolist()}: padding "
            "before or between would change the state."
        )
