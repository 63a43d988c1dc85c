import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.gates import (
    ACTIVATIONS,
    DenseToSparseGate,
    activation_slope,
    gate_scores,
)


def gate(activation="linear", *, d=3, k=4, temperature=1.0):
    torch.manual_seed(0)
    made = DenseToSparseGate(d, k, activation=activation, temperature=temperature).double()
    torch.nn.init.normal_(made.slopes)
    torch.nn.init.normal_(made.biases)
    return made


def reference(x, gate):
    """The formula, an input and a component at a time."""
    rows = []
    for one in x:
        scores = [
            (ACTIVATIONS[gate.activation](slope @ one) + bias) / gate.temperature
            for slope, bias in zip(gate.slopes, gate.biases, strict=True)
        ]
        exponentials = torch.stack(scores).exp()
        rows.append((exponentials / exponentials.sum()).log())
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_gate_is_the_softmax_of_the_formula(activation, temperature):
    made = gate(activation, temperature=temperature)
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(made(x), reference(x, made), rtol=1e-6, atol=1e-7)
    # The leading axes of hidden states (batch, positions, d).
    assert torch.equal(made(x[None, :, None])[0, :, 0], made(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    x, slopes, biases = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 2), (3, 2), (3,))
    )
    log_temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda *tensors: gate_scores(*tensors, activation).log_softmax(-1),
        (x, slopes, biases, log_temperature),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_slope_is_the_derivative(activation):
    at = torch.linspace(-3, 3, 11, dtype=torch.float64)
    difference = ACTIVATIONS[activation](at + 1e-6) - ACTIVATIONS[activation](at - 1e-6)
    torch.testing.assert_close(
        activation_slope(at, activation), difference / 2e-6, rtol=1e-6, atol=1e-8
    )
    with torch.no_grad():
        assert not activation_slope(at, activation).requires_grad


@settings(max_examples=25, deadline=None)
@given(
    shift=st.floats(-5, 5),
    factor=st.floats(0.1, 10),
    activation=st.sampled_from(["linear", "sigmoid", "tanh", "gelu", "silu"]),
)
def test_what_the_gate_leaves_open(shift, factor, activation):
    made, other = gate(activation), gate(activation)
    x = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        other.biases += shift
        torch.testing.assert_close(other(x), made(x))
        other.slopes *= factor
        other.biases *= factor
        other.set_temperature(factor)
        other.slopes += shift
    same = torch.allclose(other(x), made(x), atol=1e-5)
    if activation == "linear":
        assert same
    elif abs(factor - 1) > 0.2 or abs(shift) > 0.2:
        assert not same


def test_temperature_goes_from_dense_to_sparse():
    made = gate()
    x = torch.randn(20, 3, dtype=torch.float64)
    made.set_temperature(1e4)
    torch.testing.assert_close(made(x).exp(), torch.full((20, 4), 0.25).double(), atol=1e-3, rtol=0)
    made.set_temperature(1e-4)
    assert made(x).exp().amax(-1).min() > 0.999
    assert torch.isfinite(made(x)).all()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(value):
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got"):
        DenseToSparseGate(2, 2, temperature=value)
    made = gate(temperature=0.7)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got"):
        made.set_temperature(value)
    assert made.temperature == pytest.approx(0.7)


@pytest.mark.parametrize("value", [1e-21, 1e21])
def test_temperatures_beyond_the_range_of_float32_are_refused(value):
    with pytest.raises(
        ValueError, match="`temperature` must lie between 1e-20 and 1e\\+20, got 1e"
    ):
        DenseToSparseGate(2, 2, temperature=value)
    for extreme in (1e-20, 1e20):
        made = DenseToSparseGate(2, 2, temperature=extreme)
        with torch.no_grad():
            made.slopes.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        assert torch.isfinite(made(1e3 * torch.randn(20, 2)).exp()).all()


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"`activation` must be one of .*'sigmoid'.* got 'relu6'"):
        DenseToSparseGate(2, 2, activation="relu6")
