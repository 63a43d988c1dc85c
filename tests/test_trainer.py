import math

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, reference_logits
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_vqlogits import VQLogitsForCausalLM


@pytest.fixture
def texts():
    """Eight rows of tokens in which each follows from the one before, some not to be learnt."""
    starts = torch.randint(3, 20, (8, 1), generator=torch.Generator().manual_seed(1))
    ids = 3 + (starts + 5 * torch.arange(10)) % (VOCABULARY - 3)
    labels = ids.clone()
    labels[::3, :4] = -100
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, texts, *, compute_metrics=None, **options):
        options = {
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 3,
        } | options
        arguments = TrainingArguments(
            tmp_path / "run",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            lr_scheduler_type="constant",
            per_device_eval_batch_size=3,
            **options,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=texts,
            eval_dataset=texts,
            compute_metrics=compute_metrics,
        )

    return make


def stacked(texts):
    return {name: torch.stack([t[name] for t in texts]) for name in texts[0]}


def reference_rows(model, batch):
    """Logits in float64 of the positions that predict a token, and those tokens."""
    hidden = model.model(batch["input_ids"]).last_hidden_state
    logits = reference_logits(model.lm_head, hidden)[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    return logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_training_lowers_the_loss_of_all_parts(make_model, make_trainer, texts, tmp_path, family):
    model = make_model(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    codes = model.lm_head.codes.clone()
    trainer = make_trainer(model, texts, max_steps=15)
    losses = [h["loss"] for h in trainer.train() and trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(model.lm_head.codes, codes)

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    batch = stacked(texts)
    assert type(loaded) is VQLogitsForCausalLM
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_training_switches_the_cache_off(make_model, make_trainer, texts):
    model = make_model("llama")
    make_trainer(model, texts)
    assert model.model.backbone.config.use_cache is False


def test_accumulated_steps_count_every_token_once(make_model, make_trainer, texts):
    # Rows have different numbers of labels: a mean of the two halves' means would be another.
    logged = []
    for batch, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_model("llama"),
            texts,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        logged.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    logits, labels = reference_rows(make_model("llama"), stacked(texts))
    assert logged[0][0] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_label_smoothing_shifts_labels(make_model, make_trainer, texts, training):
    model = make_model("llama")
    trainer = make_trainer(model, texts, label_smoothing_factor=0.2)
    model.train(training)
    loss = trainer.compute_loss(model, stacked(texts))
    logits, labels = reference_rows(model, stacked(texts))
    logs = logits.log_softmax(-1)
    right, uniform = -logs[torch.arange(len(labels)), labels].mean(), -logs.mean()
    assert float(loss.detach()) == pytest.approx(float(0.8 * right + 0.2 * uniform), rel=1e-3)


def test_label_smoothing_trains(make_model, make_trainer, texts):
    trainer = make_trainer(make_model("llama"), texts, label_smoothing_factor=0.1, max_steps=10)
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_gives_the_loss_and_gathers_no_logits(make_model, make_trainer, texts):
    model = make_model("llama")
    trainer = make_trainer(model, texts)
    steps = []
    original = trainer.prediction_step

    def watched(*args, **kwargs):
        steps.append(original(*args, **kwargs))
        return steps[-1]

    trainer.prediction_step = watched
    loss = trainer.evaluate()["eval_loss"]
    assert all(logits is None for _, logits, _ in steps)
    parts = [stacked(texts[i : i + 3]) for i in (0, 3, 6)]
    means = [float(cross_entropy(*reference_rows(model, part))) for part in parts]
    assert loss == pytest.approx(np.average(means, weights=[3, 3, 2]), rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_predictions_are_logits_without_the_cache(make_model, make_trainer, texts, family):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"first": float(prediction.predictions[0, 0, 0])}

    model = make_model(family)
    trainer = make_trainer(model, texts, compute_metrics=compute_metrics)
    model.config.use_cache = True
    assert math.isfinite(trainer.evaluate()["eval_first"])
    assert seen["logits"].shape == (8, 10, VOCABULARY)
    wanted = model(stacked(texts)["input_ids"]).logits.detach().numpy()
    np.testing.assert_allclose(seen["logits"], wanted, atol=2e-2, rtol=1e-2)


def test_evaluation_without_logits_on_request(make_model, make_trainer, texts):
    model = make_model("llama")
    trainer = make_trainer(model, texts, prediction_loss_only=True)
    wanted = trainer.evaluate()["eval_loss"]
    original, skipped = model.forward, []

    def forward(*args, **kwargs):
        outputs = original(*args, skip_logits=True, **kwargs)
        skipped.append(outputs.logits is None)
        return outputs

    model.forward = forward
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert skipped == [True] * 3


@pytest.mark.parametrize("option", ["bf16", "activation_checkpointing"])
def test_options_of_the_trainer(make_model, make_trainer, texts, option):
    trainer = make_trainer(make_model("llama"), texts, max_steps=10, **{option: True})
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mode", ["vq", "tied"])
def test_quantised_input_embeddings_train_and_reload(
    make_model, make_trainer, texts, mode, tmp_path
):
    model = make_model("gpt2", embeddings=mode)
    options = {"max_steps": 6, "neftune_noise_alpha": 0.1, "activation_checkpointing": True}
    trainer = make_trainer(model, texts, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert loaded.config.embeddings == mode
    again = make_trainer(loaded, texts).evaluate()["eval_loss"]
    assert again == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("bits", [19, 8])
def test_training_leaves_smaller_heads_inside_alone(
    make_model, make_trainer, texts, tmp_path, bits
):
    model = make_model("gpt2", nested_codebooks=[4, 8])
    model.keep_codebooks(bits)
    codebook, inside = model.lm_head.codebook_4.clone(), model.config.nested_codebooks
    trainer = make_trainer(model, texts, max_steps=6)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert loaded.config.nested_codebooks == inside
    assert torch.equal(loaded.lm_head.codebook_4, codebook)
    again = make_trainer(loaded, texts).evaluate()["eval_loss"]
    assert again == pytest.approx(after, rel=1e-5)
