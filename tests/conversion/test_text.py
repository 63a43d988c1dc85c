import copy
import gzip
import logging
import string
import tracemalloc
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
)

from hf_vqlogits.conversion import text
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.text import (
    blocks,
    builtin_english_text,
    load_text,
    prefix_ids,
    sample_token_ids,
    split_lines,
    stream_text,
    tokenize,
)

PROSE = (
    "The quick brown fox, aged 7, jumps.\n\n  Over the lazy dog's back!\nAnd so on; \t and on.\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with GPT-2's way of splitting words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([PROSE * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=80,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=3,
        eos_token_id=3,
    )
    return GPT2LMHeadModel(config).eval()


class TestReading:
    def test_file_with_byte_order_mark(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + PROSE.encode())
        assert load_text(str(tmp_path / "a.txt")) == PROSE

    def test_folder_in_order_of_names_with_gz_and_subfolders(self, tmp_path):
        (tmp_path / "b.txt").write_text("second\n")
        with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
            file.write("first\n")
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "d.txt").write_text("third\n")
        (tmp_path / "a.json").write_text("not text")
        assert load_text(str(tmp_path)) == "first\nsecond\nthird\n"

    def test_stops_reading_when_there_is_enough(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / "b.txt").write_bytes(b"\0 never reached")
        assert load_text(str(tmp_path), max_characters=3) == "one"

    def test_stream_gives_large_files_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text, "READ_CHARACTERS", 10)
        (tmp_path / "a.txt").write_text(PROSE)
        pieces = list(stream_text(str(tmp_path / "a.txt")))
        assert len(pieces) > 5
        assert "".join(pieces) == PROSE

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no text"),
            (b" \n\n", "no text"),
            (b"MZ\0\0abc", "binary"),
            (b"caf\xe9 \xff\n", "not UTF-8"),
            ("text".encode("utf-16"), "not UTF-8|binary"),
        ],
    )
    def test_unusable_file(self, tmp_path, content, message):
        path = tmp_path / "a.txt"
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=message) as caught:
            load_text(str(path))
        assert "a.txt" in str(caught.value)

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-12], lambda b: b"PK" + b[2:], lambda b: b[:15]]
    )
    def test_damaged_gz(self, tmp_path, damage):
        path = tmp_path / "a.gz"
        path.write_bytes(damage(gzip.compress(PROSE.encode() * 9)))
        with pytest.raises(ConversionError, match=r"a\.gz' cannot be read"):
            load_text(str(path))

    def test_unreadable_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        path.write_text(PROSE)

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(ConversionError, match=r"cannot be read.*Permission denied"):
            load_text(str(path))

    def test_folder_without_text(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"x")
        with pytest.raises(ConversionError, match=r"no \.txt or \.gz files"):
            load_text(str(tmp_path))

    @pytest.mark.parametrize("source", ["missing.txt", "./missing", "a/b/c", "x.gz", "a:b:c:d", ""])
    def test_missing_file_is_not_looked_for_as_data_set(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConversionError, match="no file or folder"):
            load_text(source)


