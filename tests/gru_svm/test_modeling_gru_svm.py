import sys
from copy import deepcopy
from subprocess import run

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_vqlogits.gru_svm import GRUSVMConfig, GRUSVMForSequenceClassification

LOSSES = ("squared_hinge", "cross_entropy")


@pytest.fixture
def make():
    """Builder of tiny models with perturbed weights, in evaluation mode."""

    def build(**fields):
        torch.manual_seed(0)
        fields = {"sequence_length": 5, "input_size": 2, "hidden_size": 7} | fields
        model = GRUSVMForSequenceClassification(GRUSVMConfig(**fields)).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        return model

    return build


def rows(count, steps=5, size=2, seed=3):
    return torch.randn(count, steps, size, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_scores(model, inputs):
    """The network in float64, a step at a time; Cho et al. (2014) as PyTorch writes it."""
    state = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    found = []
    for row in np.asarray(inputs, dtype=np.float64):
        h = np.zeros(model.config.hidden_size)
        for x in row:
            i = state["gru.weight_ih_l0"] @ x + state["gru.bias_ih_l0"]
            j = state["gru.weight_hh_l0"] @ h + state["gru.bias_hh_l0"]
            (ir, iz, i_new), (jr, jz, j_new) = np.split(i, 3), np.split(j, 3)
            z = sigmoid(iz + jz)
            h = (1 - z) * np.tanh(i_new + sigmoid(ir + jr) * j_new) + z * h
        found.append(state["classifier.weight"] @ h + state["classifier.bias"])
    return np.array(found)


@pytest.mark.parametrize("output_loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_logits_and_loss_equal_a_float64_reference(make, output_loss, classes):
    model = make(output_loss=output_loss, num_labels=classes, svm_c=0.7)
    labels = torch.tensor([0, 1, classes - 1, -100])
    output = model(rows(4), labels=labels)
    scores = reference_scores(model, rows(4))
    binary = scores.shape[1] == 1
    assert binary == (output_loss == "squared_hinge" and classes == 2)
    logits = np.concatenate([-scores, scores], 1) if binary else scores
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-6)
    real = labels[:3].numpy()
    if output_loss == "cross_entropy":
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        wanted = -np.log(shares[np.arange(3), real]).mean()
    else:
        one_hot = real[:, None] == (np.array([1]) if binary else np.arange(classes))
        margins = np.maximum(0, 1 - np.where(one_hot, 1, -1) * scores[:3])
        weight = model.classifier.weight.detach().double().numpy()
        wanted = 0.5 * (weight**2).sum() + 0.7 * (margins**2).sum()
    assert output.loss.item() == pytest.approx(wanted, rel=1e-5)


def test_two_classes_are_told_apart_by_the_sign(make):
    model = make()
    # Between two rows' scores: a score of zero would be told by its rounding.
    model.classifier.bias.data -= model(rows(50)).logits[:, 1].detach().sort().values[24:26].mean()
    logits = model(rows(50)).logits
    signs = torch.from_numpy(reference_scores(model, rows(50))[:, 0] > 0)
    assert 20 < int(signs.sum()) < 30
    assert torch.equal(logits.argmax(-1) == 1, signs)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.zero_()
    assert model(rows(1)).logits.argmax(-1).tolist() == [0]


def test_one_value_a_step_needs_no_dimension(make):
    model = make(input_size=1)
    inputs = rows(3, size=1)
    assert torch.equal(model(inputs).logits, model(inputs[..., 0]).logits)


@pytest.mark.parametrize("filler", [0.0, 9.0, float("nan")])
def test_padding_changes_nothing(make, filler):
    model = make(sequence_length=None)
    short, long = rows(1, steps=3), rows(1, steps=6, seed=4)
    padded = torch.cat([torch.cat([short, torch.full((1, 3, 2), filler)], 1), long])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    logits = model(padded, attention_mask=mask).logits
    alone = torch.cat([model(short).logits, model(long).logits])
    torch.testing.assert_close(logits, alone)
    model(padded, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("output_loss", LOSSES)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(make, output_loss):
    whole = make(output_loss=output_loss)
    parts = deepcopy(whole)
    inputs, labels = rows(8), torch.tensor([0, 1, 1, -100, 1, 0, 1, 1])
    whole(inputs, labels=labels).loss.backward()
    for part in (slice(0, 3), slice(3, 8)):
        items = torch.tensor(7)
        parts(inputs[part], labels=labels[part], num_items_in_batch=items).loss.backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("output_loss", LOSSES)
def test_a_batch_of_one_class_or_without_labels_that_count(make, output_loss):
    model = make(output_loss=output_loss)
    for label in (0, 1, -100):
        loss = model(rows(3), labels=torch.full((3,), label)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("output_loss", LOSSES)
def test_trainer_survives_a_batch_without_labels_that_count(make, tmp_path, output_loss):
    model = make(output_loss=output_loss).train()
    inputs, labels = rows(6), [-100, -100, -100, 0, 1, -100]
    data = [
        {"input_values": one, "labels": torch.tensor(label)}
        for one, label in zip(inputs, labels, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=3,
        train_sampling_strategy="sequential",
        logging_nan_inf_filter=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    before = deepcopy(model.state_dict())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == 0
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("output_loss", LOSSES)
def test_labels_of_any_integers(make, output_loss):
    model, labels = make(output_loss=output_loss), torch.tensor([0, 1, 1])
    wanted = model(rows(3), labels=labels).loss
    for dtype in (torch.int8, torch.uint8, torch.int32):
        assert torch.equal(model(rows(3), labels=labels.to(dtype)).loss, wanted)


@pytest.mark.parametrize("output_loss", LOSSES)
def test_a_compiled_model_refuses_labels_and_padding_too(make, output_loss):
    model = make(output_loss=output_loss)
    compiled = torch.compile(model, backend="eager")
    labels, mask = torch.tensor([0, 1, -100]), torch.ones(3, 5)
    torch.testing.assert_close(
        compiled(rows(3), mask, labels=labels).loss, model(rows(3), mask, labels=labels).loss
    )
    with pytest.raises(RuntimeError, match="`labels` must lie between 0 and 1"):
        compiled(rows(3), mask, labels=torch.tensor([0, 1, 7]))
    mask[1, 0] = 0
    with pytest.raises(RuntimeError, match="`attention_mask` of every row must be 1"):
        compiled(rows(3), mask, labels=labels)


def test_dropout_only_in_training(make):
    model = make(dropout=0.5)
    assert torch.equal(model(rows(3)).logits, model(rows(3)).logits)
    model.train()
    assert not torch.equal(model(rows(3)).logits, model(rows(3)).logits)


@pytest.mark.parametrize(
    ("inputs", "more", "error", "message"),
    [
        (rows(2, steps=4), {}, ValueError, r"\(rows, 5 time steps, 2 values\).*got \(2, 4, 2\)"),
        (rows(2, size=3), {}, ValueError, r"got \(2, 5, 3\)"),
        (rows(2)[..., 0], {}, ValueError, r"got \(2, 5\)"),
        (rows(2), {"labels": torch.tensor([0, 2])}, ValueError, "between 0 and 1.*got 2 in row 1"),
        (rows(2), {"labels": torch.tensor([0.0, 1.0])}, TypeError, "must be integers"),
        (
            rows(2),
            {"attention_mask": torch.ones(2, 4)},
            ValueError,
            r"`attention_mask` must have the shape \(2, 5\).*got \(2, 4\)",
        ),
        (
            rows(2),
            {"attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])},
            ValueError,
            "of row 1 must be 1 for the real steps.*0, 1, 1, 1, 1",
        ),
        (
            rows(1),
            {"attention_mask": torch.zeros(1, 5)},
            ValueError,
            "of row 0 .*at least one",
        ),
    ],
)
@pytest.mark.parametrize("output_loss", LOSSES)
def test_bad_input_is_refused(make, output_loss, inputs, more, error, message):
    with pytest.raises(error, match=message):
        make(output_loss=output_loss)(inputs, **more)


@pytest.mark.parametrize("output_loss", LOSSES)
def test_survives_saving(make, tmp_path, output_loss):
    model = make(output_loss=output_loss)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is GRUSVMForSequenceClassification
    assert torch.equal(loaded(rows(3)).logits, model(rows(3)).logits)
    assert set(load_file(tmp_path / "model.safetensors")) == {
        *(f"gru.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")),
        "classifier.weight",
        "classifier.bias",
    }


def test_fields_given_at_loading_are_checked(make, tmp_path):
    make().save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    assert load(tmp_path, svm_c=2.0).config.svm_c == 2.0
    for field, value in {
        "output_loss": "hinge",
        "svm_c": -1.0,
        "problem_type": "regression",
    }.items():
        with pytest.raises(ValueError, match=f"`{field}` must be .* got '?{value}"):
            load(tmp_path, **{field: value})


def test_a_damaged_checkpoint_is_refused(make, tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save = lambda found: save_file(found, file, {"format": "pt"})  # noqa: E731
    save({n: t for n, t in tensors.items() if n != "classifier.bias"})
    with pytest.raises(ValueError, match="lacks classifier.bias: .*not a GRU-SVM checkpoint"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    save({**tensors, "classifier.weight": torch.zeros(3, 7)})
    with pytest.raises(ValueError, match=r"classifier.weight is \(3, 7\) instead of \(1, 7\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    save({**tensors, "second.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="holds second.weight, of which its config.json knows"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_initial_weights():
    torch.manual_seed(0)
    model = GRUSVMForSequenceClassification(GRUSVMConfig(hidden_size=64))
    block = model.gru.weight_hh_l0[:64]
    torch.testing.assert_close(block @ block.T, torch.eye(64), atol=1e-5, rtol=0)
    assert model.gru.bias_ih_l0.tolist() == [1.0] * 128 + [0.0] * 64
    assert not model.gru.bias_hh_l0.any()
    assert 0.01 < model.classifier.weight.std().item() < 0.03


@pytest.mark.parametrize("output_loss", LOSSES)
def test_trainer_with_accumulation_equals_whole_batches(make, tmp_path, output_loss):
    inputs = rows(32)
    labels = (inputs.sum((1, 2)) > 0).long()
    data = [{"input_values": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    trained = []
    for batch, parts in ((16, 1), (4, 4)):
        model = make(output_loss=output_loss, dropout=0)
        arguments = TrainingArguments(
            tmp_path,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            max_steps=12,
            learning_rate=0.03,
            max_grad_norm=0,
            optim="sgd" if output_loss == "cross_entropy" else "adamw_torch",
            seed=1,
            logging_steps=1,
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        trained.append(model)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_importing_the_package_registers_it_without_extras():
    # None in `sys.modules` makes a package missing, for `import` and for `find_spec`.
    code = """
import sys
for name in ("sklearn", "scipy", "pandas", "onnx", "onnxscript", "onnxruntime", "matplotlib"):
    sys.modules[name] = None
import hf_vqlogits
from transformers import AutoConfig, AutoModelForSequenceClassification
config = AutoConfig.for_model("gru_svm", hidden_size=4)
print(type(AutoModelForSequenceClassification.from_config(config)).__name__)
"""
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "GRUSVMForSequenceClassification", done.stderr
