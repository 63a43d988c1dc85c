import logging

import pytest
import torch
from mixtures import random_data, random_mixture

from hf_vqlogits.gaussian_moe import (
    GaussianMoEConfig,
    GaussianMoEModel,
    TemperatureSchedule,
    fit_em,
    fitting,
)
from hf_vqlogits.gaussian_moe.em import EMResult


def lines(n=400):
    draw = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(n, 1, generator=draw) - 1
    left = torch.rand(n, 1, generator=draw) < torch.sigmoid(-4 * x)
    noise = 0.1 * torch.randn(n, 1, generator=draw)
    return x, torch.where(left, -1 - x, 2 + 3 * x) + noise


@pytest.mark.parametrize("activation", ["linear", "gelu", "sigmoid"])
@pytest.mark.parametrize("learn", [False, True])
def test_finds_the_components_from_kmeans(activation, learn):
    x, y = lines()
    model = GaussianMoEModel(
        GaussianMoEConfig(activation=activation, learn_temperature=learn, temperature=0.5)
    )
    report = fit_em(model, x, y, restarts=4)
    order = model.experts.intercepts[:, 0].argsort()
    slopes = model.experts.coefficients[order, 0, 0]
    torch.testing.assert_close(slopes.detach(), torch.tensor([-1.0, 3.0]), atol=0.1, rtol=0)
    found = float(model.log_density(x, y).mean().detach())
    assert report.log_likelihood == pytest.approx(found, abs=1e-4)
    assert report.collapsed == model.collapsed() == []
    assert (model.temperature != pytest.approx(0.5)) == learn


def test_multivariate_y_and_the_model_s_own_start():
    true = random_mixture("gelu", d=2, p=3, k=2)
    x, y = random_data(true, n=500)
    config = GaussianMoEConfig(input_size=2, output_size=3, activation="gelu")
    model = GaussianMoEModel(config).double()
    model.set_mixture(true)
    report = fit_em(model, x, y, start="model")
    assert report.history[0] == pytest.approx(float(true.log_density(x, y).mean()))
    assert report.log_likelihood > report.history[0]
    assert model.experts.intercepts.dtype == torch.float64


def test_a_schedule_leaves_its_last_temperature():
    x, y = lines()
    model = GaussianMoEModel(GaussianMoEConfig())
    fit_em(model, x, y, restarts=2, schedule=TemperatureSchedule(4.0, 0.5), steps=50)
    assert model.temperature == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_fit_and_more_starts_are_no_worse():
    x, y = lines()
    found = []
    for restarts in (1, 1, 6):
        model = GaussianMoEModel(GaussianMoEConfig(num_components=3))
        found.append(fit_em(model, x, y, restarts=restarts, steps=30).log_likelihood)
    assert found[0] == found[1]
    assert found[2] >= found[0] - 1e-3


def test_a_collapsed_component_is_named_and_the_model_still_works(caplog):
    x, y = lines(60)
    x[:15], y[:15] = 0.3, 9.0  # fifteen observations that are one point
    model = GaussianMoEModel(GaussianMoEConfig(num_components=3, min_deviation=0.02))
    with caplog.at_level(logging.WARNING):
        report = fit_em(model, x, y)
    assert len(report.collapsed) == 1
    assert report.collapsed == model.collapsed()
    assert "collapsed onto a few observations" in caplog.text
    assert torch.isfinite(model.log_density(x, y)).all()


