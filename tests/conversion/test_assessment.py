import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_vqlogits.conversion import convert_to_vq
from hf_vqlogits.conversion.corpus import prepare_corpus
from hf_vqlogits.conversion.source import Source


@pytest.mark.parametrize("calibration_data", ["self", "text"])
def test_what_is_no_text_is_not_scored(calibration_data, tokenizer, tiny_folder, text_file):
    """Two prepended tokens: neither the second is scored, nor the random one after them."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        "<|endoftext|> <|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    begins = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>")
    data = str(text_file) if calibration_data == "text" else "self"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    report = convert_to_vq(
        model,
        tokenizer=begins,
        method="kmeans",
        codebook_size=80,
        calibration_data=data,
        calibration_tokens=2_000,
    )
    original = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    rows = prepare_corpus(
        Source("tiny", original, begins, {}),
        calibration_data=data,
        calibration_tokens=2_000,
        eval_data=None,
        seed=0,
        show_progress=False,
    ).evaluation
    skipped = 1 if calibration_data == "text" else 2
    with torch.no_grad():
        scores = original(rows[:, :-1]).logits.double().log_softmax(-1)
    nats = -scores.gather(-1, rows[:, 1:, None])[:, skipped:]
    assert report.evaluation["tokens"] == nats.numel()
    assert report.perplexity["before"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    # The bound counts the same tokens: uniform among those of a code.
    code = report.model.lm_head.codes[rows[:, 1 + skipped :].flatten(), 0].long()
    sizes = report.model.lm_head.codes[:, 0].long().bincount()
    shared = sizes[code].double()
    assert report.perplexity_bound == pytest.approx(math.exp(shared.log().mean()), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_of_the_model_are_those_of_its_checkpoint(tied, tmp_path):
    """Buffers that no checkpoint stores, the rotary frequencies here, count nowhere."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    report = convert_to_vq(
        model,
        output=tmp_path / "vq",
        method="kmeans",
        codebook_size=20,
        calibration_data="self",
        calibration_tokens=500,
    )
    buffers = {"lm_head.codes", "lm_head.hidden_mean", "lm_head.fold_direction"}
    for when, folder in (("before", "dense"), ("after", "vq")):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert report.model_bytes[when] == sum(t.nbytes for t in tensors.values())
        parameters = sum(t.numel() for name, t in tensors.items() if name not in buffers)
        assert report.model_parameters[when] == parameters
    saved = report.model_parameters["before"] - report.model_parameters["after"]
    dense = 0 if tied else report.head_before["parameters"]
    assert saved == dense - report.head_after["parameters"]
