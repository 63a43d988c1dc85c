import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vqlogits.conversion import redrawing
from hf_vqlogits.conversion.redrawing import draw_tokens, redraw


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocab_size", [1, 5, 300, 1000])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocab_size):
    weights = torch.rand(vocab_size, generator=generator(1)) ** 4
    probabilities = weights / weights.sum()
    draws = 40_000
    drawn = draw_tokens(probabilities.expand(draws, -1).contiguous(), generator())
    counts = drawn.bincount(minlength=vocab_size).double()
    expected = draws * probabilities.double()
    # Pearson's statistic has mean V - 1 and variance about 2 (V - 1); rare tokens are pooled.
    common = expected > 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).clamp_min(1e-9)
    statistic = float(((observed - wanted) ** 2 / wanted)[wanted > 1].sum())
    freedom = max(1, int(common.sum()))
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(1, 700),
    alive=st.floats(0.001, 1.0),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 50.0]),
)
def test_only_tokens_with_some_probability_are_drawn(seed, vocab_size, alive, scale):
    source = generator(seed)
    weights = torch.rand(200, vocab_size, generator=source) * scale
    dead = torch.rand(200, vocab_size, generator=source) > alive
    dead[:, int(torch.randint(vocab_size, (1,), generator=source))] = False
    weights[dead] = 0
    weights[:, 0].clamp_min_(0)
    weights[weights.sum(1) == 0, -1] = scale
    drawn = draw_tokens(weights, source)
    assert (weights.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("place", [0.0, 1 - 2**-24, 1.0])
def test_the_ends_of_the_distribution_are_tokens_with_probability(monkeypatch, place):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, place))
    probabilities = torch.zeros(3, 600)
    probabilities[0, 7] = 1
    probabilities[1, [100, 101, 598]] = torch.tensor([0.3, 0.3, 0.4])
    probabilities[2, [0, 599]] = 0.5
    drawn = draw_tokens(probabilities, generator())
    assert drawn.tolist() == ([7, 100, 0] if place == 0 else [7, 598, 599])


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab_size", [257, 515])  # one token in the last block; two of three
def test_a_last_block_that_is_not_full(monkeypatch, place, vocab_size):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, place))
    probabilities = torch.zeros(2, vocab_size)
    probabilities[0, -1] = 1
    probabilities[1, [3, -1]] = 0.5
    drawn = draw_tokens(probabilities, generator())
    assert drawn.tolist() == [vocab_size - 1, 3 if place == 0 else vocab_size - 1]


def test_the_same_seed_draws_the_same():
    probabilities = torch.rand(50, 90, generator=generator(3)).softmax(-1)
    first, again = (draw_tokens(probabilities, generator(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_tokens(probabilities, generator(5)))


def test_a_share_of_the_tokens_is_replaced_and_never_the_first():
    blocks = torch.zeros(100, 101, dtype=torch.long)
    drawn = torch.arange(1, 101).expand(100, -1)
    result = redraw(blocks, drawn, generator(), share=0.3)
    assert torch.equal(result[:, 0], blocks[:, 0])
    replaced = result[:, 1:] != 0
    assert torch.equal(result[:, 1:][replaced], drawn[replaced])
    assert replaced.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert blocks.abs().sum() == 0


def test_shares_of_none_and_all():
    blocks, drawn = torch.zeros(4, 6, dtype=torch.long), torch.ones(4, 5, dtype=torch.long)
    assert torch.equal(redraw(blocks, drawn, generator(), share=0.0), blocks)
    assert (redraw(blocks, drawn, generator(), share=1.0)[:, 1:] == 1).all()
    assert 0 < redrawing.REDRAWN < 1