def test_as_many_observations_as_components():
    x, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 5.0])
    model = GaussianMoEModel(GaussianMoEConfig(num_components=3))
    report = fit_em(model, x, y)
    assert torch.isfinite(model.log_density(x, y)).all()
    assert report.collapsed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "random"}, r"`start` must be one of \('kmeans', 'model'\), got 'random'"),
        ({"restarts": 0}, "`restarts` must be at least 1, got 0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    x, y = lines()
    with pytest.raises(ValueError, match=message):
        fit_em(GaussianMoEModel(GaussianMoEConfig()), x, y, **options)


def test_impossible_data_leave_the_model_as_it_was():
    x, y = lines()
    model = GaussianMoEModel(GaussianMoEConfig(num_components=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y[3] = torch.inf
    for data, message in (
        ((x, y), "`y` holds 1 values that are NaN or infinite, the first in row 3"),
        ((x[:2], y[:2]), "2 observations cannot tell 3 components apart"),
        ((x[:9], y[:8]), "every observation needs both"),
        ((x.expand(-1, 2), y), r"`x` must have the shape \(N, 1\)"),
        ((x[None], y[None]), r"`x` must have the shape \(N, 1\), got \(1, 400, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_em(model, *data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (-2e6, 30.0), (0.0, 1e-9)])
def test_data_elsewhere_and_of_another_size_are_fitted_alike(offset, scale, learn):
    x, y = (values.double() for values in lines())
    config = {"learn_temperature": learn, "temperature": 0.5}
    near = GaussianMoEModel(GaussianMoEConfig(**config)).double()
    far = GaussianMoEModel(GaussianMoEConfig(**config, min_deviation=1e-3 * scale)).double()
    moved, grown = scale * x + offset, scale * y - offset
    one, other = fit_em(near, x, y, restarts=3), fit_em(far, moved, grown, restarts=3)
    shift = torch.tensor(scale).double().log()
    assert other.log_likelihood == pytest.approx(one.log_likelihood - float(shift), abs=1e-5)
    assert other.history[0] == pytest.approx(one.history[0] - float(shift), abs=1e-5)
    found = float(far.log_density(moved, grown).mean().detach())
    assert found == pytest.approx(other.log_likelihood, abs=1e-5)
    gates = near(x).gates, far(moved).gates
    torch.testing.assert_close(gates[1], gates[0], atol=1e-3, rtol=0)


def test_a_line_far_from_zero_is_a_line():
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(500, 1, generator=draw).double() - 0.5
    x = 1e4 + 10 * u
    y = 3 * u + 0.1 * torch.randn(500, 1, generator=draw)
    model = GaussianMoEModel(GaussianMoEConfig(num_components=1)).double()
    fit_em(model, x, y)
    assert float(model.experts.coefficients.detach()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e12])
def test_y_on_a_line_collapses_without_an_error(scale, caplog):
    x, y = lines()
    model = GaussianMoEModel(GaussianMoEConfig(output_size=2)).double()
    both = scale * torch.cat([y, 2 * y], 1).double()
    with caplog.at_level(logging.WARNING):
        report = fit_em(model, x, both, restarts=2)
    assert report.collapsed == model.collapsed() == [0, 1]
    assert torch.isfinite(torch.tensor(report.history)).all()
    assert torch.isfinite(model.log_density(x, both)).all()


def test_what_the_type_of_the_model_cannot_hold_is_refused_and_nothing_lost():
    x, y = (values.double() for values in lines())
    model = GaussianMoEModel(GaussianMoEConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"no numbers of the model's type, torch.float32"):
        fit_em(model, x, 1e160 * y)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    wide = model.double()
    report = fit_em(wide, x, 1e160 * y)
    found = float(wide.log_density(x, 1e160 * y).mean().detach())
    assert found == pytest.approx(report.log_likelihood)


def test_a_start_that_did_not_end_in_numbers_is_never_the_likeliest():
    def ended(*log_likelihoods):
        history = torch.tensor([log_likelihoods]).double()
        return EMResult(random_mixture(), history, history[0] > 0)

    assert fitting._likeliest(ended(float("nan"), -2.0, -1.0, float("inf"))) == 2
    with pytest.raises(ValueError, match="No start of the fit ended in numbers"):
        fitting._likeliest(ended(float("nan"), -float("inf")))


def test_what_rounding_costs_is_told(caplog):
    x, y = lines()
    far = x.double() + 1e6
    with caplog.at_level(logging.WARNING):
        fit_em(GaussianMoEModel(GaussianMoEConfig()), far, y, restarts=2)
    assert "nats an observation, but" in caplog.text
    assert "Subtract a constant, or fit `model.double()`" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_em(GaussianMoEModel(GaussianMoEConfig()).double(), far, y, restarts=2)
    assert not caplog.text


def test_what_16_bits_cost_is_told(caplog):
    x, y = lines()
    with caplog.at_level(logging.WARNING):
        fit_em(GaussianMoEModel(GaussianMoEConfig()).bfloat16(), x + 10, y, restarts=2)
    assert "in the model's type, torch.bfloat16" in caplog.text


def test_learned_and_scheduled_contradict():
    x, y = lines()
    model = GaussianMoEModel(GaussianMoEConfig(learn_temperature=True))
    with pytest.raises(ValueError, match="`schedule` sets .* choose one"):
        fit_em(model, x, y, schedule=TemperatureSchedule(2.0, 1.0))
