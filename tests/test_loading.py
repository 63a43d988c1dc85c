"""Damaged and foreign checkpoints: what is wrong is named, nothing is filled in silently."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import text_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_vqlogits import VQLogitsForCausalLM

INDEX = {"code_type": "index", "num_codebooks": 3, "codebook_size": 7}


def change(folder, edit):
    """Edit the tensors of a checkpoint in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["codebook", "codebook_bias", "codes", "fine_codes", "fine_ids"])
def test_missing_tensors_of_the_head_are_named(make_model, tmp_path, name):
    make_model("llama", num_fine_tokens=5).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(f"lm_head.{name}"))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* lacks lm_head.{name}: it is incompl"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tensors_of_the_head_that_the_configuration_knows_nothing_of(make_model, tmp_path):
    make_model("llama", num_fine_tokens=5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_fine_tokens": 0}))
    with pytest.raises(ValueError, match=r"holds lm_head.fine_codes, lm_head.fine_ids, of which"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_layer_beside_the_head(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 32)}))
    with pytest.raises(ValueError, match=r"holds lm_head.weight, of which its config.json knows"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_tensors_of_the_backbone_are_named(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)

    def drop_a_layer(tensors):
        for name in [n for n in tensors if "layers.1" in n]:
            del tensors[name]

    change(tmp_path, drop_a_layer)
    with pytest.raises(ValueError, match=r"lacks model.backbone.layers.1.* and 4 more"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_statistics_are_zero(make_model, ids, tmp_path, caplog):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    for name in ("hidden_mean", "fold_direction"):
        change(tmp_path, lambda tensors, name=name: tensors.pop(f"lm_head.{name}"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.lm_head.hidden_mean.any()
    assert not loaded.lm_head.fold_direction.any()
    assert torch.equal(loaded.lm_head.codes, model.lm_head.codes)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("left", [0, 5, 200, 0.5, -1])
def test_truncated_files_are_named(make_model, tmp_path, left):
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if left == 0.5 else left])
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.* is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"num_codebooks": 30}, r"lm_head.codebook is \(19, 32\) instead of \(30, 32\)"),
        ({"num_codebooks": 18}, r"lm_head.codebook_bias is \(19,\) instead of \(18,\)"),
        (INDEX, r"lm_head.codebook is \(19, 32\) instead of \(3, 7, 32\)"),
    ],
)
def test_shapes_that_contradict_the_configuration_are_named(make_model, tmp_path, edit, named):
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(ValueError, match=rf"contradict its config.json.*{named}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_mismatched_shapes_are_drawn_anew_on_request(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, num_codebooks=30, ignore_mismatched_sizes=True
    )
    assert loaded.lm_head.codebook.shape == (30, 32)
    loaded.lm_head.check_codes()
    body, other = model.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(body[n], other[n]) for n in body)


def test_another_vocabulary_is_named(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["text_config"]["vocab_size"] = 60
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"lm_head.codes is \(61, 3\) instead of \(60, 3\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_indices_out_of_range_are_named(make_model, tmp_path):
    make_model("llama", **INDEX).save_pretrained(tmp_path)

    def damage(tensors):
        tensors["lm_head.codes"][8, 2] = 7

    change(tmp_path, damage)
    with pytest.raises(ValueError, match="`codes` of token 8 names codeword 7 of codebook 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_padding_bits_are_named(make_model, tmp_path):
    make_model("llama", num_codebooks=19).save_pretrained(tmp_path)

    def damage(tensors):
        tensors["lm_head.codes"][8, 2] |= 8

    change(tmp_path, damage)
    with pytest.raises(ValueError, match="`codes` sets bits above the 19 of .* row 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_checkpoints_are_refused(tmp_path):
    LlamaForCausalLM(text_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a field of `text_config`.*convert"):
        VQLogitsForCausalLM.from_pretrained(tmp_path)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        VQLogitsForCausalLM.from_pretrained(tmp_path)
