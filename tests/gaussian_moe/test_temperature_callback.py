import pytest
import torch
from mixtures import random_data, random_mixture
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_vqlogits.gaussian_moe import GaussianMoEConfig, GaussianMoEModel, TemperatureSchedule
from hf_vqlogits.gaussian_moe.temperature_callback import TemperatureCallback


class Watch(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.temperature)


def train(folder, model, **options):
    x, y = random_data(random_mixture(d=1, p=1), n=40)
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=8,
            **{"save_strategy": "no", **options},
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x.float(), y.float(), strict=True)],
        callbacks=[TemperatureCallback(TemperatureSchedule(4.0, 0.25)), watch],
    )
    return trainer, watch


def test_every_step_has_its_temperature_and_the_saved_model_the_last(tmp_path):
    model = GaussianMoEModel(GaussianMoEConfig())
    trainer, watch = train(tmp_path, model)
    trainer.train()
    schedule = TemperatureSchedule(4.0, 0.25)
    assert watch.seen == pytest.approx([schedule(step / 8) for step in range(8)])
    trainer.save_model(tmp_path / "model")
    assert GaussianMoEModel.from_pretrained(tmp_path / "model").temperature == pytest.approx(0.25)


def test_a_resumed_training_goes_on_where_it_was(tmp_path):
    torch.manual_seed(0)
    first = GaussianMoEModel(GaussianMoEConfig())
    trainer, _ = train(tmp_path, first, save_strategy="steps", save_steps=4)
    trainer.train()
    again, watch = train(tmp_path, GaussianMoEModel(GaussianMoEConfig()))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    schedule = TemperatureSchedule(4.0, 0.25)
    assert watch.seen == pytest.approx([schedule(step / 8) for step in range(4, 8)])


def test_a_learned_temperature_cannot_be_scheduled(tmp_path):
    trainer, _ = train(tmp_path, GaussianMoEModel(GaussianMoEConfig(learn_temperature=True)))
    with pytest.raises(ValueError, match="is learned .* cannot be scheduled as well; choose one"):
        trainer.train()


def test_a_model_without_gate_is_refused():
    callback = TemperatureCallback(TemperatureSchedule(2.0, 1.0))
    with pytest.raises(ValueError, match="Linear has no dense-to-sparse gate"):
        callback.on_train_begin(None, None, None, model=nn.Linear(1, 1))
