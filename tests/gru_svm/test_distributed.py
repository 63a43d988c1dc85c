"""Two processes on a CPU (gloo) make the step that one makes with the whole batch."""

import pytest
import torch
from processes import PROCESSES, results_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_vqlogits.gru_svm import GRUSVMConfig, GRUSVMForSequenceClassification

ROWS, STEPS = 8, 3


def build(loss: str, classes: int) -> GRUSVMForSequenceClassification:
    """A model that is the same in every process."""
    torch.manual_seed(0)
    config = GRUSVMConfig(
        sequence_length=5, hidden_size=4, num_labels=classes, output_loss=loss, dropout=0.0
    )
    return GRUSVMForSequenceClassification(config).train()


def train(model: nn.Module, rank: int, processes: int, classes: int) -> None:
    """Some steps on this process's share of the batch, the loss as Trainer scales it."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 5, 1, generator=draw).chunk(processes)[rank]
    labels = torch.randint(0, classes, (ROWS,), generator=draw)
    labels[-1] = -100  # so that the shares of the processes differ
    counted = int((labels != -100).sum())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        own = labels.chunk(processes)[rank]
        loss = model(inputs, labels=own, num_items_in_batch=counted).loss
        (processes * loss).backward()  # DDP takes the mean of the gradients
        optimiser.step()
        optimiser.zero_grad()


CASES = [("squared_hinge", 2), ("squared_hinge", 3), ("cross_entropy", 3)]


def in_a_process(rank: int) -> list[dict[str, Tensor]]:
    """State of each case's model after the steps."""
    states = []
    for loss, classes in CASES:
        model = DistributedDataParallel(build(loss, classes))
        train(model, rank, PROCESSES, classes)
        states.append(model.module.state_dict())
    return states


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return results_of(in_a_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{loss}, {n}" for loss, n in CASES])
def test_the_step_is_that_of_the_whole_batch(case, states):
    loss, classes = CASES[case]
    model = build(loss, classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, 0, 1, classes)
    for name, wanted in model.state_dict().items():
        assert not torch.equal(wanted, before[name])
        for found in states:
            torch.testing.assert_close(found[case][name], wanted, atol=1e-6, rtol=1e-5)
