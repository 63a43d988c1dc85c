import pytest
import torch
from tiny import dense_weight
from torch.nn.functional import cross_entropy, pad
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion import loss_slope
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.loss_slope import LossSums
from hf_vqlogits.conversion.metric import token_metric

V, D, R = 80, 10, 24
AFTER = {"plain": {}, "scaled and capped": {"logit_scale": 0.7, "final_logit_softcapping": 4.0}}


@pytest.fixture(params=AFTER.values(), ids=AFTER.keys())
def after(request):
    return request.param


@pytest.fixture
def head(after):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=D, n_head=1)
    head = VQLogitsHead(
        VQLogitsConfig(text_config=config, num_codebooks=R, num_fine_tokens=12, **after)
    )
    with torch.no_grad():
        head.codebook.copy_(torch.randn(R, D) * 0.7 * R**-0.5 / head.score_scale)
        head.codebook_bias.copy_(torch.randn(R) * 0.2 * R**-0.5 / head.score_scale)
        head.hidden_mean.fill_(0.4)
    return head


def text(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.5 + torch.randn(count, D, generator=generator)
    return hidden, torch.randint(0, V, (count,), generator=generator)


def sums_of(head, hidden, labels, label_smoothing=0.0):
    sums = LossSums(head)
    for h, y in zip(hidden.split(70), labels.split(70), strict=True):
        sums.add(head, h, y, label_smoothing)
    return sums


def postprocess(logits, after):
    z = after.get("logit_scale", 1.0) * logits
    cap = after.get("final_logit_softcapping")
    return z if cap is None else cap * torch.tanh(z / cap)


def reference(head, metric, hidden, labels, after, label_smoothing):
    """Gradient by autograd, q, and the derivative of the logits, of all positions in float64."""
    weight, bias = dense_weight(head)
    mean, unwhiten = metric.mean.double(), metric.unwhiten.double()
    x = pad((hidden.double() - mean) @ unwhiten.T, (0, 1), value=1.0)
    whitened = weight @ torch.linalg.inv(unwhiten)
    vectors = torch.cat([whitened, (weight @ mean + bias)[:, None]], 1).requires_grad_()
    raw = x @ vectors.T
    z = postprocess(raw, after)
    cross_entropy(z, labels, reduction="sum", label_smoothing=label_smoothing).backward()
    inside = raw.detach().requires_grad_()
    (inner,) = torch.autograd.grad(postprocess(inside, after).sum(), inside)
    return vectors.grad, torch.softmax(z.detach(), -1), inner


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_slope_is_that_of_autograd_in_float64(head, after, label_smoothing, monkeypatch):
    monkeypatch.setattr(loss_slope, "CHUNK_BYTES", 4 * V * 32)
    hidden, labels = text(2000)
    labels[:1200] %= 7  # some tokens have a gradient that is no noise
    sums = sums_of(head, hidden, labels, label_smoothing)
    metric = sums.metric(head)
    slope = sums.slope(metric)
    gradient, q, inner = reference(head, metric, hidden, labels, after, label_smoothing)

    target = torch.nn.functional.one_hot(labels, V) * (1 - label_smoothing) + label_smoothing / V
    spread = ((q - target).square() * inner.square()).sum(0)
    curvature = (q * (1 - q) * inner.square()).sum(0)
    torch.testing.assert_close(
        slope.curvature.double(), torch.maximum(spread, curvature), atol=1e-3, rtol=1e-3
    )
    context = metric.context.double()
    shape = torch.eye(D + 1) + context[:, :, None] * context[:, None]
    length = (gradient * torch.linalg.solve(shape, gradient)).sum(1)
    share = (1 - (D + 1) * torch.maximum(spread, curvature) / length).clamp_min(0)
    assert (share > 0.5).any()
    assert (share == 0).any()
    wanted = share[:, None] * gradient
    torch.testing.assert_close(slope.gradient.double(), wanted, atol=1e-2, rtol=2e-3)


def test_metric_is_that_of_a_calibration(head, after):
    hidden, labels = text(500)
    metric = sums_of(head, hidden, labels).metric(head)
    weight, bias = head.to_linear()
    accumulator = StatisticsAccumulator(weight, bias=bias, **after, dtype=torch.float32)
    accumulator.update(hidden)
    wanted = token_metric(weight, accumulator.finish(), bias=bias)
    torch.testing.assert_close(metric.mean, wanted.mean, atol=1e-5, rtol=1e-5)
    # The axes that whiten are defined but for their signs.
    for one, other in ((metric.unwhiten, wanted.unwhiten), (metric.context, wanted.context)):
        torch.testing.assert_close(one.abs(), other.abs(), atol=1e-4, rtol=1e-3)
    x = pad((hidden - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    torch.testing.assert_close(x @ metric.rows.T, hidden @ weight.T + bias, atol=1e-4, rtol=1e-4)


def test_a_gradient_that_is_noise_moves_nothing(head, after):
    """Labels drawn from the head's own distribution tell nothing that it does not know."""
    hidden, _ = text(3000)
    with torch.no_grad():
        q = torch.softmax(head(hidden), -1)
    labels = torch.multinomial(q, 1, generator=torch.Generator().manual_seed(3)).squeeze(1)

    def share(labels):
        sums = sums_of(head, hidden, labels)
        metric = sums.metric(head)
        gradient, _, _ = reference(head, metric, hidden, labels, after, 0.0)
        return float(sums.slope(metric).gradient.norm() / gradient.norm())

    assert share(labels) < 0.35
    assert share((labels + 1) % V) > 0.8


def test_a_token_thought_impossible_is_not_overshot(head, after):
    hidden, labels = text(200)
    with torch.no_grad():
        token = int(torch.softmax(head(hidden), -1).sum(0).argmin())
    labels[labels == token] = (token + 1) % V
    labels[:5] = token
    sums = sums_of(head, hidden, labels)
    metric = sums.metric(head)
    _, q, inner = reference(head, metric, hidden, labels, after, 0.0)
    spread = float((((1 - q[:5, token]) * inner[:5, token]) ** 2).sum())
    assert float(sums.slope(metric).curvature[token]) >= 0.999 * spread


def test_what_is_not_finite_is_told(head):
    hidden, labels = text(20)
    assert sums_of(head, hidden, labels).finite
    with torch.no_grad():
        head.codebook[0, 0] = torch.nan
    sums = sums_of(head, hidden, labels)
    assert not sums.finite
    assert sums.positions == 20
