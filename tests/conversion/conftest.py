"""A tiny GPT-2 with a tokenizer and a text, as folders and files on disk."""

import pydoc_data.topics

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_vqlogits.conversion import corpus

VOCAB = 400


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_distillation_by_default(monkeypatch):
    """Only tests that ask for a distillation wait for one."""
    monkeypatch.setattr("hf_vqlogits.conversion.options.DISTILL_STEPS", 0)
    monkeypatch.setattr("hf_vqlogits.conversion.options.INPUT_DISTILL_STEPS", 0)


@pytest.fixture(autouse=True)
def _little_text_to_compare_with(monkeypatch):
    """Writing goes token by token."""
    monkeypatch.setattr(corpus, "OWN_TOKENS", 60)
    monkeypatch.setattr(corpus, "OWN_CONTEXT", 8)


@pytest.fixture(scope="session")
def text():
    """Some 100 kB of English."""
    return "\n".join(sorted(pydoc_data.topics.topics.values()))[:100_000]


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(text, encoding="utf8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    )


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, text, tmp_path_factory):
    """A GPT-2 that learnt enough of the text to be sensitive to its output layer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = rows[torch.randint(len(rows), (16,))]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.generation_config.max_new_tokens = 7
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