class TestDatasets:
    @pytest.fixture
    def serve(self, monkeypatch):
        """Stand in for the hub: answers with the rows given and records what was asked."""
        asked = {}

        def provide(rows, size=100):
            class Builder:
                class info:
                    download_size = size

            def load(path, name, **options):
                asked.update(options, path=path, name=name)
                return rows

            monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name: Builder)
            monkeypatch.setattr("datasets.load_dataset", load)
            return asked

        return provide

    @pytest.mark.parametrize(
        ("source", "path", "name", "split"),
        [
            ("org/set", "org/set", None, "train"),
            ("org/set:part", "org/set", "part", "train"),
            ("org/set:part:test", "org/set", "part", "test"),
            ("org/set::test", "org/set", None, "test"),
            ("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
            ("wikitext:wikitext-103-v1", "Salesforce/wikitext", "wikitext-103-v1", "train"),
            (text.WIKITEXT, "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ],
    )
    def test_what_a_source_asks_for(self, serve, source, path, name, split):
        asked = serve([{"text": "a"}])
        assert load_text(source) == "a\n"
        assert asked == {"path": path, "name": name, "split": split, "streaming": False}

    def test_rows_become_lines(self, serve):
        serve([{"text": "one\n"}, {"text": ""}, {"text": "two"}, {"text": None}])
        assert load_text("org/set") == "one\n\ntwo\n\n"

    def test_only_string_column_is_the_text(self, serve):
        features = Features({"id": Value("int64"), "content": Value("string")})
        serve(Dataset.from_list([{"id": 1, "content": "words"}], features=features))
        assert load_text("org/set") == "words\n"

    def test_text_column_wins(self, serve):
        serve([{"title": "no", "text": None}, {"title": "no", "text": "yes"}])
        assert load_text("org/set") == "\nyes\n"

    def test_unclear_column(self, serve):
        serve([{"question": "q", "answer": "a"}])
        with pytest.raises(ConversionError, match=r"no column `text`.*question, answer"):
            load_text("org/set")

    def test_empty_data_set(self, serve):
        serve([])
        with pytest.raises(ConversionError, match="no text"):
            load_text("org/set")

    def test_large_data_set_is_streamed(self, serve):
        asked = serve([{"text": "a"}], size=2 << 30)
        load_text("org/set")
        assert asked["streaming"]

    def test_offline(self, monkeypatch, tmp_path):
        # Through the library itself, which knows before it tries that it may not connect.
        import datasets.config
        import huggingface_hub.constants

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConversionError, match=r"cannot be had: .*Offline.*give a text file"):
            load_text("surely-not/on-any-machine")


class TestTokenize:
    def test_equals_the_whole_at_once(self, tokenizer, monkeypatch, caplog):
        monkeypatch.setattr(text, "PIECE_CHARACTERS", 60)
        long = PROSE * 20
        pieces = list(text._pieces([long]))
        assert len(pieces) > 30
        with caplog.at_level(logging.WARNING):
            ids = tokenize(long, tokenizer)
        assert not caplog.records  # "sequence length is longer than the specified maximum"
        assert ids.dtype == torch.int64
        assert ids.tolist() == tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]

    @given(
        st.lists(st.text(alphabet=string.ascii_letters + " \n\t.,'0é中", max_size=90), max_size=6),
    )
    def test_pieces_join_to_the_text(self, texts):
        before, text.PIECE_CHARACTERS = text.PIECE_CHARACTERS, 32
        try:
            pieces = list(text._pieces(texts))
        finally:
            text.PIECE_CHARACTERS = before
        assert "".join(pieces) == "".join(texts)
        assert all(0 < len(piece) <= 32 for piece in pieces)

    def test_text_without_words_is_cut_at_lines(self, monkeypatch):
        monkeypatch.setattr(text, "PIECE_CHARACTERS", 10)
        assert list(text._pieces(["中中中\n中中中\n中中中\n"])) == ["中中中\n中中中\n", "中中中\n"]

    def test_reads_no_more_than_needed(self, tokenizer, monkeypatch):
        monkeypatch.setattr(text, "PIECE_CHARACTERS", 40)

        def endless():
            while True:
                yield PROSE

        ids = tokenize(endless(), tokenizer, 100)
        assert ids.shape == (100,)
        assert torch.equal(ids, tokenize(PROSE * 10, tokenizer)[:100])

    def test_nothing(self, tokenizer):
        assert tokenize("", tokenizer).shape == (0,)

    def test_real_tokenizer(self, monkeypatch):
        folder = Path(__file__).parents[2].parent / "shared" / "models" / "gpt2-novels"
        if not folder.exists():
            pytest.skip(f"needs {folder}")
        gpt2 = PreTrainedTokenizerFast.from_pretrained(folder)
        english = builtin_english_text()[:100_000]
        monkeypatch.setattr(text, "PIECE_CHARACTERS", 1000)
        whole = gpt2(english, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenize(english, gpt2).tolist() == whole


class TestPrefix:
    @pytest.mark.parametrize(
        ("template", "prefix"),
        [
            (None, []),
            ("<bos> $A", ["<bos>"]),
            ("<bos> $A <eos>", ["<bos>"]),
            ("$A <eos>", []),
            ("<mask> <bos> $A", ["<mask>", "<bos>"]),
        ],
    )
    def test_what_a_tokenizer_prepends(self, tokenizer, template, prefix):
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        inner.add_special_tokens(list(special.values()))
        ids = {token: inner.token_to_id(token) for token in special.values()}
        if template is not None:
            inner.post_processor = processors.TemplateProcessing(
                template, special_tokens=list(ids.items())
            )
        found = prefix_ids(PreTrainedTokenizerFast(tokenizer_object=inner, **special))
        assert found == [ids[token] for token in prefix]

    def test_by_class(self):
        """Of Transformers' own tokenizers: some prepend, some have a `<bos>` and do not."""
        words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<bos>": 4, "<eos>": 5, "x": 6}
        assert prefix_ids(GemmaTokenizer(vocab=words, merges=[], add_bos_token=True)) == [4]
        gpt2 = GPT2Tokenizer(vocab=words, merges=[], bos_token="<s>", eos_token="</s>")
        assert gpt2.bos_token_id == 1
        assert prefix_ids(gpt2) == []


class TestCutting:
    def test_blocks(self):
        ids = torch.arange(24)
        rows = blocks(ids, 5)
        assert rows.tolist() == [list(range(i, i + 6)) for i in (0, 5, 10, 15)]
        assert blocks(torch.arange(26), 5).shape == (5, 6)

    def test_blocks_behind_a_prefix(self):
        ids = torch.arange(14)
        assert blocks(ids, 5, prefix=[99]).tolist() == [[99, 0, 1, 2, 3, 4], [99, 5, 6, 7, 8, 9]]
        assert blocks(ids, 5, prefix=[98, 99])[1].tolist() == [98, 99, 4, 5, 6, 7]

    @given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
    def test_every_token_is_a_label_once(self, tokens, context, length):
        prefix = list(range(-length, 0))
        try:
            rows = blocks(torch.arange(tokens), context, prefix=prefix)
        except ConversionError:
            assert tokens < context + 1 - length or context < length
            return
        assert rows.shape[1] == context + 1
        assert rows[:, :length].tolist() == [prefix] * len(rows)
        labels = rows[:, max(length, 1) :].flatten()
        first = 0 if prefix else 1
        assert labels.tolist() == list(range(first, first + len(labels)))
        assert tokens - first - len(labels) < rows.shape[1] - max(length, 1)  # dropped

    def test_too_few_tokens(self):
        assert blocks(torch.arange(6), 5).shape == (1, 6)
        with pytest.raises(ConversionError, match="The text has 5 tokens, but at least 6"):
            blocks(torch.arange(5), 5)
        assert blocks(torch.arange(5), 5, prefix=[1]).shape == (1, 6)
        with pytest.raises(
            ConversionError, match="novel has 4 tokens, but at least 5 .one context."
        ):
            blocks(torch.arange(4), 5, prefix=[1], name="novel")

    def test_no_room_behind_the_prefix(self):
        with pytest.raises(ConversionError, match="context of 2 tokens has no room.* the 3"):
            blocks(torch.arange(9), 2, prefix=[1, 2, 3])

    def test_split_lines(self):
        lines = [f"{i}\x0b\u2028\n" for i in range(10)]  # other line separators do not count
        first, rest = split_lines("".join(lines), 0.8)
        assert first == "".join(lines[:8])
        assert rest == "".join(lines[8:])

    @given(st.text(alphabet="ab\n", min_size=1, max_size=60), st.floats(0.01, 0.99))
    def test_split_lines_loses_nothing(self, whole, fraction):
        try:
            first, rest = split_lines(whole, fraction)
        except ConversionError:
            return
        assert first + rest == whole
        assert first.endswith("\n")
        assert rest

    def test_split_lines_holds_no_list_of_lines(self):
        whole = "a\n" * 500_000
        tracemalloc.start()
        try:
            split_lines(whole, 0.8)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1.5 * len(whole)

    def test_too_few_lines(self):
        with pytest.raises(ConversionError, match="1 lines cannot be split into 80%"):
            split_lines("one line", 0.8)

    def test_builtin_text(self):
        english = builtin_english_text()
        assert len(english) > 300_000
        assert "The Python" in english or "Python" in english
        assert "\0" not in english


class TestSampling:
    def test_shape_seed_and_settings(self, model):
        before = torch.random.get_rng_state()
        config = model.generation_config
        rows = sample_token_ids(model, tokens=100, context=16, batch_size=3)
        assert rows.shape == (7, 17)
        assert rows.dtype == torch.int64
        assert torch.equal(rows, sample_token_ids(model, tokens=100, context=16, batch_size=3))
        other = sample_token_ids(model, tokens=100, context=16, batch_size=3, seed=1)
        assert not torch.equal(rows, other)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert model.generation_config is config

    def test_rows_behind_a_prefix(self, model):
        """The prefix is read, and the random token after it is drawn as without."""
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data.mul_(9)  # far from uniform, so that what came before matters
        plain = sample_token_ids(model, tokens=100, context=16)
        rows = sample_token_ids(model, tokens=100, context=17, prefix=[5])
        assert rows.shape == (7, 18)
        assert (rows[:, 0] == 5).all()
        assert torch.equal(rows[:, 1], plain[:, 0])
        other = sample_token_ids(model, tokens=100, context=17, prefix=[6])
        assert torch.equal(rows[:, 1], other[:, 1])
        assert not torch.equal(rows[:, 2:], other[:, 2:])
        assert sample_token_ids(model, tokens=97, context=17, prefix=[6]).shape == (7, 18)
        assert sample_token_ids(model, tokens=96, context=17, prefix=[6]).shape == (6, 18)

    def test_no_room_to_write(self, model):
        with pytest.raises(ConversionError, match="context of 2 tokens has no room to write.* 2 "):
            sample_token_ids(model, tokens=9, context=2, prefix=[1, 2])

    def test_samples_from_the_whole_distribution_past_end_of_text(self, model):
        """Although the model's own settings, and defaults (top_k = 50), would narrow it."""
        model = copy.deepcopy(model)  # and made to give the same logits everywhere
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.normal_(generator=torch.Generator().manual_seed(0))
            model.lm_head.weight.mul_(10)
            logits = model(torch.tensor([[0]])).logits[0, -1]
        model.generation_config.update(top_p=0.3, temperature=0.5, repetition_penalty=2.0)
        rows = sample_token_ids(model, tokens=30_000, context=30, batch_size=1000)
        found = rows[:, 1:].flatten().bincount(minlength=80) / 30_000
        expected = logits.softmax(-1)
        assert expected.min() < 0.2 / 80  # some tokens are rare
        error = (expected / 30_000).sqrt()
        assert ((found - expected).abs() < 5 * error).all()
        assert (rows[:, 1:-1] == 3).any()  # the end-of-text token, like any other
