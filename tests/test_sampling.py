from types import SimpleNamespace

import pytest
import torch

from hf_vqlogits import VQLogitsHead, sampling

D, V, DRAWS = 6, 40, 40_000


@pytest.fixture
def head() -> VQLogitsHead:
    torch.manual_seed(0)
    fields = {"code_type": "sign", "num_codebooks": 19, "codebook_size": 2, "num_fine_tokens": 4}
    after = {"logit_scale": 2.0, "final_logit_softcapping": 3.0, "nested_codebooks": []}
    head = VQLogitsHead(SimpleNamespace(vocab_size=V, hidden_size=D, **fields, **after))
    torch.nn.init.normal_(head.codebook, std=4.0)
    torch.nn.init.normal_(head.codebook_bias, std=4.0)
    return head


def shares(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten().bincount(minlength=V) / tokens.numel()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, V])
def test_tokens_are_drawn_as_often_as_softmax_says(head, temperature, top_k):
    row = torch.randn(D, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    drawn = head.sample(
        row.expand(DRAWS, D), temperature=temperature, top_k=top_k, generator=generator
    )
    logits = head(row).detach() / temperature
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    chances = logits.softmax(-1)
    # Five standard deviations of a share.
    bound = 5 * (chances * (1 - chances) / DRAWS).sqrt() + 1e-6
    assert ((shares(drawn) - chances).abs() <= bound).all()


def test_each_position_has_a_distribution_of_its_own_whatever_the_chunks(head, monkeypatch):
    hidden = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(3))
    likely = head.argmax(hidden)
    assert len(likely.unique()) > 3
    for at_once in (1, 4, 100):
        monkeypatch.setattr(sampling, "CHUNK_BYTES", 4 * V * at_once)
        cold = head.sample(hidden, temperature=1e-6, generator=torch.Generator().manual_seed(4))
        assert cold.shape == (3, 7)
        torch.testing.assert_close(cold, likely)


def test_the_generator_decides(head):
    hidden = torch.randn(20, D, generator=torch.Generator().manual_seed(5))

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return head.sample(hidden, temperature=5.0, generator=generator).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def test_no_position_gives_no_token(head):
    assert head.sample(torch.zeros(0, 3, D)).shape == (0, 3)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(head, temperature):
    with pytest.raises(ValueError, match=r"`temperature` must be positive.*`argmax`"):
        head.sample(torch.zeros(1, D), temperature=temperature)


@pytest.mark.parametrize("top_k", [0, V + 1])
def test_more_tokens_than_there_are_cannot_be_drawn_from(head, top_k):
    with pytest.raises(ValueError, match=f"must be in 1..{V}, the vocabulary, got {top_k}"):
        head.sample(torch.zeros(1, D), top_k=top_k)


def test_another_width_is_refused(head):
    with pytest.raises(ValueError, match=f"must end in the hidden size {D}"):
        head.sample(torch.zeros(1, D + 1))
