"""Models with a quantised input embedding, of its own codes or of the head's."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, perturb, text_config
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsHead, VQLogitsModel
from hf_vqlogits.embedding import SHARED, VQEmbedding

FAMILIES = ["gpt2", "llama", "gemma3_text", "opt", "mamba"]
MODES = ["vq", "tied"]
EMBEDDING = {
    "gpt2": "wte",
    "llama": "embed_tokens",
    "gemma3_text": "embed_tokens",
    "opt": "decoder.embed_tokens",
    "mamba": "embeddings",
}


def is_tied(model):
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, VQEmbedding)
    same = {getattr(model.lm_head, name) is getattr(embedding, name) for name in SHARED}
    assert len(same) == 1
    return same.pop()


def change(folder, edit):
    """Edit the tensors of a checkpoint in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_sees_the_coded_rows(make_model, ids, family, mode):
    """As a dense embedding of the same rows and the family's own class would give them."""
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    assert is_tied(model) == (mode == "tied")
    torch.manual_seed(0)
    dense = AutoModel.from_config(model.config.text_config).eval()
    state = model.model.backbone.state_dict()
    name = EMBEDDING[family]
    for tensor in model.get_input_embeddings().state_dict():
        del state[f"{name}.{tensor}"]
    dense.load_state_dict(state | {f"{name}.weight": model.get_input_embeddings().weight})
    torch.testing.assert_close(
        model.model(ids).last_hidden_state, dense(ids).last_hidden_state, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(make_model, ids, tmp_path, family, mode):
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["embeddings"], stored["tie_word_embeddings"]) == (mode, mode == "tied")
    assert stored["embedding_codebooks"] == (19 if mode == "vq" else None)
    saved = load_file(tmp_path / "model.safetensors")
    name = f"model.backbone.{EMBEDDING[family]}"
    assert {n for n in saved if n.startswith(name)} == {
        f"{name}.{tensor}" for tensor in model.get_input_embeddings().state_dict()
    }
    once = mode == "tied"
    assert [n for n in SHARED if f"lm_head.{n}" in saved] == ([] if once else list(SHARED))
    assert sum(t.nbytes for t in saved.values()) == sum(
        t.nbytes for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )

    torch.manual_seed(99)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert is_tied(loaded) == once
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    ],
    ids=str,
)
def test_ways_of_loading(make_model, ids, tmp_path, mode, options):
    model = make_model("llama", embeddings=mode, num_fine_tokens=8)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert is_tied(loaded) == (mode == "tied")
    assert loaded.dtype == options.get("dtype", torch.float32)
    assert loaded.lm_head.codes.dtype == torch.uint8
    tolerance = {"atol": 0.3, "rtol": 0.1} if "dtype" in options else {}
    torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, **tolerance)


