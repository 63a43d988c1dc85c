import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, dense_weight
from transformers import AutoModelForCausalLM

from hf_vqlogits.resizing import resized_codes, resized_vocabulary

HEADS = {
    "sign": {"num_codebooks": 40},
    "second codes": {"num_codebooks": 40, "num_fine_tokens": VOCABULARY},
    "nested": {"num_codebooks": 40, "num_fine_tokens": 9, "nested_codebooks": [20, 30]},
    "index": {"code_type": "index", "num_codebooks": 4, "codebook_size": 7},
}
ONE_CODEBOOK = {"code_type": "index", "num_codebooks": 1, "codebook_size": 20}


def assert_consistent(model, size):
    assert model.config.vocab_size == model.config.text_config.vocab_size == size
    assert model.model.backbone.config.vocab_size == model.vocab_size == size
    assert model.get_input_embeddings().weight.shape[0] == size
    assert model.get_input_embeddings().num_embeddings == size
    assert model.lm_head.out_features == model.lm_head.codes.shape[0] == size
    model.lm_head.check_codes()
    assert model.config.num_fine_tokens == model.lm_head.num_fine_tokens
    assert model(torch.tensor([[3, size - 1]])).logits.shape == (1, 2, size)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mamba"])
@pytest.mark.parametrize("head", [*HEADS.values(), ONE_CODEBOOK], ids=[*HEADS, "one codebook"])
@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 9])
def test_everything_is_resized_together(make_model, ids, tmp_path, family, head, size):
    model = make_model(family, **head)
    ids = ids % (VOCABULARY - 9)
    before = model(ids).logits.detach()
    embedding = model.resize_token_embeddings(size)
    assert embedding is model.get_input_embeddings()
    assert_consistent(model, size)
    kept = min(size, VOCABULARY)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_consistent(loaded, size)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert embedding.weight.grad is not None


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_new_tokens_stand_near_the_mean_with_codes_of_their_own(make_model, head):
    model = make_model("llama", **head)
    own = len(model.lm_head.codes.unique(dim=0))
    model.resize_token_embeddings(VOCABULARY + 40)
    assert len(model.lm_head.codes.unique(dim=0)) == own + 40
    rows = torch.cat([*(t.view(VOCABULARY + 40, -1) for t in dense_weight(model.lm_head))], 1)
    old, new = rows[:VOCABULARY], rows[VOCABULARY:]
    distance = (old - old.mean(0)).norm(dim=1), (new - old.mean(0)).norm(dim=1)
    assert distance[1].mean() < 0.9 * distance[0].mean()


def test_new_tokens_stand_near_the_mean_of_the_smaller_heads_inside(make_model):
    model = make_model("llama", **HEADS["nested"])
    model.resize_token_embeddings(VOCABULARY + 40)
    for bits in (40, 30, 20):
        model.keep_codebooks(bits)
        rows = torch.cat([*(t.view(VOCABULARY + 40, -1) for t in dense_weight(model.lm_head))], 1)
        old, new = rows[:VOCABULARY], rows[VOCABULARY:]
        distance = [(part - old.mean(0)).norm(dim=1).mean() for part in (old, new)]
        assert distance[1] < 0.9 * distance[0]


def test_second_codes_count_in_the_mean(make_model):
    """The rows of the vocabulary lie elsewhere with them than without."""
    model = make_model("llama", num_codebooks=40, num_fine_tokens=VOCABULARY)
    model.lm_head.fine_codes.fill_(255)
    model.resize_token_embeddings(VOCABULARY + 40)

    def rows():
        return torch.cat([*(t.view(VOCABULARY + 40, -1) for t in dense_weight(model.lm_head))], 1)

    new, with_second = rows()[VOCABULARY:], rows()[:VOCABULARY].mean(0)
    model.lm_head.fine_codes.copy_(~model.lm_head.fine_codes)  # the opposite signs
    opposite = rows()[:VOCABULARY].mean(0)
    distance = [(new - mean).norm(dim=1).mean() for mean in (with_second, opposite)]
    assert distance[0] < 0.8 * distance[1]


def test_codes_are_own_ones_where_there_is_little_room(make_model):
    # 9 bits: 512 codes, of which 61 are taken, and few local minima of the distance to the mean.
    model = make_model("llama", num_codebooks=9)
    codes = resized_codes(model.lm_head, 161)
    assert len(codes.unique(dim=0)) == len(model.lm_head.codes.unique(dim=0)) + 100


def test_without_room_codes_are_shared(make_model):
    model = make_model("llama", num_codebooks=3)
    codes = resized_codes(model.lm_head, 100)
    assert len(codes) == 100
    assert int(codes.max()) < 8


def test_tokens_of_one_codebook_share_codewords_near_the_mean(make_model):
    model = make_model("llama", **ONE_CODEBOOK)
    codes = resized_codes(model.lm_head, VOCABULARY + 3)
    assert len(codes[VOCABULARY:].unique()) == 1


def test_the_same_call_gives_the_same_codes(make_model):
    head = make_model("llama").lm_head
    state = torch.get_rng_state()
    assert torch.equal(resized_codes(head, 90), resized_codes(head, 90))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(resized_codes(head, 90)[:VOCABULARY], head.codes)


def test_padding_to_a_multiple(make_model):
    model = make_model("gpt2")
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert_consistent(model, 64)
    model.resize_token_embeddings(65, pad_to_multiple_of=16)
    assert_consistent(model, 80)


def test_the_same_size_changes_nothing(make_model):
    model = make_model("gpt2")
    embedding, codes = model.get_input_embeddings(), model.lm_head.codes
    assert model.resize_token_embeddings() is embedding
    assert model.resize_token_embeddings(VOCABULARY) is embedding
    assert model.lm_head.codes is codes


REFUSED = [
    ({"new_num_tokens": 0}, ValueError, "`new_num_tokens` must be at least 1, got 0"),
    ({"new_num_tokens": -1}, ValueError, "`new_num_tokens` must be at least 1, got -1"),
    ({"new_num_tokens": 70.5}, TypeError, "`new_num_tokens` must be an integer, got 70.5"),
    ({"new_num_tokens": True}, TypeError, "`new_num_tokens` must be an integer, got True"),
    ({"new_num_tokens": "70"}, TypeError, "`new_num_tokens` must be an integer, got '70'"),
    ({"pad_to_multiple_of": 0}, ValueError, "`pad_to_multiple_of` must be at least 1, got 0"),
    (
        {"new_num_tokens": 70, "pad_to_multiple_of": 1.5},
        TypeError,
        "`pad_to_multiple_of` must be an integer, got 1.5",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_a_refused_resize_changes_nothing(make_model, ids, arguments, error, message):
    model = make_model("llama")
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(error, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.config.to_dict() == config
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert_consistent(model, VOCABULARY)


def test_fewer_tokens_than_codewords_are_refused(make_model):
    model = make_model("llama", **ONE_CODEBOOK)
    with pytest.raises(ValueError, match=r"of 19 is smaller than `codebook_size` \(20\)"):
        model.resize_token_embeddings(19)
    assert_consistent(model, VOCABULARY)
    model.resize_token_embeddings(20)
    assert_consistent(model, 20)


@settings(max_examples=50, deadline=None)
@given(
    current=st.integers(1, 10**6),
    new=st.none() | st.integers(1, 10**6),
    multiple=st.none() | st.integers(1, 512),
)
def test_sizes(current, new, multiple):
    size = resized_vocabulary(current, new, multiple)
    asked = current if new is None else new
    assert size >= asked
    assert size - asked < (multiple or 1)
    assert size % (multiple or 1) == 0
