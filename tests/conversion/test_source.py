import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny_folder, value):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = value
    with pytest.raises(ConversionError, match=r"h.0.mlp.c_fc.weight' holds 1 values"):
        load_source(model)


def test_encoder_decoder_folder(tmp_path):
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="'t5' is an encoder-decoder"):
        load_source(tmp_path)


def test_model_object_without_output_layer_class(tmp_path):
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    # BERT has a causal class in AutoModelForCausalLM, so loading works; its head is refused later.
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
