"""One training of the GRU with one output layer, and of its peers, on the same inputs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vqlogits.gru_svm import GRUSVMConfig, GRUSVMForSequenceClassification

from .detection import detection_scores

PREDICTED_AT_ONCE = 1024


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        output_loss: `"squared_hinge"` or `"cross_entropy"`.
        rate: learning rate of Adam, constant.
        dropout: share dropped.
        epochs: passes over the training records.
        batch: records a step.
        hidden_size: of the GRU.
        svm_c: C.
    """

    output_loss: str
    rate: float
    dropout: float = 0.15
    epochs: int = 5
    batch: int = 256
    hidden_size: int = 256
    svm_c: float = 0.5


def build(recipe: Recipe, steps: int, *, seed: int) -> GRUSVMForSequenceClassification:
    """The untrained model; models of one seed begin with the same GRU and draw the same dropout."""
    model = _drawn(recipe, steps, seed)
    # The output layers draw different numbers of weights before the GRU is initialised.
    same = replace(recipe, output_loss="squared_hinge")
    model.gru.load_state_dict(_drawn(same, steps, seed).gru.state_dict())
    torch.manual_seed(seed)
    return model


def _drawn(recipe: Recipe, steps: int, seed: int) -> GRUSVMForSequenceClassification:
    torch.manual_seed(seed)
    return GRUSVMForSequenceClassification(
        GRUSVMConfig(
            sequence_length=steps,
            hidden_size=recipe.hidden_size,
            dropout=recipe.dropout,
            output_loss=recipe.output_loss,
            svm_c=recipe.svm_c,
        )
    )


def trained(
    recipe: Recipe, inputs: Tensor, labels: Tensor, *, seed: int
) -> GRUSVMForSequenceClassification:
    """A model trained on records in an order that the seed alone decides.

    Args:
        recipe: how.
        inputs: (N, T, 1).
        labels: (N,).
        seed: of weights, order and dropout.
    """
    model = build(recipe, inputs.shape[1], seed=seed).train()
    step = trainer(model, recipe)
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(inputs), generator=order).split(recipe.batch):
            step(inputs[rows], labels[rows])
    return model.eval()


def trainer(
    model: GRUSVMForSequenceClassification, recipe: Recipe
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that makes a step on inputs (N, T, 1) and labels (N,), and returns the loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(inputs, labels=labels).loss
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


@torch.no_grad()
def decisions(model: GRUSVMForSequenceClassification, inputs: Tensor) -> Tensor:
    """The difference (N,) of the two logits, above 0 for class 1."""
    parts = [model(part).logits for part in inputs.split(PREDICTED_AT_ONCE)]
    logits = torch.cat(parts)
    return logits[:, 1] - logits[:, 0]


def run_gru(
    recipe: Recipe,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seed: int,
) -> dict[str, Any]:
    """Train and judge.

    Args:
        recipe: how.
        train: inputs (N, T, 1) and labels (N,).
        test: likewise.
        seed: of weights, order and dropout.

    Returns:
        `seed`, `rate`, `training_seconds`, `prediction_seconds` (of all test records) and the
        scores of [`detection_scores`].
    """
    begin = time.perf_counter()
    model = trained(recipe, *train, seed=seed)
    between = time.perf_counter()
    found = decisions(model, test[0]).numpy()
    end = time.perf_counter()
    return {
        "seed": seed,
        "rate": recipe.rate,
        "training_seconds": between - begin,
        "prediction_seconds": end - between,
        **detection_scores(test[1].numpy(), (found > 0).astype(int), found),
    }


def peers(svm_c: float, *, quick: bool) -> dict[str, Callable[[int], Any]]:
    """scikit-learn's classifiers by name, to be made with a seed.

    Args:
        svm_c: C of the linear SVM, whose bias is regularised a hundred times less than weights.
            The others have their defaults.
        quick: few trees.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.svm import LinearSVC

    trees = 10 if quick else 100
    return {
        "linear SVM": lambda seed: LinearSVC(
            C=svm_c, loss="squared_hinge", dual=False, intercept_scaling=10, random_state=seed
        ),
        "random forest": lambda seed: RandomForestClassifier(trees, random_state=seed, n_jobs=-1),
        "gradient boosting": lambda seed: HistGradientBoostingClassifier(
            max_iter=trees, random_state=seed
        ),
    }


def run_peer(
    make: Callable[[int], Any],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seed: int,
) -> dict[str, Any]:
    """Train and judge a classifier of scikit-learn on the same inputs, as rows of T numbers.

    Returns:
        As [`run_gru`], without a rate.
    """
    rows, labels = (tensor.numpy() for tensor in train)
    test_rows, test_labels = (tensor.numpy() for tensor in test)
    model = make(seed)
    begin = time.perf_counter()
    model.fit(rows[..., 0], labels)
    between = time.perf_counter()
    predicted = model.predict(test_rows[..., 0])
    end = time.perf_counter()
    if hasattr(model, "decision_function"):
        decision = model.decision_function(test_rows[..., 0])
    else:
        decision = model.predict_proba(test_rows[..., 0])[:, 1]
    return {
        "seed": seed,
        "training_seconds": between - begin,
        "prediction_seconds": end - between,
        **detection_scores(test_labels, predicted.astype(int), np.asarray(decision)),
    }
