import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny import text_config
from transformers import AutoConfig, GPT2Config, LlamaConfig, OPTConfig

from hf_vqlogits import VQLogitsConfig


def test_defaults_are_sign_codes_on_gpt2():
    config = VQLogitsConfig()
    assert isinstance(config.text_config, GPT2Config)
    assert (config.code_type, config.codebook_size) == ("sign", 2)
    assert (config.vocab_size, config.hidden_size) == (50257, 768)
    assert config.get_text_config() is config.text_config


def test_text_config_may_be_a_dict():
    config = VQLogitsConfig(text_config={"model_type": "llama", "vocab_size": 7, "hidden_size": 64})
    assert isinstance(config.text_config, LlamaConfig)
    assert (config.vocab_size, config.hidden_size) == (7, 64)


def test_hidden_size_is_the_width_before_the_output_layer():
    opt = OPTConfig(hidden_size=32, word_embed_proj_dim=16, num_attention_heads=4)
    assert VQLogitsConfig(text_config=opt).hidden_size == 16


def test_sizes_are_read_through_and_not_stored_twice(tmp_path):
    config = VQLogitsConfig(text_config=text_config("llama"))
    config.text_config.vocab_size = 99
    assert config.vocab_size == 99
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"vocab_size", "hidden_size", "use_cache"} & stored.keys()
    assert stored["text_config"]["vocab_size"] == 99


@pytest.mark.parametrize(
    "fields",
    [
        {"num_codebooks": 500},
        {"code_type": "index", "num_codebooks": 3, "codebook_size": 16},
        {"logit_scale": 0.0625, "final_logit_softcapping": 30.0},
        {"num_codebooks": 40, "nested_codebooks": [10, 20]},
        {"logit_scale": 2, "final_logit_softcapping": 30},
        {"embeddings": "vq", "embedding_codebooks": 77},
        {"embeddings": "tied", "tie_word_embeddings": True},
        {"refine_top_k": 8, "refine_deviations": 2.5, "refine_with_embedding": True},
        {"refine_top_k": 61, "refine_deviations": None, "embeddings": "vq"},
    ],
)
def test_survives_saving(tmp_path, fields):
    config = VQLogitsConfig(text_config=text_config("gemma2"), **fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, VQLogitsConfig)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert {k: getattr(loaded, k) for k in fields} == fields


def test_the_input_side():
    fields = {"text_config": text_config("gpt2"), "num_codebooks": 40}
    kept, own, tied = (VQLogitsConfig(**fields, embeddings=m) for m in ("keep", "vq", "tied"))
    assert VQLogitsConfig(**fields).to_dict() == kept.to_dict()
    assert [c.embedding_codebooks for c in (kept, own, tied)] == [None, 40, None]
    assert [c.tie_word_embeddings for c in (kept, own, tied)] == [False, False, True]


def test_a_smaller_size_inside_a_stored_configuration(tmp_path):
    fields = {"num_codebooks": 40, "nested_codebooks": (10, 20, 30)}
    VQLogitsConfig(text_config=text_config("gpt2"), **fields).save_pretrained(tmp_path)
    for bits, inside in ((40, [10, 20, 30]), (30, [10, 20]), (10, [])):
        config = AutoConfig.from_pretrained(tmp_path, num_codebooks=bits)
        assert (config.num_codebooks, config.nested_codebooks) == (bits, inside)
        config.validate_architecture()


