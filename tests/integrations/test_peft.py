"""PEFT on quantised models: what is trained, saved, loaded and merged."""

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_vqlogits import VQLogitsForCausalLM
from hf_vqlogits.integrations.peft import lora_config

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

CODES = {
    "sign": {"code_type": "sign", "num_codebooks": 21},
    "index": {"code_type": "index", "num_codebooks": 3, "codebook_size": 5},
}


@pytest.fixture
def base(make_model, tmp_path, request):
    """Folder of a small random model."""
    kind = getattr(request, "param", "sign")
    make_model("gpt2", **CODES[kind]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def train(model, ids, steps=3):
    """Losses of a few steps on one batch; leaves the model in evaluation mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_trains_adapters_and_head_only(base, ids):
    model = load(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    losses = train(adapted, ids)

    assert losses[-1] < losses[0]
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trained if "lm_head" in n} == {"codebook", "codebook_bias"}
    assert all("lora_" in n or "lm_head.modules_to_save" in n for n in trained)
    assert sum("lora_A" in n for n in trained) == 2  # c_attn of both layers
    after = adapted.unload().state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"lm_head.codebook", "lm_head.codebook_bias"}


@pytest.mark.parametrize("base", CODES, indirect=True)
def test_adapter_round_trip_and_merge_keep_the_logits(base, ids, tmp_path):
    model = load(base)
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    train(adapted, ids)
    expected = logits(adapted, ids)
    assert not torch.allclose(expected, logits(load(base), ids), atol=0.1)

    adapted.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = {k.rsplit(".", 1)[-1]: v for k, v in stored.items() if "lm_head" in k}
    assert set(head) == {"codebook", "codebook_bias", "codes", "hidden_mean", "fold_direction"}
    assert torch.equal(head["codes"], load(base).lm_head.codes)

    adapter = tmp_path / "adapter"
    for loaded in (
        peft.PeftModel.from_pretrained(load(base), adapter),
        peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
        AutoModelForCausalLM.from_pretrained(adapter),
    ):
        assert torch.equal(logits(loaded.eval(), ids), expected)

    merged = adapted.merge_and_unload()
    assert type(merged) is VQLogitsForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    # Merging rounds anew, and the CPU kernel's logits are steps of up to a hundredth of their
    # deviation.
    error = logits(load(tmp_path / "merged"), ids) - expected
    assert error.abs().max() < 0.01 * expected.std()


def test_head_may_move_to_codes_of_its_own(base, ids, tmp_path):
    """An adapter whose codes were learned carries them; the base keeps its own."""
    model = load(base)
    original = model.lm_head.codes.clone()
    adapted = peft.get_peft_model(model, lora_config(model))
    adapted.base_model.model.lm_head.modules_to_save["default"].codes.copy_(original.flip(0))
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), logits(load(base), ids))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers takes adapters only from PEFT {MIN_PEFT_VERSION} on",
)
def test_adapters_of_transformers(base, ids, tmp_path):
    """`model.add_adapter` and `load_adapter`, without a PeftModel around the model."""
    model = load(base)
    untrained = logits(model, ids)
    model.add_adapter(lora_config(model, r=4))
    train(model, ids)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")

    loaded = load(base)
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval(), ids), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, ids), untrained)


def test_several_adapters_have_heads_of_their_own(base, ids):
    model = load(base)
    untrained = logits(model, ids)
    adapted = peft.get_peft_model(model, lora_config(model))
    train(adapted, ids)
    first = logits(adapted, ids)
    adapted.add_adapter("second", lora_config(model))
    adapted.set_adapter("second")
    assert torch.equal(logits(adapted, ids), untrained)
    train(adapted, ids.flip(1))
    assert not torch.allclose(logits(adapted, ids), first, atol=0.1)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted, ids), first)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompt_learning(make_model, ids, tmp_path, config):
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    adapted = peft.get_peft_model(load(base), config)
    untrained = logits(adapted.eval(), ids)
    train(adapted, ids)
    expected = logits(adapted, ids)
    assert not torch.equal(expected, untrained)
    adapted.save_pretrained(tmp_path / "prompt")
    loaded = peft.PeftModel.from_pretrained(load(base), tmp_path / "prompt")
    torch.testing.assert_close(logits(loaded, ids), expected)
    mask = torch.ones_like(ids)
    assert loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2).shape == (2, 9)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("gpt_neox", {"query_key_value"}),
        ("olmo2", LINEAR),  # PEFT has no defaults for this one, nor for Mamba
        ("mamba", {"in_proj"}),
    ],
)
def test_targets_follow_the_backbone(make_model, ids, family, targets):
    model = make_model(family)
    adapted = peft.get_peft_model(model, lora_config(model))
    losses = train(adapted, ids)
    assert losses[-1] < losses[0]
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert {n.split(".")[-4] for n in adapters} == targets
    # B starts at zero: what is not zero now has had a gradient, in a layer that is really called.
    assert all(p.any() for p in adapters.values())


def test_dense_model_gets_the_same_targets(make_model):
    dense = GPT2LMHeadModel(make_model("gpt2").config.get_text_config())
    config = lora_config(dense)
    assert config.target_modules == {"c_attn"}
    assert config.modules_to_save is None
    adapted = peft.get_peft_model(dense, config)
    assert all("lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_own_fields_go_first(base):
    config = lora_config(load(base), target_modules=["c_proj"], modules_to_save=None, r=2)
    assert (config.target_modules, config.modules_to_save, config.r) == ({"c_proj"}, None, 2)


def test_resized_vocabulary_is_saved_with_the_adapter(base, ids, tmp_path):
    model = load(base)
    model.resize_token_embeddings(model.vocab_size + 3)
    adapted = peft.get_peft_model(model, lora_config(model))
    train(adapted, ids)
    expected = logits(adapted, ids)
    with pytest.warns(UserWarning, match="has been resized"):
        adapted.save_pretrained(tmp_path / "adapter")
    again = load(base)
    again.resize_token_embeddings(again.vocab_size + 3)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)


# Quantised input embeddings


def coded(make_model, folder, mode):
    make_model("gpt2", **CODES["sign"], embeddings=mode).save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize("mode", ["vq", "tied"])
def test_quantised_input_embeddings_stay_as_they_are(make_model, ids, tmp_path, mode):
    """The head of a tied model as well, as PEFT would train a copy of it."""
    model = coded(make_model, tmp_path / "base", mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    losses = train(adapted, ids)
    assert losses[-1] < losses[0]
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)

    merged = adapted.merge_and_unload()
    after = merged.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    head = {"lm_head.codebook", "lm_head.codebook_bias"}
    assert {k for k in changed if "c_attn" not in k} == (head if mode == "vq" else set())
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert loaded.config.embeddings == mode
    assert (logits(loaded, ids) - expected).abs().max() < 0.01 * expected.std()


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning")
def test_a_tied_head_that_is_trained_apart_is_saved_as_one_of_its_own(make_model, ids, tmp_path):
    model = coded(make_model, tmp_path / "base", "tied")
    adapted = peft.get_peft_model(model, lora_config(model, modules_to_save=["lm_head"]))
    train(adapted, ids)
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert (loaded.config.embeddings, loaded.config.embedding_codebooks) == ("vq", 21)
    assert (logits(loaded, ids) - expected).abs().max() < 0.01 * expected.std()


@pytest.mark.parametrize("mode", ["vq", "tied"])
def test_adapters_of_a_resized_quantised_embedding(make_model, ids, tmp_path, mode):
    model = coded(make_model, tmp_path / "base", mode)
    model.resize_token_embeddings(model.vocab_size + 3)
    adapted = peft.get_peft_model(model, lora_config(model))
    train(adapted, ids)
    expected = logits(adapted, ids)
    with pytest.warns(UserWarning, match="has been resized"):
        adapted.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "base")
    again.resize_token_embeddings(again.vocab_size + 3)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize("mode", ["vq", "tied"])
def test_checkpointing_with_adapters(make_model, ids, tmp_path, mode):
    model = coded(make_model, tmp_path / "base", mode)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    losses = train(adapted, ids)
    assert losses[-1] < losses[0]
    assert all(p.any() for n, p in adapted.named_parameters() if "lora_B" in n)
