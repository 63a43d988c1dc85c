"""Conversions to several sizes at once."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_vqlogits import VQLogitsForCausalLM
from hf_vqlogits.conversion import ConversionError, convert, convert_to_vq, distillation, training
from hf_vqlogits.conversion.distillation_state import END_TO_END
from hf_vqlogits.conversion.evaluation import perplexity
from hf_vqlogits.conversion.nested_sizes import choose_nested_size
from hf_vqlogits.conversion.text import split_lines, tokenize
from hf_vqlogits.nested import cut_codes

NESTED = [0.9, 0.8, 0.7]  # 38, 77 and 116 bits a token


@pytest.fixture(scope="module")
def options(text_file):
    return {"calibration_data": str(text_file), "nested": NESTED}


@pytest.fixture(scope="module", params=[0, 12], ids=["fitted", "distilled"])
def converted(request, options, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny-vq"
    return convert_to_vq(tiny_folder, output=out, distill_steps=request.param, **options)


def test_every_size_is_loaded_as_it_was_judged(converted, text, tokenizer):
    held_out = tokenize(split_lines(text, 0.8)[1], tokenizer, 25_000)
    assert [rung.num_codebooks for rung in converted.nested] == [38, 77, 116]
    for rung, least in zip(converted.nested, NESTED, strict=True):
        bits = rung.num_codebooks
        model = AutoModelForCausalLM.from_pretrained(converted.output, num_codebooks=bits)
        assert isinstance(model, VQLogitsForCausalLM)
        head = model.lm_head
        assert head.num_codebooks == bits
        assert rung.perplexity == pytest.approx(
            perplexity(model, held_out, context=64).perplexity, rel=0.01
        )
        names = ("hidden_mean", "fold_direction")
        tensors = (t for n, t in head.state_dict().items() if n not in names)
        assert rung.bytes == sum(t.nbytes for t in tensors)
        floats = head.codebook.numel() + head.codebook_bias.numel()
        assert rung.param_reduction == 1 - floats / (400 * 32) >= least
        assert rung.bits_per_token == bits * (1 + 40 / 400)
        assert rung.perplexity_factor == rung.perplexity / converted.perplexity["before"]
        assert 0 <= rung.greedy_agreement <= 1
        assert rung.logit_seconds > 0


def test_the_last_size_is_that_of_the_report(converted):
    *smaller, whole = converted.nested
    assert whole.perplexity == converted.perplexity["after"]
    assert whole.bytes == converted.head_after["bytes"]
    assert smaller[0].perplexity > smaller[1].perplexity > whole.perplexity
    assert converted.ladder == []
    stored = json.loads(open(f"{converted.output}/vq_report.json").read())
    assert [rung["num_codebooks"] for rung in stored["nested"]] == [38, 77, 116]
    assert converted.head_after["nested_bytes"] == 4 * (38 + 77) * 33
    tensors = load_file(f"{converted.output}/model.safetensors")
    assert converted.model_bytes["after"] == sum(t.nbytes for t in tensors.values())
    card = open(f"{converted.output}/README.md").read()
    assert 'AutoModelForCausalLM.from_pretrained("tiny-vq", num_codebooks=38)' in card


def test_every_size_was_distilled_alike(converted):
    done = [converted.fit.get(f"distillation{which}") for which in (" 38", " 77", "")]
    if done == [None] * 3:
        assert "distillation" not in converted.seconds
        return
    assert [one["steps"] for one in done] == [12, 12, 12]
    assert all(one["kl_after"] <= one["kl_before"] for one in done)
    assert done[0]["kl_after"] > done[1]["kl_after"] > done[2]["kl_after"]
    assert converted.distillation.startswith("of each size; of the whole 12 steps; divergence")


def test_sizes_inside_are_about_as_good_as_alone(converted, tiny_folder, options):
    steps = converted.fit.get("distillation", {"steps": 0})["steps"]
    alone = convert_to_vq(
        tiny_folder, **(options | {"nested": None}), param_reduction=0.8, distill_steps=steps
    )
    assert converted.nested[1].perplexity <= 1.01 * alone.perplexity["after"]


def test_distillation_moves_the_new_bits_alone(tiny_folder, options, monkeypatch):
    seen = []
    move = distillation.move_codes

    def watch(head, metric, slope, damping, frozen):
        before = head.codes.clone()
        move(head, metric, slope, damping, frozen)
        assert frozen == 0 or torch.equal(cut_codes(before, frozen), cut_codes(head.codes, frozen))
        seen.append((head.num_codebooks, frozen, not torch.equal(before, head.codes)))

    monkeypatch.setattr(distillation, "move_codes", watch)
    convert_to_vq(tiny_folder, distill_steps=40, **options)
    assert {(bits, frozen) for bits, frozen, _ in seen} == {(38, 0), (77, 38), (116, 77)}
    assert any(moved for _, frozen, moved in seen if frozen)


def test_the_input_side_may_have_codes_of_its_own(
    tiny_folder, text, tokenizer, options, tmp_path, monkeypatch
):
    judge = training.Training.judge

    def keep_the_last(self, made):  # so few steps need not improve, and the start would be kept
        self.best_kl = math.inf
        return judge(self, made)

    monkeypatch.setattr(training.Training, "judge", keep_the_last)
    held_out = tokenize(split_lines(text, 0.8)[1], tokenizer, 25_000)
    heads = []
    for steps in (1, 10):  # from the same fits
        out = tmp_path / str(steps)
        report = convert_to_vq(
            tiny_folder, output=out, embeddings="vq", input_distill_steps=steps, **options
        )
        for rung in report.nested:
            model = AutoModelForCausalLM.from_pretrained(out, num_codebooks=rung.num_codebooks)
            assert model.config.embedding_codebooks == 116
            measured = perplexity(model, held_out, context=64).perplexity
            assert rung.perplexity == pytest.approx(measured, rel=0.01)
        heads.append(report.model.lm_head.state_dict())
    assert report.end_to_end.startswith("of the largest size alone: 10 steps")
    one, other = heads
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
    assert changed == {"codebook", "codebook_bias"}  # none of a smaller size


def test_an_interrupted_conversion_goes_on(tiny_folder, options, tmp_path, monkeypatch):
    whole = convert_to_vq(tiny_folder, distill_steps=10, **options)
    options = options | {"distill_steps": 10, "distill_state": tmp_path / "state"}
    save, judge = training.save_state, distillation.held_out_kl
    judged = []

    def interrupt(file, *arguments):
        save(file, *arguments)
        if file.name == "state.77":
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        convert_to_vq(tiny_folder, **options)
    assert {file.name for file in tmp_path.iterdir()} == {"state.38", "state.77"}
    monkeypatch.setattr(training, "save_state", save)

    def watch(head, *arguments):
        judged.append(head.num_codebooks)
        return judge(head, *arguments)

    monkeypatch.setattr(distillation, "held_out_kl", watch)
    again = convert_to_vq(tiny_folder, **options)
    assert 38 not in judged  # what was finished is not made again
    assert list(tmp_path.iterdir()) == []
    for name, tensor in whole.model.lm_head.state_dict().items():
        assert torch.equal(again.model.lm_head.state_dict()[name], tensor)


def test_a_conversion_interrupted_in_its_last_stage_goes_on_there(
    tiny_folder, options, tmp_path, monkeypatch
):
    options = options | {"nested": NESTED[:2], "distill_steps": 4, "embeddings": "vq"}
    options |= {"input_distill_steps": 3}
    whole = convert_to_vq(tiny_folder, **options)
    options["distill_state"] = tmp_path / "state"
    save, told = training.save_state, []

    def interrupt(file, stage, *arguments):
        save(file, stage, *arguments)
        if stage == END_TO_END:
            raise KeyboardInterrupt

    def record(file, stage, *arguments):
        save(file, stage, *arguments)
        told.append((file.name, stage))

    monkeypatch.setattr(training, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        convert_to_vq(tiny_folder, **options)
    assert {file.name for file in tmp_path.iterdir()} == {"state.38", "state.77"}
    monkeypatch.setattr(training, "save_state", record)
    again = convert_to_vq(tiny_folder, **options)
    # No size is distilled again, and of three checks the first was made before.
    assert told == [("state.77", END_TO_END)] * 2
    assert list(tmp_path.iterdir()) == []
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_a_state_file_where_the_sizes_are_not_distilled(tiny_folder, options, tmp_path):
    report = convert_to_vq(
        tiny_folder,
        distill_steps=0,
        embeddings="vq",
        input_distill_steps=3,
        distill_state=tmp_path / "state",
        **options,
    )
    assert report.fit["end to end"]["steps"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_state_is_told_before_the_fit(
    tiny_folder, options, tmp_path, monkeypatch
):
    (tmp_path / "state.77").write_bytes(b"years of work")
    monkeypatch.setattr("hf_vqlogits.conversion.signs.SignFitter.fit", None)
    with pytest.raises(ConversionError, match="state.77' holds no state of a distillation"):
        convert_to_vq(tiny_folder, distill_steps=10, distill_state=tmp_path / "state", **options)
    assert (tmp_path / "state.77").read_bytes() == b"years of work"


def test_room_is_checked_for_the_codebooks_of_all_sizes(
    tiny_folder, options, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(convert, "check_room", lambda folder, needed: asked.append(needed))
    out = tmp_path / "out"
    report = convert_to_vq(tiny_folder, output=out, **options)
    written = sum(path.stat().st_size for path in out.iterdir())
    assert written <= asked[0] <= written + 1_200_000
    stored = sum(t.nbytes for t in report.model.lm_head.state_dict().values())
    size = choose_nested_size(NESTED, vocab_size=400, hidden_size=32)
    assert size.stored_bytes(400, 32, 4) == stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "`nested` and `bits` both choose the size"),
        ({"method": "residual"}, "does not apply to method 'residual'"),
        ({"max_perplexity_increase": 0.1}, "`nested` and `max_perplexity_increase` both choose"),
        ({"ladder": True}, "`nested` and `ladder` contradict"),
        ({"embeddings": "tied"}, "`nested` does not go with `embeddings` 'tied'"),
        ({"nested": [0.9]}, "at least two reductions"),
        ({"nested": [0.9, 0.9999]}, "`nested` holds 0.9999, but: .* cannot be reached"),
    ],
)
def test_bad_options(tiny_folder, options, changes, message, monkeypatch):
    monkeypatch.setattr(convert, "prepare_corpus", None)
    with pytest.raises(ConversionError, match=message):
        convert_to_vq(tiny_folder, **(options | changes))
