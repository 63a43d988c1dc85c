import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.gru_svm import l2_svm_objective, squared_hinge

IGNORED = -100


def reference(scores, labels):
    """Sum over rows and machines of max(0, 1 - y s)^2, in float64, one at a time."""
    total = 0.0
    for row, label in zip(np.asarray(scores, dtype=np.float64), labels, strict=True):
        if label == IGNORED:
            continue
        for column, score in enumerate(row):
            positive = label == 1 if len(row) == 1 else label == column
            total += max(0.0, 1.0 - (1.0 if positive else -1.0) * score) ** 2
    return total


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_equals_the_sum_over_machines(draw, columns):
    scores = 2 * torch.randn(11, columns, generator=draw)
    labels = torch.randint(0, max(2, columns), (11,), generator=draw)
    labels[3] = IGNORED
    found = squared_hinge(scores, labels)
    assert found.shape == ()
    assert abs(float(found) / reference(scores, labels.tolist()) - 1) < 1e-6


def test_hand_made_figures():
    # Binary: y f = 2 costs nothing, 0.5 costs 0.25, -1 costs 4.
    scores = torch.tensor([[2.0], [-0.5], [-1.0]])
    assert float(squared_hinge(scores, torch.tensor([1, 0, 1]))) == 4.25
    # One-versus-rest: (1 - 0.5)^2 of the right machine, (1 + 0)^2 and (1 - 2)+ of the others.
    scores = torch.tensor([[0.0, 0.5, -2.0]])
    assert float(squared_hinge(scores, torch.tensor([1]))) == 1.25


@pytest.mark.parametrize("columns", [1, 4])
def test_gradients(draw, columns):
    scores = torch.randn(6, columns, dtype=torch.float64, generator=draw).requires_grad_()
    weight = torch.randn(columns, 3, dtype=torch.float64, generator=draw).requires_grad_()
    labels = torch.randint(0, max(2, columns), (6,), generator=draw)
    labels[0] = IGNORED

    def objective(scores, weight):
        return l2_svm_objective(scores, labels, weight, c=0.7, num_items=9)

    assert torch.autograd.gradcheck(objective, (scores, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_is_summed_in_float32(draw, dtype):
    scores = (30 * torch.randn(4096, 3, generator=draw)).to(dtype)
    labels = torch.randint(0, 3, (4096,), generator=draw)
    found = squared_hinge(scores, labels)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(float(found) / reference(scores.double(), labels.tolist()) - 1) < 1e-5


def test_the_regulariser_counts_once_a_batch(draw):
    weight = torch.randn(1, 5, generator=draw)
    half = 0.5 * float(weight.double().square().sum())
    for rows in (1, 8):
        labels = torch.ones(rows, dtype=torch.int64)
        far = torch.full((rows, 1), 3.0)  # beyond the margin: no loss but the regulariser
        assert float(l2_svm_objective(far, labels, weight, c=2.0)) == pytest.approx(half)
        near = torch.zeros(rows, 1)
        found = float(l2_svm_objective(near, labels, weight, c=2.0))
        assert found == pytest.approx(half + 2.0 * rows)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([IGNORED, 0, 1, 2]), min_size=2, max_size=9),
    st.integers(1, 8),
    st.integers(0, 2**16),
)
def test_parts_sum_up_to_the_whole(labels, cut, seed):
    if all(label == IGNORED for label in labels):
        labels[0] = 0
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(labels), 3, dtype=torch.float64, generator=draw)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=draw)
    labels = torch.tensor(labels)
    items = int((labels != IGNORED).sum())
    parts = [slice(None, cut), slice(cut, None)]
    found = sum(
        l2_svm_objective(scores[p], labels[p], weight, c=0.5, num_items=items) for p in parts
    )
    whole = l2_svm_objective(scores, labels, weight, c=0.5)
    torch.testing.assert_close(found, whole)


def test_rows_that_do_not_count_have_no_gradient():
    scores = torch.zeros(3, 2, requires_grad=True)
    squared_hinge(scores, torch.tensor([IGNORED, 0, IGNORED])).backward()
    assert scores.grad.tolist() == [[0, 0], [-2, 2], [0, 0]]
    nothing = squared_hinge(torch.full((1, 2), torch.inf), torch.tensor([IGNORED]))
    assert float(nothing) == 0


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        ((2, 1), torch.tensor([0, 2]), ValueError, "between 0 and 1, .* got 2 in row 1"),
        ((2, 3), torch.tensor([-1, 0]), ValueError, "between 0 and 2, .* got -1 in row 0"),
        ((2, 3), torch.tensor([0]), ValueError, r"shape \(2,\) .*got \(1,\)"),
        ((2, 3), torch.tensor([[0], [1]]), ValueError, r"got \(2, 1\)"),
        ((2, 3), torch.tensor([0.0, 1.0]), TypeError, "must be integers, got torch.float32"),
        ((2, 3), torch.tensor([True, False]), TypeError, "must be integers, got torch.bool"),
    ],
)
def test_bad_labels_are_refused(scores, labels, error, message):
    with pytest.raises(error, match=message):
        squared_hinge(torch.zeros(scores), labels)
