"""Damaged and foreign checkpoints: what is wrong is named, nothing is filled in silently."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import text_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_vqlogits import VQLogitsForCausalLM, VQLogitsModel

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


NESTED = {"num_codebooks": 43, "nested_codebooks": [5, 16], "num_fine_tokens": 9}


@pytest.fixture
def nested_model(make_model):
    model = make_model("llama", **NESTED)
    for bits in (5, 16):
        getattr(model.lm_head, f"codebook_{bits}").normal_()
        getattr(model.lm_head, f"codebook_bias_{bits}").normal_()
    return model


def given_directly(path, bits, **options):
    return VQLogitsForCausalLM.from_pretrained(path, num_codebooks=bits, **options)


def by_the_auto_class(path, bits, **options):
    return AutoModelForCausalLM.from_pretrained(path, num_codebooks=bits, **options)


def by_a_configuration(path, bits, **options):
    config = AutoConfig.from_pretrained(path)
    config.keep_codebooks(bits)
    return VQLogitsForCausalLM.from_pretrained(path, config=config, **options)


@pytest.mark.parametrize("load", [given_directly, by_the_auto_class, by_a_configuration])
@pytest.mark.parametrize("bits", [5, 16, 43])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_a_smaller_head_inside_is_loaded(nested_model, ids, tmp_path, load, bits, shard):
    nested_model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = load(tmp_path, bits)
    nested_model.keep_codebooks(bits)
    assert loaded.config.to_dict()["nested_codebooks"] == [b for b in (5, 16) if b < bits]
    assert loaded.config.num_codebooks == bits
    assert torch.equal(loaded(ids).logits, nested_model(ids).logits)
    own = nested_model.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())


def test_a_smaller_head_saves_as_an_ordinary_checkpoint(nested_model, ids, tmp_path):
    nested_model.save_pretrained(tmp_path / "whole")
    small = by_the_auto_class(tmp_path / "whole", 5)
    small.save_pretrained(tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert stored["lm_head.codes"].shape == (61, 1)
    assert not [name for name in stored if name.startswith("lm_head.codebook_") and "5" in name]
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_codebooks"] == 5
    assert config["nested_codebooks"] == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize("bits", [None, 16])
def test_codebooks_of_all_sizes_take_the_type_that_is_asked_for(nested_model, tmp_path, bits):
    nested_model.save_pretrained(tmp_path)
    size = {} if bits is None else {"num_codebooks": bits}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **size)
    floats = [t for t in model.lm_head.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.bfloat16}
    assert model.lm_head.codebook_5.shape == (5, 32)


def test_the_base_model_of_a_smaller_size(nested_model, ids, tmp_path):
    nested_model.save_pretrained(tmp_path)
    base = VQLogitsModel.from_pretrained(tmp_path, num_codebooks=16)
    assert (base.config.num_codebooks, base.config.nested_codebooks) == (16, [5])
    wanted = nested_model.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, wanted)


def test_a_smaller_head_with_information_about_the_loading(nested_model, tmp_path):
    nested_model.save_pretrained(tmp_path)
    model, info = given_directly(tmp_path, 5, output_loading_info=True)
    assert model.lm_head.num_codebooks == 5
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_smaller_head_where_other_sizes_may_be_drawn_anew(nested_model, tmp_path):
    nested_model.save_pretrained(tmp_path)
    codebook = nested_model.lm_head.codebook_16
    model = by_the_auto_class(tmp_path, 16, ignore_mismatched_sizes=True)
    assert torch.equal(model.lm_head.codebook, codebook)


@pytest.mark.parametrize("load", [given_directly, by_the_auto_class, by_a_configuration])
def test_sizes_that_are_not_stored_are_named(nested_model, make_model, tmp_path, load):
    nested_model.save_pretrained(tmp_path / "nested")
    with pytest.raises(ValueError, match=r"`num_codebooks` 6 .* are 5, 16 and 43 in .*nested'"):
        load(tmp_path / "nested", 6)
    make_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`num_codebooks` 20 .* there is 19 alone in .*plain'"):
        load(tmp_path / "plain", 20)


@pytest.mark.parametrize("name", ["codebook_5", "codebook_bias_16"])
def test_missing_codebooks_of_smaller_sizes_are_named(nested_model, tmp_path, name):
    nested_model.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(f"lm_head.{name}"))
    with pytest.raises(ValueError, match=rf"lacks lm_head.{name}: it is incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_offloaded_head_cannot_be_cut(nested_model, tmp_path):
    nested_model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "o"}
    with pytest.raises(ValueError, match="cannot be cut to `num_codebooks` 5 where it was offload"):
        by_the_auto_class(tmp_path / "model", 5, **options)
