import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import random_mixture

from hf_vqlogits.gaussian_moe.voronoi import PARAMETERS, exponents, voronoi


def reference(fitted, true):
    """The loss as its docstring has it, a component at a time; no shift of the slopes."""

    def parts(mixture, i):
        return {
            "slopes": mixture.slopes[i],
            "temperature": mixture.log_temperature.exp()[None],
            "coefficients": mixture.coefficients[i].flatten(),
            "intercepts": mixture.intercepts[i],
            "covariances": mixture.covariances[i].flatten(),
        }

    ours = [parts(fitted, i) for i in range(len(fitted.biases))]
    theirs = [parts(true, j) for j in range(len(true.biases))]
    cells = [[] for _ in theirs]
    for i, one in enumerate(ours):
        distances = [sum(float((one[n] - t[n]).square().sum()) for n in PARAMETERS) for t in theirs]
        cells[distances.index(min(distances))].append(i)
    loss = 0.0
    for j, cell in enumerate(cells):
        loss += abs(float(fitted.weights[cell].sum() - true.weights[j]))
        for i in cell:
            for name, power in exponents(len(cell), true.activation).items():
                length = float((ours[i][name] - theirs[j][name]).norm())
                loss += float(fitted.weights[i]) * length**power
    return loss, [len(cell) for cell in cells]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("p", [1, 2])
def test_loss_is_that_of_the_formula(k, p):
    true = random_mixture("gelu", k=3, p=p)
    for seed in range(1, 8):
        fitted = random_mixture("gelu", k=k, p=p, seed=seed)
        loss, sizes = reference(fitted, true)
        found = voronoi(fitted, true)
        assert float(found.loss) == pytest.approx(loss)
        assert found.sizes.tolist() == sizes


def test_zero_for_the_truth_in_any_order_and_for_a_split_component():
    for activation in ("linear", "tanh"):
        true = random_mixture(activation)
        for order in ([2, 0, 1], [0, 1, 2]):
            names = ("slopes", "biases", "coefficients", "intercepts", "factors")
            turned = replace(true, **{name: getattr(true, name)[order] for name in names})
            assert float(voronoi(turned, true).loss) == pytest.approx(0, abs=1e-12)
        order = [0, 0, 1, 2]
        split = replace(true, **{name: getattr(true, name)[order] for name in names})
        split.biases[:2] -= math.log(2) * true.log_temperature.exp()
        found = voronoi(split, true)
        assert float(found.loss) == pytest.approx(0, abs=1e-12)
        assert found.sizes.tolist() == [2, 1, 1]


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-10, 10), slope_shift=st.floats(-10, 10), seed=st.integers(0, 100))
def test_shifts_of_the_gate_do_not_count(shift, slope_shift, seed):
    true = random_mixture("linear")
    fitted = random_mixture("linear", k=4, seed=seed)
    moved = replace(fitted, biases=fitted.biases + shift, slopes=fitted.slopes + slope_shift)
    before, after = voronoi(fitted, true), voronoi(moved, true)
    assert torch.equal(before.sizes, after.sizes)
    assert float(after.loss) == pytest.approx(float(before.loss), rel=1e-6)
    # With an activation a shift of the slopes is another gate.
    other = replace(fitted, activation="tanh")
    farther = replace(other, slopes=other.slopes + 100)
    tanh = replace(true, activation="tanh")
    assert float(voronoi(farther, tanh).loss) > float(voronoi(other, tanh).loss)


def test_exponents_of_cells():
    assert set(exponents(1, "gelu").values()) == {1.0}
    assert exponents(2, "gelu") == {
        "slopes": 2, "temperature": 2, "coefficients": 2, "intercepts": 4, "covariances": 2
    }  # fmt: skip
    assert exponents(3, "linear") == {
        "slopes": 6, "temperature": 2, "coefficients": 3, "intercepts": 6, "covariances": 3
    }  # fmt: skip
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        exponents(0, "gelu")


def test_errors_are_of_each_cell():
    true = random_mixture("gelu", k=2, d=1, p=1)
    true = replace(true, intercepts=torch.tensor([[0.0], [50.0]]).double())
    moved = replace(true, coefficients=true.coefficients + torch.tensor([0.3, -0.1])[:, None, None])
    found = voronoi(moved, true)
    torch.testing.assert_close(found.errors["coefficients"], torch.tensor([0.3, 0.1]).double())
    assert (found.errors["intercepts"] == 0).all()
    far = voronoi(replace(true, intercepts=torch.zeros(2, 1).double()), true)
    assert far.sizes.tolist() == [2, 0]
    assert torch.isnan(far.errors["slopes"][1])
    assert torch.isfinite(far.loss)


def test_leading_axes_are_independent():
    true = random_mixture("gelu", k=2)
    many = random_mixture("gelu", k=3, batch=(4,))
    found = voronoi(many, true)
    for i in range(4):
        alone = voronoi(many.map(lambda t, i=i: t[i]), true)
        torch.testing.assert_close(found.loss[i], alone.loss)
        assert torch.equal(found.sizes[i], alone.sizes)


def test_other_gates_cannot_be_compared():
    with pytest.raises(
        ValueError, match="`activation` 'gelu' has no parameters in common .*'tanh'"
    ):
        voronoi(random_mixture("gelu"), random_mixture("tanh"))
