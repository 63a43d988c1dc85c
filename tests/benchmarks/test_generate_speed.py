"""The whole benchmark on a tiny model."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from benchmarks import generate_speed

GPT2 = GPT2Config(vocab_size=90, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
GEMMA = Gemma2Config(
    vocab_size=90,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def tiny(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("config", [GPT2, GEMMA], ids=["gpt2", "gemma2"])
def test_only_the_head_is_another(config):
    dense = tiny(config)
    ours = generate_speed.quantised(dense, 19)
    assert (ours.lm_head.num_codebooks, ours.lm_head.num_fine_tokens) == (19, 9)
    assert ours.lm_head.codebook.dtype == torch.bfloat16
    assert ours.lm_head.final_logit_softcapping == config.to_dict().get("final_logit_softcapping")
    ids = torch.randint(0, 90, (1, 5))
    body = dense.base_model(ids).last_hidden_state
    torch.testing.assert_close(ours.model(ids).last_hidden_state, body, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_both_generate_as_many_tokens(compiled, monkeypatch):
    monkeypatch.setattr(generate_speed, "REPEATS", 1)
    found = generate_speed.measure(tiny(GPT2), 19, compiled=compiled, new_tokens=3, seed=0)
    seconds = found["seconds"]
    assert 0 < found["dense_head_seconds"] < 60
    assert found["times_faster"] == seconds["dense"] / seconds["quantised"]
    assert found["share_of_the_bound"] == found["times_faster"] / found["bound"]
    assert found["bound"] > 1


def test_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate_speed, "REPEATS", 1)
    monkeypatch.setattr(generate_speed, "CASES", {"tiny": (lambda: tiny(GPT2), 19)})
    output = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["generate_speed", "--quick", "--output", str(output)])
    generate_speed.main()
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["model"], row["compiled"], row["new_tokens"]) == ("tiny", False, 8)
    assert "tokens a second" in capsys.readouterr().out
