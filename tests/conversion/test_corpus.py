import json
import shutil
import time

import datasets
import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_vqlogits.conversion import corpus
from hf_vqlogits.conversion.corpus import prepare_corpus
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.source import Source
from hf_vqlogits.conversion.text import split_lines, tokenize

OPTIONS = {
    "calibration_data": None,
    "calibration_tokens": 3_000,
    "eval_data": None,
    "seed": 0,
    "show_progress": False,
}
TEMPLATES = {"<bos> $A": [400], "<mask> <bos> $A": [401, 400], "$A": []}


@pytest.fixture
def source(tokenizer, tiny_folder):
    """Of a tiny model whose tokenizer prepends what a template says."""

    def make(template):
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        inner.add_special_tokens(["<bos>", "<mask>"])
        inner.post_processor = processors.TemplateProcessing(
            template, special_tokens=[("<bos>", 400), ("<mask>", 401)]
        )
        special = {"bos_token": "<bos>", "eos_token": "<bos>", "mask_token": "<mask>"}
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model.resize_token_embeddings(402)
        return Source(
            "tiny", model.eval(), PreTrainedTokenizerFast(tokenizer_object=inner, **special), {}
        )

    return make


@pytest.mark.parametrize(("template", "prefix"), TEMPLATES.items())
def test_text_begins_as_the_tokenizer_says(source, template, prefix, text, text_file):
    made = source(template)
    found = prepare_corpus(made, **{**OPTIONS, "calibration_data": str(text_file)})
    assert found.context == 64
    for part, rows in zip(
        split_lines(text, 0.8), (found.calibration, found.evaluation), strict=True
    ):
        ids = tokenize(part, made.tokenizer, rows.numel())
        assert rows.shape[1] == 65
        assert rows[:, : len(prefix)].tolist() == [prefix] * len(rows)
        # Labels, less those that are of the prefix itself: all of the text, each once.
        labels = rows[:, 1 + found.unscored :].flatten()
        first = 0 if prefix else 1
        assert torch.equal(labels, ids[first : first + len(labels)])
    assert len(found.calibration) == 3_000 // (65 - max(1, len(prefix)))


@pytest.mark.parametrize(("template", "prefix"), TEMPLATES.items())
def test_own_text_begins_so_too(source, template, prefix, text_file):
    made = source(template)
    found = prepare_corpus(made, **{**OPTIONS, "calibration_data": "self"})
    length = len(prefix)
    for rows in (found.calibration, found.evaluation):
        assert rows.shape[1] == 65
        assert rows[:, :length].tolist() == [prefix] * len(rows)
    assert len(found.calibration[:, length].unique()) > 20  # a random token follows
    assert found.unscored == length  # up to and with that one
    found = prepare_corpus(
        made, **{**OPTIONS, "calibration_data": "self", "eval_data": str(text_file)}
    )
    assert found.unscored == max(0, length - 1)


@pytest.mark.parametrize(("template", "prefix"), TEMPLATES.items())
def test_a_little_of_what_the_model_writes_beside_a_text(source, template, prefix, text_file):
    found = prepare_corpus(source(template), **{**OPTIONS, "calibration_data": str(text_file)})
    assert found.own.shape[1] == corpus.OWN_CONTEXT + 1
    assert found.own[:, : len(prefix)].tolist() == [prefix] * len(found.own)
    assert found.own[:, 1 + found.own_unscored :].numel() >= corpus.OWN_TOKENS
    assert found.own_unscored == len(prefix)


def test_no_more_of_it_where_it_is_the_calibration_text(source):
    assert prepare_corpus(source("$A"), **{**OPTIONS, "calibration_data": "self"}).own is None


def test_a_model_that_cannot_write_is_not_compared_with(source, text_file, monkeypatch):
    def fail(*arguments, **options):
        raise NotImplementedError("no cache\nhere")

    monkeypatch.setattr(corpus, "sample_token_ids", fail)
    found = prepare_corpus(source("$A"), **{**OPTIONS, "calibration_data": str(text_file)})
    assert found.own is None
    [note] = found.notes
    assert note.startswith("the calibration text was not compared with what the model writes")
    assert note.endswith("as writing failed: no cache")


