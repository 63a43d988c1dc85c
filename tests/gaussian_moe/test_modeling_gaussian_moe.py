import subprocess
import sys

import pytest
import torch
from mixtures import random_data, random_mixture
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Trainer, TrainingArguments

from hf_vqlogits.gaussian_moe import GaussianMoEConfig, GaussianMoEModel, fit_em
from hf_vqlogits.gaussian_moe.mixture import TENSORS

SIZES = {"input_size": 2, "output_size": 2, "num_components": 3}


def model_of(mixture, **fields):
    made = GaussianMoEModel(GaussianMoEConfig(**SIZES, activation=mixture.activation, **fields))
    made = made.double()
    made.set_mixture(mixture)
    return made


def rows(x, y):
    return [{"x": a, "labels": b} for a, b in zip(x.float(), y.float(), strict=True)]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"per_device_train_batch_size": 50, "learning_rate": 0.05, **options},
    )


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_forward_is_the_mixture(activation):
    mixture = random_mixture(activation)
    x, y = random_data(mixture)
    made = model_of(mixture)
    output = made(x, labels=y)
    torch.testing.assert_close(output.loss, -mixture.log_density(x, y).mean())
    torch.testing.assert_close(output.prediction, mixture.mean(x))
    torch.testing.assert_close(output.gates.sum(-1), torch.ones(40).double())
    assert output.gates.shape == (40, 3)
    assert output.means.shape == (40, 3, 2)
    torch.testing.assert_close(made.log_density(x, y), mixture.log_density(x, y))
    shares = (mixture.log_joint(x, y) - mixture.log_density(x, y)[:, None]).exp()
    torch.testing.assert_close(made.responsibilities(x, y), shares)
    assert made(x).loss is None
    assert len(made(x, return_dict=False)) == 3


def test_vectors_are_one_column():
    torch.manual_seed(0)
    made = GaussianMoEModel(GaussianMoEConfig())
    x, y = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(made(x, labels=y).loss, made(x[:, None], labels=y[:, None]).loss)
    assert made.sample(x).shape == (5, 1)