# Tied tensors must lie in one place, as in any other model.
@pytest.mark.parametrize(("mode", "head"), [("vq", "cpu"), ("vq", "disk"), ("tied", "disk")])
def test_offloaded_to_disk(make_model, ids, tmp_path, mode, head):
    model = make_model("llama", embeddings=mode, num_fine_tokens=8)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model": "disk", "lm_head": head},
        offload_folder=tmp_path / "offloaded",
        offload_buffers=True,
    )
    assert loaded.get_input_embeddings().codebook.is_meta
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", MODES)
def test_base_model_loads_from_the_same_folder(make_model, ids, tmp_path, caplog, mode):
    model = make_model("gpt2", embeddings=mode, num_fine_tokens=8)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is VQLogitsModel
    assert not any(info.values())
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert torch.equal(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_fresh_models():
    for mode in MODES:
        config = VQLogitsConfig(
            text_config=text_config("gpt2"), num_codebooks=19, embeddings=mode, num_fine_tokens=8
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert is_tied(model) == (mode == "tied")
        assert model.get_input_embeddings().offset.dtype == torch.bfloat16
        model.get_input_embeddings().check_codes()
        with torch.device("meta"):
            assert VQLogitsForCausalLM(config).get_input_embeddings().codes.is_meta


def test_mismatched_shapes_are_drawn_anew_on_request(make_model, tmp_path):
    model = make_model("llama", embeddings="vq")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, embedding_codebooks=30, ignore_mismatched_sizes=True
    )
    embedding = loaded.get_input_embeddings()
    assert embedding.codebook.shape == (30, 32)
    embedding.check_codes()
    assert 0.005 < float(embedding.weight.std()) < 0.1
    assert torch.equal(loaded.lm_head.codes, model.lm_head.codes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("mode", MODES)
def test_copies_are_independent(make_model, ids, mode, copied):
    model = make_model("llama", embeddings=mode, num_fine_tokens=8)
    wanted = model(ids).logits
    twin = copied(model)
    assert is_tied(twin) == (mode == "tied")
    assert torch.equal(twin(ids).logits, wanted)
    perturb(twin, seed=5)
    assert torch.equal(model(ids).logits, wanted)


def test_moving_and_casting_keep_the_tie(make_model, ids):
    model = make_model("llama", embeddings="tied", num_fine_tokens=8)
    wanted = model(ids).logits
    assert is_tied(model.to(torch.bfloat16))
    torch.testing.assert_close(model(ids).logits.float(), wanted, atol=0.3, rtol=0.1)
    model._apply(lambda tensor: tensor.clone())  # what a move to another device does to buffers
    embedding = model.get_input_embeddings()
    assert all(getattr(model.lm_head, n) is getattr(embedding, n) for n in SHARED[1:])
    own = make_model("llama", embeddings="vq", num_fine_tokens=8).to(torch.bfloat16)
    assert not is_tied(own)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_count_shared_tensors_once(make_model, mode):
    model = make_model("gpt2", embeddings=mode, num_fine_tokens=8)
    layers = sum(p.numel() for p in model.model.backbone.h.parameters()) + 128 * 32 + 2 * 32
    embedding = 32 + (19 * 32 if mode == "vq" else 0)
    assert model.num_parameters() == layers + 19 * 33 + embedding


# Checks on load


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["codebook", "offset", "codes"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_missing_tensors_are_named(make_model, tmp_path, mode, name, auto):
    make_model("gpt2", embeddings=mode, num_fine_tokens=8).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(f"model.backbone.wte.{name}"))
    with pytest.raises(ValueError, match=rf"lacks .*backbone.wte.{name}: it is incomplete"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_impossible_codes_are_named(make_model, tmp_path, mode):
    make_model("gpt2", embeddings=mode, num_fine_tokens=8).save_pretrained(tmp_path)

    def damage(tensors):
        tensors["model.backbone.wte.codes"][8, 2] |= 8

    change(tmp_path, damage)
    with pytest.raises(ValueError, match="`codes` sets bits .* in row 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_that_contradict_the_configuration_are_named(make_model, tmp_path, mode):
    make_model("gpt2", embeddings=mode, num_fine_tokens=8).save_pretrained(tmp_path)

    def damage(tensors):
        tensors["model.backbone.wte.codes"] = tensors["model.backbone.wte.codes"][:, :2].clone()

    change(tmp_path, damage)
    with pytest.raises(ValueError, match=r"backbone.wte.codes is \(61, 2\) instead of \(61, 3\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_truncated_files_are_named(make_model, tmp_path, mode):
    make_model("gpt2", embeddings=mode, num_fine_tokens=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_checkpoints_that_hold_both_sides(make_model, ids, tmp_path):
    """As some tools write them; equal they are one, different ones are refused."""
    model = make_model("gpt2", embeddings="tied", num_fine_tokens=8)
    model.save_pretrained(tmp_path)

    def write_twice(tensors):
        for name in SHARED:
            tensors[f"lm_head.{name}"] = tensors[f"model.backbone.wte.{name}"].clone()

    change(tmp_path, write_twice)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert is_tied(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name in SHARED:
        change(tmp_path, write_twice)
        change(tmp_path, lambda tensors, name=name: tensors[f"lm_head.{name}"].zero_())
        with pytest.raises(ValueError, match=rf"holds lm_head.{name} and .*wte.{name}, which diff"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_checkpoints_under_the_heads_name(make_model, ids, tmp_path):
    model = make_model("gpt2", embeddings="tied", num_fine_tokens=8)
    model.save_pretrained(tmp_path)

    def rename(tensors):
        for name in SHARED:
            tensors[f"lm_head.{name}"] = tensors.pop(f"model.backbone.wte.{name}")

    change(tmp_path, rename)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_sides_of_different_width_cannot_be_tied(make_model, monkeypatch):
    config = VQLogitsConfig(
        text_config=text_config("gpt2"), num_codebooks=19, embeddings="tied", num_fine_tokens=8
    )
    narrow = VQEmbedding(VOCABULARY, 16, num_codebooks=19)
    monkeypatch.setattr(VQEmbedding, "in_place_of", lambda *_: narrow)
    with pytest.raises(ValueError, match="as wide as the output layer, but they are 16 and 32"):
        VQLogitsForCausalLM(config)


# Resizing, replacing, going back


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 9])
def test_resized(make_model, ids, tmp_path, family, mode, size):
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    ids = ids % (VOCABULARY - 9)
    before = model(ids).logits.detach()
    embedding = model.resize_token_embeddings(size)
    assert embedding is model.get_input_embeddings()
    assert is_tied(model) == (mode == "tied")
    assert embedding.num_embeddings == model.lm_head.out_features == size
    assert model.config.vocab_size == model.model.backbone.config.vocab_size == size
    assert model.vocab_size == getattr(model.model.backbone, "vocab_size", size) == size
    assert model.config.num_fine_tokens == model.lm_head.num_fine_tokens == 8
    embedding.check_codes()
    assert len(embedding.codes.unique(dim=0)) == size
    kept = min(size, VOCABULARY)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    assert model(torch.tensor([[3, size - 1]])).logits.shape == (1, 2, size)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded) == (mode == "tied")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_new_rows_stand_near_the_mean(make_model):
    model = make_model("llama", embeddings="vq", embedding_codebooks=40)
    model.resize_token_embeddings(VOCABULARY + 40)
    rows = model.get_input_embeddings().weight
    old, new = rows[:VOCABULARY], rows[VOCABULARY:]
    distance = (old - old.mean(0)).norm(dim=1), (new - old.mean(0)).norm(dim=1)
    assert distance[1].mean() < 0.9 * distance[0].mean()


@pytest.mark.parametrize("mode", MODES)
def test_refused_and_idle_resizes_change_nothing(make_model, mode):
    model = make_model("llama", embeddings=mode, num_fine_tokens=8)
    codes = model.get_input_embeddings().codes
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(ValueError, match="`new_num_tokens` must be at least 1, got 0"):
        model.resize_token_embeddings(0)
    assert model.get_input_embeddings().codes is codes
    assert model.config.vocab_size == VOCABULARY


@pytest.mark.parametrize("embeddings", ["keep", "vq"])
def test_the_base_model_is_resized_alone(make_model, embeddings):
    base = make_model("llama", embeddings=embeddings).model
    assert base.resize_token_embeddings(70) is base.get_input_embeddings()
    assert base.get_input_embeddings().num_embeddings == base.config.vocab_size == 70
    assert base(torch.tensor([[69]])).last_hidden_state.shape == (1, 1, 32)


@pytest.mark.parametrize("mode", MODES)
def test_the_configuration_follows_the_embedding(make_model, ids, tmp_path, mode):
    model = make_model("gpt2", embeddings=mode, num_fine_tokens=8)
    model.set_input_embeddings(nn.Embedding(VOCABULARY, 32))
    config = model.config
    assert (config.embeddings, config.embedding_codebooks) == ("keep", None)
    assert config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(loaded(ids).logits, model(ids).logits)

    own = VQEmbedding(VOCABULARY, 32, num_codebooks=11)
    model.set_input_embeddings(own)
    assert (config.embeddings, config.embedding_codebooks) == ("vq", 11)
    shared = VQEmbedding(VOCABULARY, 32, num_codebooks=19)
    for name in SHARED:
        setattr(shared, name, getattr(model.lm_head, name))
    model.set_input_embeddings(shared)
    assert (config.embeddings, config.embedding_codebooks) == ("tied", None)
    assert config.tie_word_embeddings is True
    model.save_pretrained(tmp_path / "tied")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert is_tied(loaded)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_head_of_its_own_unties(make_model, ids, tmp_path):
    model = make_model("gpt2", embeddings="tied", num_fine_tokens=8)
    head = copy.deepcopy(model.lm_head)
    nn.init.normal_(head.codebook)
    model.set_output_embeddings(head)
    assert (model.config.embeddings, model.config.embedding_codebooks) == ("vq", 19)
    model.tie_weights()
    assert not is_tied(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_back_to_dense(make_model, ids, tmp_path, family, mode):
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    nn.init.zeros_(model.lm_head.codebook_bias)
    dense = model.to_dense().model
    assert type(dense.get_input_embeddings()) is not VQEmbedding
    assert dense.config.tie_word_embeddings is False
    dense.save_pretrained(tmp_path)
    loaded, info = type(dense).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    rows = loaded.get_input_embeddings().weight
    torch.testing.assert_close(rows, model.get_input_embeddings().weight)
    assert rows is not loaded.get_output_embeddings().weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-2, rtol=1e-2)


# Use and training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache(make_model, ids, family, mode):
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_train(make_model, ids, family, mode):
    model = make_model(family, embeddings=mode, num_fine_tokens=8)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    whole = model.lm_head.codebook.grad.clone()
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach()
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    of_head = model.lm_head.codebook.grad
    assert torch.allclose(whole, of_head, atol=1e-4 * of_head.abs().max()) == (mode == "vq")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_checkpointing_gives_the_same_gradients(make_model, ids, family, reentrant, mode):
    model = make_model(family, embeddings=mode, num_fine_tokens=8).train()
    model.config.use_cache = False
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize("mode", MODES)
def test_input_gradients_for_a_frozen_embedding(make_model, ids, mode):
    """What adapters under reentrant checkpointing need."""
    model = make_model("llama", embeddings=mode, num_fine_tokens=8).train()
    model.requires_grad_(False)
    assert not model.get_input_embeddings()(ids).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_compiled_and_exported(make_model, ids, mode):
    layers = text_config("gemma3_text", num_hidden_layers=1)
    model = make_model("gemma3_text", text_config=layers, embeddings=mode, num_fine_tokens=8)
    model.config.use_cache = False
    wanted = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, wanted, atol=2e-2, rtol=1e-2)
    program = torch.export.export(model, (ids,), strict=False)
    torch.testing.assert_close(program.module()(ids).logits, wanted, atol=2e-2, rtol=1e-2)


def test_index_heads_take_an_embedding_of_sign_codes(make_model, ids, tmp_path):
    head = {"code_type": "index", "num_codebooks": 3, "codebook_size": 7}
    model = make_model("llama", **head, embeddings="vq", embedding_codebooks=21)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, VQLogitsHead)
    assert loaded.get_input_embeddings().num_codebooks == 21
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == 70


# Second codes


def test_moving_leaves_second_codes_that_are_not_shared(make_model):
    """An embedding of the head's first codes alone is not tied, and takes nothing from the head."""
    model = make_model("llama", num_fine_tokens=8)
    partly = VQEmbedding(VOCABULARY, 32, num_codebooks=19)
    partly.codebook, partly.codes = model.lm_head.codebook, model.lm_head.codes
    model.set_input_embeddings(partly)
    assert model.config.embeddings == "vq"
    hidden = torch.randn(2, 32)
    wanted = model.lm_head(hidden)
    model._apply(lambda tensor: tensor.clone())
    assert torch.equal(model.lm_head(hidden), wanted)
    assert model.lm_head.codes is partly.codes
    assert partly.fine_ids is None


@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 9])
def test_resized_with_second_codes_of_its_own(make_model, ids, tmp_path, size):
    model = make_model("llama", embeddings="vq", embedding_fine_tokens=VOCABULARY)
    ids = ids % (VOCABULARY - 9)
    model.resize_token_embeddings(size)
    kept = min(size, VOCABULARY)
    assert model.config.embedding_fine_tokens == kept
    assert model.get_input_embeddings().num_fine_tokens == kept
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_smaller_vocabulary_keeps_the_second_codes_tied(make_model, ids, tmp_path, kept):
    model = make_model("llama", embeddings="tied", num_fine_tokens=4)
    fine_ids = [3, 9, 55, 60] if kept else [52, 55, 57, 60]
    model.lm_head.fine_ids.copy_(torch.tensor(fine_ids))
    ids = ids % 52
    before = model(ids).logits[..., :52].detach()
    embedding = model.resize_token_embeddings(52)
    assert model.config.num_fine_tokens == embedding.num_fine_tokens == kept
    assert embedding.fine_ids is model.lm_head.fine_ids
    assert embedding.fine_codes is model.lm_head.fine_codes
    torch.testing.assert_close(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().codes is loaded.lm_head.codes
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_tied_base_model_is_resized_alone(make_model, tmp_path):
    make_model("llama", embeddings="tied", num_fine_tokens=VOCABULARY).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    base.resize_token_embeddings(52)
    assert base.config.num_fine_tokens == 52
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModel.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[3, 51]])
    assert torch.equal(loaded(ids).last_hidden_state, base(ids).last_hidden_state)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_second_codes_that_the_configuration_lacks_are_refused(make_model, tmp_path, auto):
    make_model("llama", embeddings="tied", num_fine_tokens=8).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_fine_tokens": 0}))
    with pytest.raises(ValueError, match=r"holds .*embed_tokens.fine_codes, .*, of which its conf"):
        auto.from_pretrained(tmp_path)
