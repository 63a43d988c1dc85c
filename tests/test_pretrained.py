import copy

import pytest
import torch
from tiny import text_config
from transformers import AutoModelForCausalLM

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsHead

NESTED = {"num_codebooks": 19, "num_fine_tokens": 8, "nested_codebooks": [4, 8]}


@pytest.mark.parametrize("embeddings", ["keep", "vq"])
@pytest.mark.parametrize("bits", [4, 8, 19])
def test_cut_to_a_smaller_head(make_model, ids, tmp_path, embeddings, bits):
    model = make_model("llama", **NESTED, embeddings=embeddings)
    hidden = model.model(ids).last_hidden_state
    head = copy.deepcopy(model.lm_head)
    head.keep_codebooks(bits)
    model.keep_codebooks(bits)
    assert torch.equal(model(ids).logits, head(hidden))
    inside = [b for b in (4, 8) if b < bits]
    assert (model.config.num_codebooks, model.config.nested_codebooks) == (bits, inside)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for field in ("num_codebooks", "nested_codebooks", "embedding_codebooks"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert model.lm_head.codebook.grad.shape == (bits, 32)


def test_cut_to_a_size_that_is_not_there(make_model):
    model = make_model("llama", **NESTED)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in (model, model.model):
        with pytest.raises(ValueError, match="`num_codebooks` 5 .* there are 4, 8 and 19 in the m"):
            part.keep_codebooks(5)
    assert model.config.num_codebooks == 19
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_fields_given_at_loading_are_checked(make_model, tmp_path):
    model = make_model("llama")
    model.split_head(2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gate_temperature=0.5)
    assert loaded.lm_head.gate_temperature == loaded.config.gate_temperature == 0.5
    for field, value in {
        "gate_temperature": 0.0,
        "gate_activation": "relu",
        "logit_scale": -1.0,
        "output_loss": "squared_hinge",
    }.items():
        with pytest.raises(ValueError, match=f"`{field}`.* got '?{value}"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **{field: value})


def test_loading_does_not_draw_the_head_anew(make_model, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(VQLogitsHead, "initial_tensors", lambda self: pytest.fail("drawn anew"))
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_fresh_models_hold_valid_codes(ids):
    config = VQLogitsConfig(text_config=text_config("llama"), num_codebooks=19)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.check_codes()
    assert len(model.lm_head.codes.unique(dim=0)) > 50
    assert model(ids).logits.isfinite().all()
    with torch.device("meta"):
        assert VQLogitsForCausalLM(config).lm_head.codes.is_meta


def test_from_config_in_half_precision():
    config = VQLogitsConfig(text_config=text_config("llama"), num_codebooks=19)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.lm_head.codebook.dtype == torch.bfloat16
    assert model.lm_head.codes.dtype == torch.uint8
    model.lm_head.check_codes()
