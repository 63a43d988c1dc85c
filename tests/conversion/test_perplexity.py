import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_vqlogits.conversion import evaluation
from hf_vqlogits.conversion.evaluation import TextScore, perplexity
from hf_vqlogits.conversion.perplexity import FOLDER
from hf_vqlogits.conversion.perplexity.perplexity import Perplexity

TEXTS = ["the cat sat on the mat the cat", "a mat\nsat on  a cat", "cat sat"]
WORDS = ["<unk>", "the", "a", "cat", "mat", "sat", "on"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=7, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from uniform, so that context and position matter
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def reference(model, ids, context, stride, prefix=()):
    """Each token on its own, from the tokens that its window has before it; float64."""
    prefix = torch.tensor([prefix], dtype=ids.dtype)
    double = GPT2LMHeadModel(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    length = min(context, len(ids) - 1)
    nats = 0.0
    for label in range(1, len(ids)):
        start = 0
        while start + length < label:
            start = min(start + stride, len(ids) - 1 - length)
        with torch.no_grad():
            logits = double(torch.cat([prefix, ids[None, start:label]], 1)).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[label]].item()
    return nats


class TestFunction:
    @pytest.mark.parametrize("tokens", [2, 8, 9, 10, 24, 33])
    @pytest.mark.parametrize(
        ("context", "stride"), [(8, None), (8, 8), (8, 3), (8, 1), (1, 1), (16, 5)]
    )
    def test_equals_reference(self, model, tokens, context, stride):
        ids = torch.randint(7, (tokens,), generator=torch.Generator().manual_seed(tokens))
        score = perplexity(model, ids, context=context, stride=stride, batch_size=3)
        nats = reference(model, ids, context, stride or context)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.tokens == tokens - 1
        assert score.nats_per_token == pytest.approx(nats / (tokens - 1), rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(nats / (tokens - 1)), rel=1e-5)

    @pytest.mark.parametrize("prefix", [[3], [6, 3]])
    @pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (8, 1), (16, 5)])
    def test_every_window_begins_with_the_prefix(self, model, prefix, context, stride):
        ids = torch.randint(7, (33,), generator=torch.Generator().manual_seed(4))
        room = context - len(prefix)
        score = perplexity(model, ids, context=context, stride=stride, prefix=prefix, batch_size=3)
        nats = reference(model, ids, room, stride or room, prefix)
        assert score.nats == pytest.approx(nats, rel=1e-5)
        assert score.tokens == 32
        without = reference(model, ids, room, stride or room)
        assert nats != pytest.approx(without, rel=1e-3)
        lengths = []
        hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        perplexity(model, ids, context=context, stride=stride, prefix=prefix)
        hook.remove()
        assert set(lengths) == {context}

    def test_no_room_beside_the_prefix(self, model):
        with pytest.raises(ValueError, match="less a prefix of 2.* got 8, 4 and 7"):
            perplexity(model, torch.arange(7), context=8, stride=7, prefix=[1, 2])
        with pytest.raises(ValueError, match="less a prefix of 2.* got 2, 4 and 0"):
            perplexity(model, torch.arange(7), context=2, prefix=[1, 2])

    def test_shorter_stride_is_like_transformers_guide(self, model):
        """The loop of the guide, which scores the same tokens when its windows fit the text."""
        ids = torch.randint(7, (29,), generator=torch.Generator().manual_seed(1))
        context, stride = 8, 4
        nats, end = 0.0, 0
        for begin in range(0, 28, stride):
            previous, end = end, min(begin + context, 28)
            window = ids[None, begin : end + 1]
            labels = window[:, 1:].clone()
            labels[:, : previous - begin] = -100
            with torch.no_grad():
                logits = model(window[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy
            nats += loss(logits[0], labels[0], reduction="sum").item() if end > previous else 0
        score = perplexity(model, ids, context=context, stride=stride)
        assert score.nats == pytest.approx(nats, rel=1e-5)

    def test_chunks_and_batches_change_nothing(self, model, monkeypatch):
        ids = torch.randint(7, (100,), generator=torch.Generator().manual_seed(2))
        whole = perplexity(model, ids, context=16, batch_size=100)
        monkeypatch.setattr(evaluation, "CHUNK_ROWS", 3)
        assert perplexity(model, ids, context=16, batch_size=1).nats == pytest.approx(whole.nats)

    def test_low_precision_logits_are_scored_in_float32(self, model):
        ids = torch.randint(7, (60,), generator=torch.Generator().manual_seed(3))
        low = GPT2LMHeadModel(model.config).eval()
        low.load_state_dict(model.state_dict())
        low.bfloat16()
        with torch.no_grad():
            logits = low(ids[None, :-1][:, :16]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits.double(), ids[1:17], reduction="sum")
        score = perplexity(low, ids[:17], context=16)
        assert score.nats == pytest.approx(expected.item(), rel=1e-5)

    def test_training_mode_is_left_alone_and_dropout_off(self, model):
        ids = torch.randint(7, (40,))
        expected = perplexity(model, ids, context=8).nats
        model.train()
        try:
            assert perplexity(model, ids, context=8).nats == expected
            assert model.training
        finally:
            model.eval()

    def test_progress_sees_every_batch(self, model):
        seen = []

        def progress(batches):
            for batch in batches:
                seen.append(len(batch))
                yield batch

        perplexity(model, torch.randint(7, (41,)), context=8, batch_size=2, progress=progress)
        assert seen == [2, 2, 1]

    def test_hopeless_model_has_infinite_perplexity(self):
        assert TextScore(nats=1e9, tokens=1000).perplexity == math.inf

    @pytest.mark.parametrize(
        ("context", "stride", "batch"), [(0, 1, 1), (8, 9, 1), (8, 0, 1), (8, -1, 1), (8, 8, 0)]
    )
    def test_impossible_windows(self, model, context, stride, batch):
        with pytest.raises(ValueError, match="`stride` between 1 and `context`"):
            perplexity(model, torch.arange(7), context=context, stride=stride, batch_size=batch)

    @pytest.mark.parametrize("ids", [torch.tensor([1]), torch.empty(0), torch.zeros(2, 3)])
    def test_impossible_ids(self, model, ids):
        with pytest.raises(ValueError, match="at least two tokens"):
            perplexity(model, ids.long(), context=4)


class TestMetric:
    @pytest.fixture
    def metric(self, tmp_path):
        return Perplexity(cache_dir=str(tmp_path))

    @pytest.mark.parametrize("options", [{}, {"stride": 2}, {"batch_size": 1}])
    def test_values(self, metric, model, tokenizer, options):
        result = metric.compute(
            predictions=TEXTS, model=model, tokenizer=tokenizer, context=4, **options
        )
        nats = 0.0
        for text in TEXTS:
            ids = torch.tensor([WORDS.index(word) for word in text.split()])
            nats += reference(model, ids, 4, options.get("stride", 4))
        assert result == {
            "perplexity": pytest.approx(math.exp(nats / 13), rel=1e-5),
            "word_perplexity": pytest.approx(math.exp(nats / 16), rel=1e-5),
            "nats_per_token": pytest.approx(nats / 13, rel=1e-5),
            "tokens": 13,
            "words": 16,
        }

    def test_tokens_that_the_tokenizer_prepends_begin_every_window(self, metric, model, tokenizer):
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        inner.post_processor = processors.TemplateProcessing("the $A", special_tokens=[("the", 1)])
        begins = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="the", eos_token="the"
        )
        result = metric.compute(predictions=TEXTS, model=model, tokenizer=begins, context=5)
        nats = 0.0
        for text in TEXTS:
            ids = torch.tensor([WORDS.index(word) for word in text.split()])
            nats += reference(model, ids, 4, 4, [1])
        assert result["tokens"] == 13
        assert result["nats_per_token"] == pytest.approx(nats / 13, rel=1e-5)

    def test_batches_may_be_added_first(self, metric, model, tokenizer):
        for text in TEXTS:
            metric.add_batch(predictions=[text])
        added = metric.compute(model=model, tokenizer=tokenizer)
        assert added == metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)

    def test_text_too_short(self, metric, model, tokenizer):
        with pytest.raises(ValueError, match=r"`predictions\[1\]` has 1 tokens"):
            metric.compute(predictions=["the cat", "cat"], model=model, tokenizer=tokenizer)

    def test_loads_offline_in_a_fresh_process(self, tmp_path, model, tokenizer):
        """From an empty folder with an empty cache and every connection refused."""
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "empty").mkdir()
        script = f"""
import json, socket
def refuse(*args, **kwargs):
    raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_vqlogits.conversion.perplexity import FOLDER, load_metric
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "model")!r})
results = []
for metric in (evaluate.load(str(FOLDER)), load_metric(keep_in_memory=True)):
    results.append(metric.compute(predictions={TEXTS!r}, model=model, tokenizer=tokenizer))
print(json.dumps(results))
"""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        first, second = json.loads(done.stdout.splitlines()[-1])
        assert first == second
        assert first["tokens"] == 13
        here = Perplexity(cache_dir=str(tmp_path)).compute(
            predictions=TEXTS, model=model, tokenizer=tokenizer
        )
        assert first["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)

    def test_folder_has_the_name_of_its_script(self):
        assert (FOLDER / f"{FOLDER.name}.py").is_file()  # what `evaluate.load` looks for
