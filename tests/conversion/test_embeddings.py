import json
import math
import pydoc_data.topics

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_vqlogits.conversion import (
    ConversionError,
    convert,
    convert_to_vq,
    embeddings,
    quantise,
    training,
)
from hf_vqlogits.conversion.card import model_card
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation_state import END_TO_END
from hf_vqlogits.conversion.embeddings import (
    FLATTENING,
    SMOOTHING,
    TIED_WEIGHT,
    beside_the_logits,
    check_embeddings,
    fit_embedding,
    input_information,
    tie_embedding,
    token_weights,
)
from hf_vqlogits.conversion.evaluation import perplexity
from hf_vqlogits.conversion.families import take_apart
from hf_vqlogits.conversion.sizes import HeadSize
from hf_vqlogits.conversion.text import tokenize
from hf_vqlogits.embedding import SHARED, VQEmbedding
from hf_vqlogits.head import VQLogitsHead

MODES = ["vq", "tied"]


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """More of the English that the text fixture begins."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    whole = "\n".join(sorted(pydoc_data.topics.topics.values()))
    path.write_text(whole[100_000:120_000], encoding="utf8")
    return path


@pytest.fixture(scope="module", params=MODES)
def converted(request, tiny_folder, text_file, other_text, tmp_path_factory):
    return convert_to_vq(
        tiny_folder,
        output=tmp_path_factory.mktemp("converted") / request.param,
        bits=64,
        embeddings=request.param,
        calibration_data=text_file,
        eval_data=other_text,
    )


def test_the_report_judges_the_whole_converted_model(converted, tiny_folder, other_text, tokenizer):
    """The head alone is better than that; the folder computes what the report says."""
    ids = tokenize(other_text.read_text(), tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(converted.output)
    assert isinstance(loaded.get_input_embeddings(), VQEmbedding)
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for model, expected in ((dense, "before"), (loaded, "after")):
        measured = perplexity(model, ids, context=64).perplexity
        assert converted.perplexity[expected] == pytest.approx(measured, rel=0.01)
    loaded.set_input_embeddings(dense.get_input_embeddings())
    found, measured = converted.perplexity, perplexity(loaded, ids, context=64).perplexity
    assert found["head_alone"] == pytest.approx(measured, rel=1e-3)
    assert found["head_alone"] != found["after"]
    assert found["factor"] == found["after"] / found["before"] < 1.2
    assert 0.7 < converted.greedy_agreement < 1


NO_PARAMETERS = ("codes", "fine_ids", "mean", "direction")


def test_sizes_count_shared_tensors_once(converted, tiny_folder):
    dense = load_file(tiny_folder / "model.safetensors")
    tensors = load_file(f"{converted.output}/model.safetensors")
    floats = [t for n, t in tensors.items() if not n.endswith(NO_PARAMETERS)]
    assert converted.model_bytes == {
        "before": sum(t.nbytes for t in dense.values()),
        "after": sum(t.nbytes for t in tensors.values()),
    }
    assert converted.model_parameters == {
        "before": sum(t.numel() for t in dense.values()),
        "after": sum(t.numel() for t in floats),
    }
    assert converted.embedding_before == {"parameters": 400 * 32, "bytes": 400 * 32 * 4}
    own = 32 + (64 * 32 if converted.embeddings == "vq" else 0)
    codes = 400 * 8 if converted.embeddings == "vq" else 0
    assert converted.embedding_after == {"parameters": own, "bytes": 4 * own + codes}
    saved = converted.model_parameters["before"] - converted.model_parameters["after"]
    assert saved == 400 * 32 - own - converted.head_after["parameters"]


def test_report_and_card_say_which_mode_is_in_force(converted):
    stored = json.loads(open(f"{converted.output}/vq_report.json").read())
    assert stored["embeddings"] == converted.embeddings == converted.model.config.embeddings
    told = {"vq": "vq: sign codes and a codebook of its own", "tied": "tied: codes and codewords"}
    card = open(f"{converted.output}/README.md").read()
    assert card == model_card(converted)
    assert "output layer and input embedding replaced by vector-quantised ones" in card
    assert f"- input embedding: {told[converted.embeddings]}" in card
    rows = {name: after for name, _, after in converted.rows()}
    own = " of its own" if converted.embeddings == "tied" else ""
    assert rows["input embedding, float parameters"].endswith(f"32{own}" if own else "2,080")
    assert (
        f"{converted.perplexity['head_alone']:.2f} (x"
        in rows["with the output layer alone replaced"]
    )
    assert not any("keeps it" in note for note in converted.notes)
    converted.print()


def test_both_sides_are_what_the_mode_says(converted):
    model = AutoModelForCausalLM.from_pretrained(converted.output)
    for one in (converted.model, model):
        embedding = one.get_input_embeddings()
        shared = [getattr(one.lm_head, n) is getattr(embedding, n) for n in SHARED]
        assert shared == [converted.embeddings == "tied"] * 4
    before, after = converted.model.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_same_seed_gives_the_same_bytes(tiny_folder, text_file, tmp_path):
    stored = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        output = tmp_path / str(number)
        options = {"bits": 16, "embeddings": "vq", "calibration_data": text_file}
        convert_to_vq(tiny_folder, output=output, seed=seed, **options)
        stored.append((output / "model.safetensors").read_bytes())
    assert stored[0] == stored[1] != stored[2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("gemma3_text", {}),
        ("opt", {}),
        ("mamba", {}),
        ("granite", {"embedding_multiplier": 3.0}),
        ("falcon_h1", {"embedding_multiplier": 3.0}),
        ("biogpt", {}),
        ("recurrent_gemma", {}),
    ],
)
def test_families_compute_from_the_coded_rows_what_the_original_would(
    family, changes, mode, tmp_path
):
    fields = {"tie_word_embeddings": True, **changes}
    report = convert_to_vq(
        tiny_model(family, **fields),
        output=tmp_path / "out",
        bits=40,
        embeddings=mode,
        calibration_data="self",
        calibration_tokens=500,
    )
    loaded = AutoModelForCausalLM.from_pretrained(report.output)
    assert loaded.config.tie_word_embeddings == (mode == "tied")
    original = tiny_model(family, **fields).base_model
    rows, table = loaded.get_input_embeddings().weight, original.get_input_embeddings().weight
    error = (rows - table).square().mean() / table.square().mean()
    assert error < 0.4
    table.data = rows
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        given, wanted = (m(ids).last_hidden_state for m in (loaded.model, original))
    torch.testing.assert_close(given, wanted, atol=1e-3, rtol=1e-3)
    assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 12)


def test_untied_models_take_codes_of_their_own(text_file, tokenizer):
    model = tiny_model("llama", vocab_size=400, tie_word_embeddings=False)
    options = {"tokenizer": tokenizer, "bits": 40, "calibration_data": text_file}
    report = convert_to_vq(model, embeddings="vq", embedding_bits=24, **options)
    assert report.model.get_input_embeddings().num_codebooks == 24
    assert report.model.config.embedding_codebooks == 24
    saved = report.model_parameters["before"] - report.model_parameters["after"]
    assert saved == 400 * 32 * 2 - 40 * 33 - 25 * 32
    model = tiny_model("llama", vocab_size=400, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match="'tied' needs a model whose .* 'llama' has two; use"):
        convert_to_vq(model, embeddings="tied", **options)


def test_beside_index_codes(tiny_folder, text_file):
    report = convert_to_vq(
        tiny_folder,
        method="residual",
        num_codebooks=8,
        codebook_size=4,
        embeddings="vq",
        calibration_data=text_file,
    )
    assert report.model.get_input_embeddings().num_codebooks == int(0.02 * 400 * 32 / 33)


@pytest.mark.parametrize("mode", MODES)
def test_after_distillation_the_tie_holds(tiny_folder, text_file, mode):
    report = convert_to_vq(
        tiny_folder, bits=12, embeddings=mode, calibration_data=text_file, distill_steps=20
    )
    embedding = report.model.get_input_embeddings()
    assert (embedding.codebook is report.model.lm_head.codebook) == (mode == "tied")


@pytest.mark.parametrize("mode", MODES)
def test_distilled_end_to_end_the_model_is_nearer_to_the_original(
    tiny_folder, text_file, other_text, tmp_path, mode
):
    options = {"bits": 12, "embeddings": mode, "calibration_data": text_file, "seed": 1}
    options |= {"eval_data": other_text, "embedding_bits": 3 if mode == "vq" else None}
    fitted = convert_to_vq(tiny_folder, **options)
    assert "end to end" not in fitted.fit
    report = convert_to_vq(tiny_folder, output=tmp_path / "out", input_distill_steps=200, **options)
    done = report.fit["end to end"]
    assert done["steps"] == 200
    assert done["kl_after"] < done["kl_before"]
    told = f"200 steps; divergence from the original model {done['kl_before']:.3g} -> "
    assert dict(report.facts())["end-to-end distillation"].startswith(told)
    assert f"input embedding trained by end-to-end distillation ({told}" in model_card(report)
    loaded = AutoModelForCausalLM.from_pretrained(report.output)
    for name in SHARED:
        sides = [getattr(m, name) for m in (loaded.lm_head, loaded.get_input_embeddings())]
        assert (sides[0] is sides[1]) == (mode == "tied" or sides == [None, None])
    ids = torch.randint(0, 400, (2, 9))
    assert torch.equal(loaded(ids).logits, report.model(ids).logits)
    assert all(p.requires_grad and p.grad is None for p in report.model.parameters())


@pytest.mark.parametrize(
    ("method", "mode", "steps"),
    [("signs", "tied", 3), ("signs", "vq", 3), ("signs", "keep", None), ("kmeans", "vq", None)],
)
def test_sign_codes_are_distilled_end_to_end_by_default(
    tiny_folder, text_file, monkeypatch, method, mode, steps
):
    monkeypatch.setattr("hf_vqlogits.conversion.options.INPUT_DISTILL_STEPS", 3)
    size = {"bits": 12} if method == "signs" else {"codebook_size": 9}
    options = {"method": method, "embeddings": mode, "calibration_data": text_file, **size}
    report = convert_to_vq(tiny_folder, **options)
    assert report.fit.get("end to end", {"steps": None})["steps"] == steps
    off = convert_to_vq(tiny_folder, input_distill_steps=0, **options)
    assert "end to end" not in off.fit


def test_too_little_text_for_the_end_to_end_distillation(tiny_folder, monkeypatch):
    for name in ("DISTILL_STEPS", "INPUT_DISTILL_STEPS"):
        monkeypatch.setattr(f"hf_vqlogits.conversion.options.{name}", 3)
    options = {"bits": 8, "calibration_data": "self", "calibration_tokens": 500}
    report = convert_to_vq(tiny_folder, embeddings="tied", **options)
    assert "end to end" not in report.fit
    told = [note for note in report.notes if "too little calibration text" in note]
    assert len(told) == 1
    monkeypatch.setattr(quantise.Quantiser, "calibrate", None)  # it is told before
    with pytest.raises(ConversionError, match="needs at least .* or `input_distill_steps` 0"):
        convert_to_vq(tiny_folder, embeddings="tied", input_distill_steps=3, **options)


def test_a_conversion_interrupted_in_its_last_stage_goes_on_there(
    tiny_folder, text_file, tmp_path, monkeypatch
):
    options = {"bits": 12, "embeddings": "tied", "calibration_data": text_file}
    options |= {"distill_steps": 8, "input_distill_steps": 20}
    whole = convert_to_vq(tiny_folder, **options)
    options["distill_state"] = tmp_path / "state"
    save, told = training.save_state, []

    def interrupt(file, stage, *arguments):
        save(file, stage, *arguments)
        if stage == END_TO_END:
            raise KeyboardInterrupt

    def record(file, stage, *arguments):
        save(file, stage, *arguments)
        told.append(stage)

    monkeypatch.setattr(training, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        convert_to_vq(tiny_folder, **options)
    monkeypatch.setattr(training, "save_state", record)
    again = convert_to_vq(tiny_folder, **options)
    # The head's stage is over, and of five checks the first was made before.
    assert told == [END_TO_END] * 4
    assert list(tmp_path.iterdir()) == []
    assert again.fit["distillation"] == whole.fit["distillation"]
    assert again.fit["end to end"] == whole.fit["end to end"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", MODES)
def test_room_is_checked_for_the_whole_output(
    mode, dtype, tiny_folder, text_file, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(convert, "check_room", lambda folder, needed: asked.append(needed))
    out = tmp_path / "out"
    options = {"bits": 13, "embeddings": mode, "dtype": dtype, "calibration_data": text_file}
    report = convert_to_vq(tiny_folder, output=out, **options)
    assert report.model.get_input_embeddings().offset.dtype == getattr(torch, dtype)
    stored = sum(path.stat().st_size for path in out.iterdir())
    assert stored <= asked[0] <= stored + 1_200_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "both"}, "`embeddings` must be one of keep, vq, tied; got 'both'"),
        ({"embeddings": "tied", "method": "kmeans"}, "needs sign codes, but `method` is 'kmeans'"),
        ({"embeddings": "tied", "ladder": True}, "`ladder` compares output layers alone, .*'tied'"),
        ({"embeddings": "vq", "ladder": True}, "`ladder` compares output layers alone, and .*'vq'"),
        ({"embedding_bits": 9}, "`embedding_bits` applies to `embeddings` 'vq' only, not to 'keep"),
        ({"embeddings": "tied", "embedding_bits": 9}, "'vq' only, not to 'tied'"),
        (
            {"input_distill_steps": 5},
            "`input_distill_steps` 5 trains a quantised .* is 'keep'; use",
        ),
        ({"input_distill_steps": -1}, "`input_distill_steps` must be at least 0, got -1"),
        (
            {"embeddings": "tied", "distill_state": "s"}
            | {"distill_steps": 0, "input_distill_steps": 0},
            "keeps a distillation, but there are no steps",
        ),
        ({"embeddings": "vq", "embedding_bits": 0}, "`embedding_bits` must be at least 1, got 0"),
        (
            {"embeddings": "vq", "embedding_bits": 10**6},
            "`embedding_bits` 1000000: .* would be larger than the dense layer",
        ),
    ],
)
def test_bad_options(options, message, tiny_folder, text_file):
    with pytest.raises(ConversionError, match=message):
        convert_to_vq(tiny_folder, **({"calibration_data": text_file} | options))


# The parts


def test_tokens_count_by_a_smoothed_power_of_how_often_they_are_read():
    blocks = torch.tensor([[0, 1, 1, 4], [1, 0, 2, 2]])  # the last of a row is never read
    weights = token_weights(blocks, 5)
    wanted = torch.tensor([2.0, 3.0, 1.0, 0.0, 0.0]).add(SMOOTHING).pow(FLATTENING)
    torch.testing.assert_close(weights, wanted / wanted.sum())


def test_fitted_rows_favour_the_tokens_that_are_read():
    torch.manual_seed(0)
    dense = nn.Embedding(600, 24)
    dense.weight.data += 5.0  # what all rows have in common is the offset's
    counts = torch.zeros(600).index_fill(0, torch.arange(60), 100.0) + SMOOTHING
    weights = counts.pow(FLATTENING) / counts.pow(FLATTENING).sum()
    embedding, details = fit_embedding(dense, weights, torch.eye(24), num_codebooks=40)
    error = (embedding.weight - dense.weight).square().mean(1)
    assert error[:60].mean() < 0.5 * error[60:].mean()
    assert error.mean() < 0.5 < 24
    common = weights @ (embedding.weight - dense.weight)
    rounding = 40 * 5.0 * torch.finfo(torch.float32).eps  # sums of 40 vectors, around 5
    assert common.abs().max() < rounding
    assert details["error"] < 0.3
    assert math.isfinite(details["seconds"]["search"])


def test_fitted_rows_favour_the_directions_that_matter():
    torch.manual_seed(0)
    dense, weights = nn.Embedding(400, 24), torch.full((400,), 1 / 400)
    turned = torch.linalg.qr(torch.randn(24, 24))[0]
    lengths = torch.cat([torch.full((4,), 1000.0), torch.ones(20)])
    information = (turned * lengths) @ turned.T
    embedding, _ = fit_embedding(dense, weights, information, num_codebooks=30)
    error = ((embedding.weight - dense.weight) @ turned).square().mean(0)
    assert error[:4].mean() < 0.2 * error[4:].mean()
    # A direction that no text shows any use of still counts, and so does everything without text.
    for nothing in (torch.diag((torch.arange(24) < 23).float()), torch.zeros(24, 24)):
        embedding, _ = fit_embedding(dense, weights, nothing, num_codebooks=100)
        assert (embedding.weight - dense.weight).square().mean() < 0.3


def test_a_tied_table_is_fitted_to_both_sides():
    """Logits as errors of the rows in all directions alike; what is read, in four of them."""
    parts = take_apart(tiny_model("llama", tie_word_embeddings=True))
    blocks = torch.randint(3, 96, (60, 17))
    quantiser = quantise.Quantiser(parts, Corpus(blocks, blocks, "text", "text", []), seed=0)
    statistics = quantiser.calibrate()
    statistics.covariance = torch.eye(32, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    information = (turned * torch.cat([torch.full((4,), 1e4), torch.ones(28)])) @ turned.T
    besides = beside_the_logits(information)
    assert float(besides.trace()) == pytest.approx(TIED_WEIGHT)
    size, errors = HeadSize("sign", 24, 2, 0), []
    for quantiser.besides in (None, besides):
        head = quantiser.sign_heads([size], statistics)[size]
        difference = (head.to_linear()[0] - parts.weight).double() @ turned
        errors.append((difference - difference.mean(0)).square().mean(0))
    assert errors[1][:4].mean() < 0.8 * errors[0][:4].mean()
    assert errors[1][4:].mean() > errors[0][4:].mean()


def test_the_codes_of_a_tied_model_know_of_the_input_side(tiny_folder, text_file, monkeypatch):
    metrics, real = [], quantise.token_metric

    def record(*arguments, besides, **options):
        metrics.append(besides)
        return real(*arguments, besides=besides, **options)

    monkeypatch.setattr(quantise, "token_metric", record)
    for mode in ("keep", "vq", "tied"):
        convert_to_vq(
            tiny_folder, bits=8, embeddings=mode, calibration_data=text_file, distill_steps=3
        )
    assert [m is None for m in metrics] == [True] * 4 + [False] * 2  # of fit and distillation
    assert float(metrics[4].trace()) == pytest.approx(TIED_WEIGHT)
    assert torch.equal(metrics[4], metrics[5])


@pytest.mark.parametrize("family", ["gemma2", "granite", "mamba"])
def test_information_of_the_embeddings_output(family):
    """Against gradients through the original's logits, to the same tokens drawn."""
    model = tiny_model(family)
    parts, blocks = take_apart(model), torch.randint(3, 90, (3, 12))
    parameters = [p.requires_grad for p in model.parameters()]
    given = input_information(parts, blocks, seed=5)
    assert [p.requires_grad for p in model.parameters()] == parameters
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    generator = torch.Generator().manual_seed(5)
    wanted = torch.zeros(32, 32, dtype=torch.float64)
    for row in blocks:
        inputs = model.get_input_embeddings()(row[None, :-1]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        wanted += inputs.grad[0].double().T @ inputs.grad[0].double() / 33
    assert given.dtype == torch.float64
    torch.testing.assert_close(given, wanted, atol=1e-4 * float(wanted.max()), rtol=1e-3)


def test_information_reads_all_parts_of_a_long_text_and_no_more_than_it_should(monkeypatch):
    parts, read = take_apart(tiny_model("gpt2")), []
    monkeypatch.setattr(embeddings, "FISHER_TOKENS", 40)
    blocks = torch.arange(90)[3:83, None].expand(-1, 11)
    parts.backbone.wte.register_forward_pre_hook(lambda _, ids: read.append(int(ids[0][0, 0])))
    input_information(parts, blocks)
    assert read == [3, 23, 43, 63]


def test_tied_rows_are_the_heads_and_the_common_rest():
    model = tiny_model("llama")
    report = convert_to_vq(model, bits=64, calibration_data="self", calibration_tokens=500)
    head, dense = report.model.lm_head, report.model.get_input_embeddings()
    assert isinstance(head, VQLogitsHead)
    weights = torch.rand(96)
    weights /= weights.sum()
    embedding = tie_embedding(dense, weights, head)
    rows = head.to_linear()[0]
    offset = weights @ (dense.weight - rows)
    torch.testing.assert_close(embedding.weight, rows + offset, atol=1e-4, rtol=1e-4)
    assert all(getattr(embedding, n) is getattr(head, n) for n in SHARED)


class Normed(nn.Embedding):
    def forward(self, input_ids):
        return nn.functional.normalize(super().forward(input_ids), dim=-1)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_embeddings_that_are_no_table_are_refused(scale):
    model = tiny_model("llama", tie_word_embeddings=True)
    normed = Normed(96, 32)
    normed.weight = model.get_input_embeddings().weight
    if scale is not None:
        normed.embed_scale = scale
    model.set_input_embeddings(normed)
    parts = take_apart(model)
    check_embeddings("keep", parts)
    message = "is a Normed, whose rows" if scale is None else "a Normed, gives other rows than its"
    with pytest.raises(ConversionError, match=message):
        check_embeddings("tied", parts)
