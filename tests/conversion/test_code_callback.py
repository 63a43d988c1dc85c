"""Codes learnt while Trainer trains."""

import pytest
import torch
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_vqlogits.conversion.code_callback import LearnCodesCallback
from hf_vqlogits.conversion.errors import ConversionError


@pytest.fixture
def texts():
    """Rows of tokens in which each follows from the one before."""
    starts = torch.randint(3, 20, (48, 1), generator=torch.Generator().manual_seed(1))
    ids = 3 + (starts + 5 * torch.arange(20)) % (VOCABULARY - 3)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def model(make_model):
    model = make_model("gpt2", num_codebooks=40)
    model.lm_head.codebook.data /= 8
    return model


@pytest.fixture
def make_trainer(texts, tmp_path):
    def make(model, *callbacks, **options):
        options = {"max_steps": 8, "save_strategy": "no", "learning_rate": 1e-4} | options
        arguments = TrainingArguments(
            tmp_path / "run",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            lr_scheduler_type="constant",
            per_device_train_batch_size=16,
            train_sampling_strategy="sequential",
            **options,
        )
        return Trainer(
            model, arguments, train_dataset=texts, eval_dataset=texts, callbacks=[*callbacks]
        )

    return make


def test_codes_are_learnt_and_saved(model, make_trainer, tmp_path):
    codes = model.lm_head.codes.clone()
    callback = LearnCodesCallback(every=3)
    trainer = make_trainer(model, callback, gradient_accumulation_steps=2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert [move.step for move in callback.history] == [3, 6]
    # Steps of 32, 16 (the epoch ends) and 32 rows, in which 16 or 17 of 19 positions are summed.
    assert callback.history[0].positions == 80 * (19 - 3)
    assert any(move.taken for move in callback.history)
    assert not torch.equal(model.lm_head.codes, codes)
    assert not model.lm_head._forward_pre_hooks
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.95 * before

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.lm_head.codes, model.lm_head.codes)


def test_a_resumed_training_goes_on_as_if_uninterrupted(make_model, make_trainer, tmp_path):
    def fresh():
        model = make_model("gpt2", num_codebooks=40)
        model.lm_head.codebook.data /= 8
        return model

    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole, callback = fresh(), LearnCodesCallback(every=4)
    make_trainer(whole, callback, **options).train()
    resumed, again = fresh(), LearnCodesCallback(every=4)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    make_trainer(resumed, again, **options).train(resume_from_checkpoint=checkpoint)
    assert callback.history[0].taken
    assert [move.step for move in callback.history] == [4, 8]
    assert again.history == callback.history[1:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_keeps_the_damping(model, make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    callback = LearnCodesCallback(every=5, damping=7.0)
    make_trainer(model, callback, **options).train()
    options |= {"max_steps": 3, "restore_callback_states_from_checkpoint": True}
    trainer = make_trainer(model, LearnCodesCallback(every=1), **options)
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    (restored,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, LearnCodesCallback)
    )
    assert restored.damping == 7.0
    assert restored.history == []  # `every` is that of the checkpoint as well


def test_a_resumed_training_gives_up_what_was_given_up(model, make_trainer, tmp_path, monkeypatch):
    def worse(head, *_):
        head.codes.bitwise_not_()

    monkeypatch.setattr("hf_vqlogits.conversion.code_training.move_codes", worse)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    callback = LearnCodesCallback(every=2, damping=32.0)
    make_trainer(model, callback, **options).train()
    assert [move.taken for move in callback.history] == [False]
    assert callback.damping == 64.0
    options |= {"max_steps": 6, "restore_callback_states_from_checkpoint": True}
    trainer = make_trainer(model, LearnCodesCallback(every=2), **options)
    trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    (restored,) = (
        c for c in trainer.callback_handler.callbacks if isinstance(c, LearnCodesCallback)
    )
    assert (restored.damping, restored.history) == (64.0, [])


def test_a_training_too_short_for_a_move_is_told(model, make_trainer, caplog):
    make_trainer(model, LearnCodesCallback(every=9)).train()
    assert "The codes were never moved: the training ended after 8 steps" in caplog.text


def test_losses_that_do_not_pass_through_the_head_are_refused(model, make_trainer):
    callback = LearnCodesCallback(every=2)
    trainer = make_trainer(model, callback, label_smoothing_factor=0.1)
    with pytest.raises(ConversionError, match="`label_smoothing_factor`, does not pass through"):
        trainer.train()


def test_models_that_cannot_learn_are_refused(make_model, make_trainer):
    model = make_model("gpt2", code_type="index", num_codebooks=3, codebook_size=5)
    with pytest.raises(ConversionError, match="sign codes only"):
        make_trainer(model, LearnCodesCallback()).train()
    with pytest.raises(ValueError, match="`every` is 0"):
        make_trainer(make_model("gpt2"), LearnCodesCallback(every=0)).train()
