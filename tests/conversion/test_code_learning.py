import pytest
import torch
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.code_learning import (
    levels_of,
    move_codes,
    slope_of_divergence,
    whitened_codebook,
)
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.signs import fit_signs

V, D, R = 80, 10, 24
AFTER = {"plain": {}, "scaled and capped": {"logit_scale": 0.7, "final_logit_softcapping": 4.0}}


def hidden_states(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.randn(count, D, generator=generator)


def postprocess(logits, after):
    z = after.get("logit_scale", 1.0) * logits
    cap = after.get("final_logit_softcapping")
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.fixture(params=[0, 12], ids=["one code", "second codes"])
def fine(request):
    return request.param


@pytest.fixture(params=AFTER.values(), ids=AFTER.keys())
def after(request):
    return request.param


@pytest.fixture
def setting(fine, after):
    """A fitted head, its metric, the dense layer, and hidden states."""
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    hidden = hidden_states(2000, 1)
    accumulator = StatisticsAccumulator(weight, **after)
    accumulator.update(hidden)
    statistics = accumulator.finish()
    fit = fit_signs(weight, statistics, num_codebooks=R, num_fine_tokens=fine)
    config = GPT2Config(vocab_size=V, n_embd=D, n_head=1)
    head = VQLogitsHead(
        VQLogitsConfig(text_config=config, num_codebooks=R, num_fine_tokens=fine, **after)
    )
    with torch.no_grad():
        head.codebook.copy_(fit.codebook / head.score_scale)
        head.codebook_bias.copy_(fit.codebook_bias / head.score_scale)
        head.codes.copy_(fit.codes)
        if fine:
            head.fine_ids.copy_(fit.fine_ids)
            head.fine_codes.copy_(fit.fine_codes)
    metric = token_metric(weight, statistics)
    return head, metric, (lambda h: postprocess(h @ weight.T, after)), hidden


def test_levels_and_whitened_codebook_make_the_heads_vectors(setting):
    head, metric, _, hidden = setting
    weight, bias = head.to_linear()
    vectors = levels_of(head).float() @ whitened_codebook(head, metric)
    x = torch.nn.functional.pad((hidden - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    torch.testing.assert_close(x @ vectors.T, hidden @ weight.T + bias, atol=1e-3, rtol=1e-3)


def test_gradient_is_that_of_autograd_in_float64(setting, after, monkeypatch):
    monkeypatch.setattr(
        "hf_vqlogits.conversion.code_learning.product_dtype", lambda device: torch.float32
    )
    head, metric, teacher, hidden = setting
    some = hidden[:50]
    slope = slope_of_divergence(head, metric, teacher, some.split(20))
    x = torch.nn.functional.pad((some - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    vectors = (levels_of(head).double() @ whitened_codebook(head, metric).double()).requires_grad_()
    log_p = torch.log_softmax(teacher(some).double(), -1)
    log_q = torch.log_softmax(postprocess(x.double() @ vectors.T, after), -1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    total.backward()
    assert slope.positions == 50
    assert slope.divergence == pytest.approx(float(total) / 50, rel=1e-3)
    torch.testing.assert_close(slope.gradient.double(), vectors.grad, atol=1e-3, rtol=1e-3)
    assert bool((slope.curvature >= 0).all())


def test_moving_codes_lowers_the_divergence_on_other_text(setting):
    head, metric, teacher, hidden = setting
    other = hidden_states(2000, 2)
    codebook = head.codebook.clone()
    head.codes[:, 0] ^= 4  # a bit of every token is wrong
    before = slope_of_divergence(head, metric, teacher, [other]).divergence
    flipped = 0.0
    for _ in range(4):
        slope = slope_of_divergence(head, metric, teacher, [hidden])
        flipped += move_codes(head, metric, slope, 2.0)
    after = slope_of_divergence(head, metric, teacher, [other]).divergence
    assert 0 < flipped < 4 * 5 / R  # at most five bits of a token and iteration
    assert after < 0.8 * before
    assert torch.equal(head.codebook, codebook)
    head.check_codes()


def test_strong_damping_moves_nothing(setting):
    head, metric, teacher, hidden = setting
    codes = head.codes.clone()
    slope = slope_of_divergence(head, metric, teacher, [hidden])
    assert move_codes(head, metric, slope, 1e9) == 0
    assert torch.equal(head.codes, codes)


def test_no_text(setting):
    head, metric, teacher, _ = setting
    with pytest.raises(ValueError, match="no hidden states to learn codes from"):
        slope_of_divergence(head, metric, teacher, [])