def test_without_a_tokenizer_rows_begin_with_a_random_token(source):
    made = source("<bos> $A")
    made.tokenizer = None
    found = prepare_corpus(made, **OPTIONS)
    assert len(found.calibration[:, 0].unique()) > 20
    assert found.unscored == 0
    assert found.notes == ["there is no tokenizer, so the model wrote its own calibration text"]


def test_own_text_is_as_long_as_asked_for(source, monkeypatch):
    """Only where nobody asked for it is it kept short, and that is told."""
    monkeypatch.setattr(corpus, "SELF_TOKENS", 1_000)
    made = source("$A")
    asked = {**OPTIONS, "calibration_data": "self", "calibration_tokens": 1_400}
    found = prepare_corpus(made, **asked)
    assert len(found.calibration) + len(found.evaluation) == -(-1_400 // 64)
    assert found.notes == []
    made.tokenizer = None
    found = prepare_corpus(made, **{**asked, "calibration_data": None})
    assert len(found.calibration) + len(found.evaluation) == -(-1_000 // 64)
    assert "the model wrote 1,000 tokens, not 1,400" in found.notes[1]


@pytest.mark.parametrize("tokens", [1, 64])
def test_own_text_judged_is_never_that_calibrated_on(source, tokens):
    asked = {"calibration_data": "self", "calibration_tokens": tokens}
    found = prepare_corpus(source("<bos> $A"), **{**OPTIONS, **asked})
    assert found.calibration.shape == found.evaluation.shape == (1, 65)
    assert not torch.equal(found.calibration, found.evaluation)


@pytest.mark.parametrize(("template", "least"), [("$A", 65), ("<mask> <bos> $A", 63)])
def test_fewer_tokens_asked_for_than_a_row(source, text_file, template, least):
    made = source(template)
    asked = {**OPTIONS, "calibration_data": str(text_file)}
    with pytest.raises(
        ConversionError,
        match=f"`calibration_tokens` {least - 1} is less than a row .* 64 positions: at least "
        f"{least} tokens are needed; give a larger number",
    ):
        prepare_corpus(made, **{**asked, "calibration_tokens": least - 1})
    assert len(prepare_corpus(made, **{**asked, "calibration_tokens": least}).calibration) == 1


class TestLongText:
    """The beginning is read, and never the end."""

    def test_both_parts_come_from_what_is_read(self, source, text, tmp_path):
        (tmp_path / "long.txt").write_text(text * 22 + "\0")  # 2.2 million characters
        made = source("$A")
        found = prepare_corpus(made, **{**OPTIONS, "calibration_data": tmp_path / "long.txt"})
        read = (text * 22)[: 2 << 20]
        assert found.evaluation_source == (
            f"a held-out fifth of the first {2 << 20:,} characters of long.txt"
        )
        first, last = (tokenize(part, made.tokenizer, 25_000) for part in split_lines(read, 0.8))
        assert torch.equal(found.calibration[:, 0], first[: 46 * 64 : 64])
        assert torch.equal(found.evaluation[:, 0], last[: 390 * 64 : 64])

    def test_a_short_one_is_read_to_its_end(self, source, text_file):
        found = prepare_corpus(source("$A"), **{**OPTIONS, "calibration_data": str(text_file)})
        assert found.evaluation_source == f"a held-out fifth of {text_file.name}"

    def test_more_is_read_for_more_tokens(self):
        asked = (1, 100_000, 200_000)
        assert [corpus._characters(n, split=True) for n in asked] == [
            2_000_000,
            2_000_000,
            4_000_000,
        ]
        assert [corpus._characters(n, split=False) for n in asked] == [16, 1_600_000, 3_200_000]

    def test_text_to_judge_by(self, source, text, text_file, tmp_path):
        (tmp_path / "long.txt").write_text(text * 11 + "\0")  # 1.1 million characters
        asked = {"calibration_data": str(text_file), "eval_data": tmp_path / "long.txt"}
        found = prepare_corpus(source("$A"), **{**OPTIONS, **asked})
        assert found.evaluation_source == "long.txt"
        assert len(found.evaluation) == 25_000 // 64

    def test_data_set(self, source, text, monkeypatch):
        def rows():
            for _ in range(40):
                yield {"text": text}
            raise AssertionError("read on after four million characters")

        class Builder:
            class info:
                download_size = 2 << 30

        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: Builder)
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
        found = prepare_corpus(source("$A"), **{**OPTIONS, "calibration_data": "org/large"})
        assert len(found.calibration) == 46
        assert found.calibration_source == "org/large"


def test_of_a_folder_readers_elsewhere_see_the_last_part(source, text_file, monkeypatch):
    made = source("$A")
    monkeypatch.chdir(text_file.parent)
    found = prepare_corpus(made, **{**OPTIONS, "calibration_data": "."})
    assert found.calibration_source == text_file.parent.name
    asked = {"calibration_data": str(text_file), "calibration_tokens": 20}
    with pytest.raises(ConversionError, match=f"less than a row of {text_file}"):  # but the user
        prepare_corpus(made, **{**OPTIONS, **asked})


def test_how_many_tokens_where_nobody_says(source, text_file, monkeypatch):
    monkeypatch.setattr(corpus, "CALIBRATION_TOKENS", 2_000)
    monkeypatch.setattr(corpus, "SELF_TOKENS", 1_000)
    made = source("$A")
    asked = {**OPTIONS, "calibration_tokens": None}
    found = prepare_corpus(made, **{**asked, "calibration_data": str(text_file)})
    assert len(found.calibration) == 2_000 // 64
    found = prepare_corpus(made, **{**asked, "calibration_data": "self"})
    assert len(found.calibration) + len(found.evaluation) == -(-1_000 // 64)
    made.tokenizer = None
    found = prepare_corpus(made, **asked)
    assert len(found.calibration) + len(found.evaluation) == -(-1_000 // 64)
    assert found.notes == ["there is no tokenizer, so the model wrote its own calibration text"]


class TestDefaultText:
    """Where the hub is, nobody listens."""

    @pytest.fixture(autouse=True)
    def _no_hub(self, monkeypatch, tmp_path):
        hub = huggingface_hub.constants
        for module, name in ((hub, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(module, name, "http://127.0.0.1:1")
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def test_is_soon_given_up(self, source, caplog):
        start = time.perf_counter()
        notes = []
        assert corpus._calibration_text(source("$A"), None, 1_000, notes) is None
        assert time.perf_counter() - start < 10  # it is well below one; left alone, over twenty
        assert "WikiText-2 could not be had (the hub did not answer within 4 s), so" in notes[0]
        assert "writes its own calibration text" in caplog.text

    def test_offline_by_choice_is_not_blamed_on_the_hub(self, source, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        notes = []
        assert corpus._calibration_text(source("$A"), None, 1_000, notes) is None
        assert "WikiText-2 could not be had, so" in notes[0]

    def test_comes_from_the_cache(self, source, tmp_path):
        (tmp_path / "a.txt").write_text("one line\nanother\n")
        datasets.load_dataset(
            "text", data_files=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "made")
        )
        [arrow] = (tmp_path / "made").rglob("*.arrow")
        folder = tmp_path / "datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc"
        shutil.copytree(arrow.parent, folder)
        (folder / arrow.name).rename(folder / "wikitext-train.arrow")
        info = json.loads((folder / "dataset_info.json").read_text())
        info |= {"dataset_name": "wikitext", "config_name": "wikitext-2-raw-v1"}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        start = time.perf_counter()
        notes = []
        assert corpus._calibration_text(source("$A"), None, 1_000, notes) == "one line\nanother\n"
        assert time.perf_counter() - start < 10
        assert notes == []


def test_the_calibration_text_is_no_text_to_judge_by(source, text_file, tmp_path, monkeypatch):
    made = source("$A")
    (tmp_path / "link.txt").symlink_to(text_file)
    options = {**OPTIONS, "calibration_data": str(text_file)}
    with pytest.raises(ConversionError, match="link.txt' is the calibration text, by which no"):
        prepare_corpus(made, **{**options, "eval_data": tmp_path / "link.txt"})

    read = []

    def load(name, *, split="train", max_characters):
        read.append((name, split))
        return text_file.read_text()

    monkeypatch.setattr(corpus, "load_text", load)
    options = {**OPTIONS, "calibration_data": "some/text", "eval_data": "some/text"}
    prepare_corpus(made, **options)
    assert sorted(read) == [("some/text", "test"), ("some/text", "train")]
    named = "some/text:part:train"
    with pytest.raises(ConversionError, match="'some/text:part:train' is the calibration text"):
        prepare_corpus(made, **{**options, "calibration_data": named, "eval_data": named})
