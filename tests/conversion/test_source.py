import json
import pickle
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.source import load_source


def test_folder_brings_model_tokenizer_and_files(tiny_folder):
    source = load_source(tiny_folder)
    assert source.model.config.model_type == "gpt2"
    assert not source.model.training
    assert set(source.files) >= {"tokenizer.json", "generation_config.json"}
    assert source.padded_tokens == 0


def test_padded_vocabularies_are_counted(tiny_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(416)
    assert load_source(model, tokenizer=tokenizer).padded_tokens == 16


def test_dtype(tiny_folder):
    assert load_source(tiny_folder, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """The local cache of the hub, which cannot be asked; it is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


class TestNameOnTheHub:
    def test_of_what_the_hub_gave(self, tiny_folder, hub_cache, tmp_path, monkeypatch):
        folder = hub_cache / "models--org--tiny"
        shutil.copytree(tiny_folder, folder / "snapshots" / ("a" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        assert load_source("org/tiny").hub_name == "org/tiny"
        model = AutoModelForCausalLM.from_pretrained("org/tiny")
        assert load_source(model).hub_name == "org/tiny"
        (tmp_path / "org" / "tiny").mkdir(parents=True)  # where a folder goes before the hub
        monkeypatch.chdir(tmp_path)
        assert load_source(model).hub_name is None

    def test_none_of_a_folder(self, tiny_folder, hub_cache, tmp_path, monkeypatch):
        shutil.copytree(tiny_folder, tmp_path / "private" / "tiny")
        monkeypatch.chdir(tmp_path)
        for name in ("private/tiny", "./private/tiny", tmp_path / "private" / "tiny"):
            assert load_source(name).hub_name is None
            model = AutoModelForCausalLM.from_pretrained(name)
            assert load_source(model).hub_name is None
        model = AutoModelForCausalLM.from_pretrained("private/tiny")
        monkeypatch.chdir("private")  # where its name no longer leads to it
        assert load_source(model).hub_name is None

    def test_none_of_a_model_without_a_name(self, tiny_folder, hub_cache):
        class MyGPT(GPT2LMHeadModel):
            pass

        model = MyGPT(AutoConfig.from_pretrained(tiny_folder))
        model.config.name_or_path = ""
        source = load_source(model)
        assert (source.name, source.hub_name) == ("MyGPT", None)


def test_unknown_model():
    with pytest.raises(ConversionError, match="'no/such-model' cannot be loaded"):
        load_source("no/such-model")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ConversionError, match="cannot be loaded"):
        load_source(tmp_path)


def test_damaged_weights_file(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConversionError, match="cannot be loaded"):
        load_source(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_embd", "abc", "field 'n_embd': TypeError: .* expected int, got str .value: 'abc'"),
        ("n_embd", 33, r"\(got `embed_dim`: 33 and `num_heads`: 2\)"),
        ("n_head", 0, "ZeroDivisionError"),
        ("activation_function", "magic", "KeyError: 'magic'"),
        ("quantization_config", 3, "AttributeError: 'int' object"),
    ],
)
def test_a_wrong_field_of_the_configuration(tiny_folder, tmp_path, field, value, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ConversionError, match=f"cannot be loaded: .*{message}.* Give the name of"):
        load_source(folder)


def in_the_old_format(folder):
    """The tensors in a file that PyTorch itself writes."""
    (folder / "model.safetensors").rename(folder / "tensors")
    torch.save(load_file(folder / "tensors"), folder / "pytorch_model.bin")
    return (folder / "pytorch_model.bin").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:1000], "failed finding central directory"),
        (lambda content: b"", "EOFError"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1", "is damaged or holds"),
        (lambda content: pickle.dumps(print, protocol=2), "something else than tensors"),
        (lambda content: b"hello" * 9, "KeyError"),
    ],
)
def test_damaged_weights_of_the_old_format(tiny_folder, tmp_path, damage, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    content = in_the_old_format(folder)
    assert load_source(folder).model.config.model_type == "gpt2"
    (folder / "pytorch_model.bin").write_bytes(damage(content))
    with pytest.raises(ConversionError, match=f"cannot be loaded: .*{message}") as raised:
        load_source(folder)
    assert "weights_only" not in str(raised.value)


def without(folder, *names):
    """The folder, its weights lacking these tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_without_an_output_layer(tmp_path):
    AutoModel.from_config(tiny_config("llama", tie_word_embeddings=False)).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="lacks lm_head.weight, which would be random"):
        load_source(tmp_path)


def test_a_checkpoint_that_lacks_tensors(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    layers = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in (0, 1) for name in ("up", "down")]
    without(tmp_path, layers[0])
    with pytest.raises(ConversionError, match=r"lacks model.layers.0.mlp.up_proj.weight, which"):
        load_source(tmp_path)
    without(tmp_path, *layers[1:], "model.norm.weight", "model.layers.0.input_layernorm.weight")
    with pytest.raises(ConversionError, match=r"lacks .*mlp.down_proj.weight.* and 1 more, which"):
        load_source(tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_output_layer_that_is_the_input_embedding_is_not_missing(tmp_path, tied):
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    load_source(tmp_path)


def test_weights_of_another_shape_than_the_configuration_says(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    shapes = r"layers.0.mlp.down_proj.weight is \(32, 48\) instead of \(32, 40\).* and 1 more"
    with pytest.raises(ConversionError, match=f"contradict its config.json: .*{shapes}"):
        load_source(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", "`device` 'foo' cannot be used: Expected one of cpu, .* Leave it out"),
        ("", "`device` '' cannot be used"),
        ("xla", "`device` 'xla' cannot be used"),
        ("hpu", "`device` 'hpu' cannot be used"),
        ("meta", "`device` 'meta' holds no values"),
    ],
)
def test_a_device_that_cannot_be_used(device, message):
    with pytest.raises(ConversionError, match=message):
        load_source("no/such-model", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda")])
def test_a_gpu_that_is_not_there(device):
    with pytest.raises(ConversionError, match="`device` 'cuda.* cannot be used: .* give 'cpu'"):
        load_source("no/such-model", device=device)


@pytest.mark.parametrize(
    "dtype", ["int8", "float8_e4m3fn", "complex64", "nn", "", torch.float8_e4m3fn, torch.int64]
)
def test_a_type_that_no_model_is_computed_in(dtype):
    with pytest.raises(ConversionError, match="`dtype` .* no type that a model can be computed in"):
        load_source("no/such-model", dtype=dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny_folder, value):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = value
    with pytest.raises(ConversionError, match=r"h.0.mlp.c_fc.weight' holds 1 values"):
        load_source(model)


def test_weights_beyond_half_precision(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(ConversionError, match=r"c_fc.weight' holds 1 .* float16 ends .* bfloat16"):
        load_source(model, dtype="float16")


def test_encoder_decoder_folder(tmp_path):
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="'t5' is an encoder-decoder"):
        load_source(tmp_path)


def test_an_encoder_without_an_output_layer(tmp_path):
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"lacks cls\.predictions\..* which would be random"):
        load_source(tmp_path)


def test_tokenizer_beyond_the_vocabulary(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(ConversionError, match="ids up to 400, .* 400 tokens"):
        load_source(model, tokenizer=tokenizer)


def test_missing_tokenizer_is_told(tiny_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    assert load_source(folder).tokenizer is None
    assert "no tokenizer" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', "{}"])
def test_a_damaged_tokenizer_is_told(tiny_folder, tmp_path, caplog, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(content)
    assert load_source(folder).tokenizer is None
    assert "no tokenizer that can be loaded" in caplog.text


class Undequantisable:
    """Stands for a quantiser without a way back."""


def test_quantised_source_that_cannot_be_dequantised(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.quantization_config = {"quant_method": "mystery"}
    model.hf_quantizer = Undequantisable()
    with pytest.raises(ConversionError, match="itself quantised and cannot be dequantised"):
        load_source(model)


def test_gguf_needs_a_folder(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(ConversionError, match="`gguf_file` needs a folder"):
        load_source(model, gguf_file="a.gguf")