def test_loads_through_the_auto_classes_with_the_temperature_it_had(tmp_path):
    mixture = random_mixture("tanh")
    made = model_of(mixture)
    made.gate.set_temperature(0.37)
    made.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "gate.slopes",
        "gate.biases",
        "gate.log_temperature",
        "experts.coefficients",
        "experts.intercepts",
        "experts.log_factors",
    }
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, GaussianMoEModel)
    assert loaded.temperature == pytest.approx(0.37)
    assert loaded.config.temperature == pytest.approx(0.37)
    for name in TENSORS:
        kept, there = (getattr(m.mixture(), name).double() for m in (made, loaded))
        torch.testing.assert_close(kept, there)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "truncated"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    model_of(random_mixture()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing":
        del tensors["gate.biases"]
    elif damage == "extra":
        tensors["gate.more"] = torch.zeros(3)
    elif damage == "shape":
        tensors["gate.biases"] = torch.zeros(4)
    save_file(tensors, file, {"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    message = {
        "missing": "lacks gate.biases",
        "extra": "holds unknown gate.more",
        "shape": r"gate.biases is \(4,\) instead of \(3,\)",
        "truncated": "truncated or damaged",
    }[damage]
    with pytest.raises(ValueError, match=message):
        GaussianMoEModel.from_pretrained(tmp_path)


def test_fields_given_at_loading_count_and_are_checked(tmp_path):
    GaussianMoEModel(GaussianMoEConfig(**SIZES, temperature=0.5)).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, temperature=0.25)
    assert loaded.temperature == pytest.approx(loaded.config.temperature) == pytest.approx(0.25)
    other = GaussianMoEConfig(**SIZES, temperature=3.0)
    loaded = AutoModel.from_pretrained(tmp_path, config=other)
    assert loaded.temperature == pytest.approx(loaded.config.temperature) == pytest.approx(3.0)
    for field, value in {"min_deviation": -1.0, "temperature": 0.0}.items():
        with pytest.raises(ValueError, match=f"`{field}` must be positive and finite, got {value}"):
            AutoModel.from_pretrained(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=r"gate.biases is \(3,\) instead of \(4,\)"):
        AutoModel.from_pretrained(tmp_path, num_components=4)
    remade = AutoModel.from_pretrained(tmp_path, num_components=4, ignore_mismatched_sizes=True)
    assert remade(torch.randn(3, 2)).gates.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_precision_it_computes_in_float32(tmp_path, dtype):
    mixture = random_mixture("gelu")
    x, y = (values.float() for values in random_data(mixture))
    model_of(mixture).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    exact = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    exact.load_state_dict(loaded.state_dict())  # rounded alike
    for made in (loaded, exact):
        made(x, labels=y).loss.backward()
    torch.testing.assert_close(loaded(x, labels=y).loss, exact(x, labels=y).loss)
    for one, other in zip(loaded.parameters(), exact.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad.to(dtype))
    before = -float(loaded(x, labels=y).loss)
    assert fit_em(loaded, x, y, start="model").log_likelihood > before
    assert loaded.dtype == dtype


def test_autocast_loses_no_accuracy():
    mixture = random_mixture("linear")
    x, y = (values.float() for values in random_data(mixture))
    made = model_of(mixture).float()

    def everything():
        drawn = made.sample(x, torch.Generator().manual_seed(0))
        more = made.log_density(x, y), made.responsibilities(x, y), drawn
        return *made(x, labels=y).to_tuple(), *more

    wanted = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_components_begin_different_and_the_same_seed_begins_the_same():
    torch.manual_seed(1)
    one = GaussianMoEModel(GaussianMoEConfig(**SIZES))
    torch.manual_seed(1)
    other = GaussianMoEModel(GaussianMoEConfig(**SIZES))
    assert torch.equal(one.experts.intercepts, other.experts.intercepts)
    assert not torch.equal(one.experts.intercepts[0], one.experts.intercepts[1])


def test_gradient_descent_cannot_make_a_component_collapse():
    torch.manual_seed(0)
    made = GaussianMoEModel(GaussianMoEConfig(num_components=2, min_deviation=0.05))
    x, y = torch.randn(50), torch.randn(50)
    y[:25] = 1.5
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(700):
        loss = made(x, labels=y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert (made.experts.factors >= 0.05).all()
    assert made.collapsed() == [1]


def test_bad_input_is_refused():
    made = model_of(random_mixture())
    x, y = random_data(random_mixture())
    with pytest.raises(ValueError, match=r"`x` must have the shape \(N, 2\)"):
        made(x[:, :1])
    with pytest.raises(ValueError, match="`x` has 40 rows and `labels` 39"):
        made(x, labels=y[:-1])
    for name in ("x", "labels"):
        bad = {"x": x.clone(), "labels": y.clone()}
        bad[name][7, 0] = torch.nan
        with pytest.raises(ValueError, match=f"`{name}` holds 1 values .* first in row 7"):
            made(**bad)
    with pytest.raises(ValueError, match="`activation` is 'gelu', the model's 'linear'"):
        made.set_mixture(random_mixture("gelu"))


@pytest.mark.parametrize("learn", [False, True])
def test_trainer_fits_it(tmp_path, learn):
    mixture = random_mixture("gelu")
    x, y = random_data(mixture, n=400)
    torch.manual_seed(0)
    made = GaussianMoEModel(
        GaussianMoEConfig(**SIZES, activation="gelu", temperature=0.8, learn_temperature=learn)
    )
    trainer = Trainer(
        made,
        arguments(tmp_path, num_train_epochs=25, per_device_eval_batch_size=400),
        train_dataset=rows(x, y),
        eval_dataset=rows(x, y),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.5
    assert after == pytest.approx(float(made(x, labels=y).loss.detach()), abs=1e-4)
    assert (made.temperature == pytest.approx(0.8)) != learn


def test_compiles():
    mixture = random_mixture("gelu")
    x, y = random_data(mixture)
    made = model_of(mixture)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, labels=y).loss, made(x, labels=y).loss)
    x[1, 0] = torch.nan
    with pytest.raises(RuntimeError, match="`x` holds values that are NaN or infinite"):
        compiled(x, labels=y)


def test_importing_the_package_registers_without_trainer():
    code = (
        "import sys, hf_vqlogits; from transformers import AutoConfig; "
        "AutoConfig.for_model('gaussian_moe'); "
        "assert 'hf_vqlogits.gaussian_moe.temperature_callback' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
