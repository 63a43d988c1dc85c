"""Bodies quantised by another library while loading; the head stays as it is."""

import warnings

import pytest
import torch
from tiny import perturb
from torch import nn
from transformers import AutoModelForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own, when imported
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install hf-vqlogits[bench]"
    )
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TorchAoConfig


@pytest.fixture
def folder(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_the_head_is_left_alone(folder, ids):
    plain, model = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all("Int8" in type(m.weight).__name__ for m in linears)
    for name, tensor in plain.lm_head.state_dict().items():
        other = model.lm_head.state_dict()[name]
        assert type(other) is torch.Tensor
        assert torch.equal(other, tensor)
    given, wanted = model(ids).logits, plain(ids).logits
    assert not torch.equal(given, wanted)
    torch.testing.assert_close(given, wanted, atol=0.3, rtol=0.1)


def test_it_generates(folder, ids):
    model = load(folder)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_lora_on_top_trains_and_is_saved(folder, ids, tmp_path):
    options = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(load(folder), options).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_to_dense_asks_for_ordinary_weights(folder):
    with pytest.raises(ValueError, match="was loaded with a `quantization_config`"):
        load(folder).to_dense()


def test_incomplete_heads_are_refused_all_the_same(make_model, tmp_path):
    model = make_model("llama")
    perturb(model)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.codes"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks lm_head.codes"):
        load(tmp_path)
