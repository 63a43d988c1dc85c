import filecmp
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_vqlogits import VQLogitsForCausalLM
from hf_vqlogits.conversion import ConversionError, ConversionReport, convert_to_vq
from hf_vqlogits.conversion.evaluation import perplexity
from hf_vqlogits.conversion.sizes import METHODS
from hf_vqlogits.conversion.text import split_lines, tokenize


@pytest.fixture(scope="module")
def converted(tiny_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny-vq"
    return convert_to_vq(
        tiny_folder, output=out, param_reduction=0.9, calibration_data=str(text_file), ladder=True
    )


def test_output_loads_and_computes_what_the_report_judged(converted, tiny_folder, text, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(converted.output)
    assert isinstance(model, VQLogitsForCausalLM)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, converted.model.state_dict()[name], rtol=0, atol=0)
    held_out = tokenize(split_lines(text, 0.8)[1], tokenizer, 25_000)
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for judged, expected in ((model, "after"), (dense, "before")):
        measured = perplexity(judged, held_out, context=64).perplexity
        assert converted.perplexity[expected] == pytest.approx(measured, rel=0.01)


def test_report_counts_parameters_and_bytes(converted):
    tensors = load_file(os.path.join(converted.output, "model.safetensors"))
    head = {k.removeprefix("lm_head."): v for k, v in tensors.items() if k.startswith("lm_head.")}
    floats = head["codebook"].numel() + head["codebook_bias"].numel()
    assert converted.head_after["parameters"] == floats
    assert converted.head_after["codes_bytes"] == head["codes"].numel()
    assert converted.head_after["bytes"] == 4 * floats + head["codes"].numel()
    assert converted.head_before == {"parameters": 400 * 32, "bytes": 400 * 32 * 4}
    assert converted.param_reduction == pytest.approx(1 - floats / (400 * 32))
    assert converted.param_reduction >= 0.9
    assert converted.bits_per_token == converted.num_codebooks == head["codebook"].shape[0]
    assert converted.model_bytes["after"] == sum(t.numel() * t.itemsize for t in tensors.values())


def test_output_carries_tokenizer_and_generation_config_unchanged(converted, tiny_folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert filecmp.cmp(tiny_folder / name, f"{converted.output}/{name}", shallow=False), name
    before, after = (AutoTokenizer.from_pretrained(p) for p in (tiny_folder, converted.output))
    chat = [{"role": "user", "content": "for"}]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)


def test_output_holds_report_card_and_plot(converted):
    stored = json.loads(open(f"{converted.output}/vq_report.json").read())
    assert stored == json.loads(converted.to_json())
    card = open(f"{converted.output}/README.md").read()
    assert "vq_report.png" in card
    assert f"{converted.bits_per_token} bits a token" in card
    assert os.path.getsize(f"{converted.output}/vq_report.png") > 5_000


def test_ladder_grows_better_with_size(converted):
    assert [round(rung.param_reduction, 2) for rung in converted.ladder] == [1.0, 0.99, 0.98, 0.96]
    bits = [rung.bits_per_token for rung in converted.ladder]
    assert bits == sorted(set(bits))
    assert converted.ladder[0].perplexity > converted.ladder[-1].perplexity


def test_the_same_seed_gives_the_same_bytes(tiny_folder, text_file, tmp_path):
    for name in ("a", "b"):
        convert_to_vq(
            tiny_folder, output=tmp_path / name, bits=16, calibration_data=str(text_file), seed=3
        )
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_working_model(method, tiny_folder, text_file):
    report = convert_to_vq(
        tiny_folder, method=method, param_reduction=0.8, calibration_data=str(text_file)
    )
    assert isinstance(report, ConversionReport)
    assert report.perplexity["after"] >= 0.97 * report.perplexity["before"]
    assert report.model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 400)
    single = method not in ("signs", "residual")
    assert (report.perplexity_bound is not None) == single
    if single:
        assert report.perplexity["after"] >= report.perplexity_bound
    report.print()


def test_signs_beat_the_papers_form_at_the_same_parameters(tiny_folder, text_file):
    options = {"param_reduction": 0.8, "calibration_data": str(text_file)}
    signs, kmeans = (convert_to_vq(tiny_folder, method=m, **options) for m in ("signs", "kmeans"))
    assert signs.perplexity["factor"] < kmeans.perplexity["factor"]


def test_distillation_lowers_the_divergence(tiny_folder, text_file):
    report = convert_to_vq(tiny_folder, bits=12, calibration_data=str(text_file), distill_steps=30)
    done = report.fit["distillation"]
    assert done["kl_after"] < done["kl_before"]


def test_without_text_the_model_writes_its_own(tiny_folder, caplog):
    report = convert_to_vq(tiny_folder, bits=16, calibration_tokens=2_000)
    assert report.calibration["source"] == "text written by the model itself"
    assert any("WikiText-2 could not be had" in note for note in report.notes)
    assert "writes its own calibration text" in caplog.text


def test_model_objects_and_dtype(tiny_folder, text_file, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    report = convert_to_vq(
        model, tokenizer=tokenizer, bits=16, calibration_data=str(text_file), dtype="bfloat16"
    )
    assert report.model.lm_head.codebook.dtype == torch.bfloat16
    assert report.model.model.backbone is model.transformer
    with pytest.raises(ConversionError, match="has no tokenizer to read"):
        convert_to_vq(model, bits=16, calibration_data=str(text_file))


def test_push_to_hub_uploads_the_output_folder(tiny_folder, text_file, tmp_path, monkeypatch):
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{name}",
            lambda self, *args, name=name, **kwargs: calls.append((name, args, kwargs)),
        )
    out = tmp_path / "out"
    convert_to_vq(
        tiny_folder,
        output=out,
        bits=16,
        calibration_data=str(text_file),
        push_to_hub="someone/tiny-vq",
    )
    assert calls == [
        ("create_repo", ("someone/tiny-vq",), {"exist_ok": True}),
        ("upload_folder", (), {"repo_id": "someone/tiny-vq", "folder_path": str(out)}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "tied"}, "`embeddings` must be 'keep', got 'tied'"),
        ({"method": "kmeans", "ladder": True}, "`ladder` compares sign codes"),
        ({"push_to_hub": "a/b"}, "give `output` as well"),
        ({"calibration_tokens": 0}, "`calibration_tokens` must be at least 1, got 0"),
        ({"distill_steps": -1}, "`distill_steps` must be at least 0, got -1"),
        ({"calibration_tokens": 20}, "at least 65 .* are needed"),
        ({"calibration_data": "/nowhere/text.txt"}, "/nowhere/text.txt"),
        ({"dtype": "int8"}, "`dtype` 'int8' is no floating-point type"),
        ({"gguf_file": "missing.gguf"}, "cannot be loaded"),
    ],
)
def test_bad_options(options, message, tiny_folder, text_file):
    options = {"calibration_data": str(text_file), **options}
    with pytest.raises(ConversionError, match=message):
        convert_to_vq(tiny_folder, **options)