def test_configurations_from_before_there_were_smaller_sizes(tmp_path):
    VQLogitsConfig(text_config=text_config("gpt2")).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["nested_codebooks"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert AutoConfig.from_pretrained(tmp_path).nested_codebooks == []


def test_use_cache_is_the_backbones():
    config = VQLogitsConfig(text_config=text_config("llama", use_cache=False))
    assert config.use_cache is False
    config.use_cache = True
    assert config.text_config.use_cache is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code_type": "bits"}, "`code_type` must be one of .*'bits'"),
        ({"num_codebooks": 0}, "`num_codebooks` must be at least 1, got 0"),
        ({"codebook_size": 3}, "`codebook_size` must be 2 for sign codes .*got 3"),
        ({"num_fine_tokens": -1}, "between 0 and the vocabulary size 61, got -1"),
        ({"num_fine_tokens": 62}, "between 0 and the vocabulary size 61, got 62"),
        (
            {"code_type": "index", "num_fine_tokens": 3},
            "`num_fine_tokens` must be 0 for index codes, got 3",
        ),
        (
            {"code_type": "index", "codebook_size": 9, "nested_codebooks": [3]},
            r"`nested_codebooks` must be empty for index codes, got \[3\]",
        ),
        ({"num_codebooks": 9, "nested_codebooks": [0]}, r"must ascend, .* got \[0\]"),
        ({"num_codebooks": 9, "nested_codebooks": [3, 9]}, r"`num_codebooks` 9, got \[3, 9\]"),
        ({"num_codebooks": 9, "nested_codebooks": [3, 3]}, r"must ascend, .* got \[3, 3\]"),
        ({"num_codebooks": 9, "nested_codebooks": [4, 3]}, r"must ascend, .* got \[4, 3\]"),
        (
            {"nested_codebooks": [3], "embeddings": "tied"},
            r"`nested_codebooks` must be empty with `embeddings` 'tied', got \[3\]",
        ),
        ({"code_type": "index", "codebook_size": 0}, "between 1 and the vocabulary size 61, got 0"),
        ({"code_type": "index", "codebook_size": 62}, "vocabulary size 61, got 62"),
        ({"logit_scale": 0.0}, "`logit_scale` must be positive and finite, got 0.0"),
        ({"logit_scale": float("nan")}, "`logit_scale` must be positive and finite, got nan"),
        ({"final_logit_softcapping": -1.0}, "`final_logit_softcapping` must be positive .*-1.0"),
        ({"final_logit_softcapping": float("inf")}, "`final_logit_softcapping` .*finite.* got inf"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be False with .* 'keep'"),
        (
            {"tie_word_embeddings": True, "embeddings": "vq"},
            "`tie_word_embeddings` must be False with .* 'vq'.* Use `embeddings='tied'`",
        ),
        ({"embeddings": "both"}, r"`embeddings` must be one of \('keep', .*got 'both'"),
        (
            {"embeddings": "tied", "code_type": "index", "codebook_size": 9},
            "'tied' needs a head of sign codes, got `code_type` 'index'",
        ),
        ({"embedding_codebooks": 9}, "`embedding_codebooks` applies to .* got 9 with 'keep'"),
        (
            {"embeddings": "tied", "embedding_codebooks": 9},
            "`embedding_codebooks` applies to .* got 9 with 'tied'",
        ),
        (
            {"embeddings": "vq", "embedding_codebooks": 0},
            "`embedding_codebooks` must be at least 1 .* got 0",
        ),
        (
            {"embeddings": "vq", "code_type": "index", "codebook_size": 9},
            "`embedding_codebooks` must be at least 1 .* beside a head of index codes.* got None",
        ),
        ({"output_loss": "hinge"}, r"`output_loss` must be one of \('cross_.* got 'hinge'"),
        ({"refine_top_k": -1}, "`refine_top_k` must lie between 0 and .* 61, got -1"),
        ({"refine_top_k": 62}, "`refine_top_k` must lie between 0 and .* 61, got 62"),
        ({"refine_deviations": -0.5}, "`refine_deviations` must be finite and not .* got -0.5"),
        ({"refine_deviations": float("nan")}, "`refine_deviations` must be finite .* got nan"),
        (
            {"refine_with_embedding": True, "embeddings": "tied"},
            "`refine_with_embedding` needs the dense input embedding.*'tied'",
        ),
        (
            {"refine_top_k": 4, "num_codebooks": 9, "nested_codebooks": [3]},
            r"`refine_top_k` must be 0 beside `nested_codebooks` \[3\], got 4",
        ),
        ({"num_mixtures": 0}, "`num_mixtures` must be at least 1, got 0"),
        ({"gate_activation": "relu"}, "`gate_activation` must be one of .*, got 'relu'"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be positive and finite, got 0.0"),
        (
            {"num_mixtures": 2, "output_loss": "squared_hinge"},
            "`num_mixtures` 2 goes with `output_loss` 'cross_entropy' only, got 'squared_hinge'",
        ),
        (
            {"num_mixtures": 2, "num_codebooks": 9, "nested_codebooks": [3]},
            r"`num_mixtures` 2 goes with `nested_codebooks` \[\] only, got \[3\]",
        ),
        (
            {"num_mixtures": 2, "refine_top_k": 3},
            "`num_mixtures` 2 goes with `refine_top_k` 0 only, got 3",
        ),
        ({"text_config": {"model_type": "t5"}}, "`text_config` must describe a decoder.*'t5'"),
    ],
)
def test_impossible_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VQLogitsConfig(**({"text_config": text_config("gpt2")} | fields))


@pytest.mark.parametrize(
    "fields", [{"num_codebooks": 1.5}, {"code_type": None}, {"nested_codebooks": ["3"]}]
)
def test_wrong_types_are_named(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        VQLogitsConfig(**fields)


def test_largest_index_codebook_is_one_codeword_a_token():
    config = VQLogitsConfig(
        text_config=text_config("gpt2"), code_type="index", num_codebooks=1, codebook_size=61
    )
    assert config.codebook_size == config.vocab_size


def test_an_edited_file_is_refused_when_loaded(tmp_path):
    VQLogitsConfig(text_config=text_config("gpt2")).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"num_codebooks": -4}))
    with pytest.raises(ValueError, match="`num_codebooks` must be at least 1, got -4"):
        AutoConfig.from_pretrained(tmp_path)
