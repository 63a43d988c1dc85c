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


def test_without_a_tokenizer_rows_begin_with_a_random_token(source):
    made = source("<bos> $A")
    made.tokenizer = None
    found = prepare_corpus(made, **OPTIONS)
    assert len(found.calibration[:, 0].unique()) > 20
    assert found.unscored == 0
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
        assert corpus._calibration_text(source("$A"), None, notes) is None
        assert time.perf_counter() - start < 10  # it is well below one; left alone, over twenty
        assert "WikiText-2 could not be had" in notes[0]
        assert "writes its own calibration text" in caplog.text

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
        assert corpus._calibration_text(source("$A"), None, notes) == "one line\nanother\n"
        assert time.perf_counter() - start < 10
        assert notes == []
