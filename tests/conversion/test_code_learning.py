import pytest
import torch
from sign_problems import fit_signs
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead, ops
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.code_learning import (
    FLIPS,
    Slope,
    levels_of,
    move_codes,
    slope_in_scores,
    slope_of_divergence,
    whitened_codebook,
)
from hf_vqlogits.conversion.distillation import held_out_kl
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.residual import reconstruct

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


def fitted(fine, after, size=1.0):
    """A fitted head, its metric, the dense layer of vectors so many times as long, and states."""
    weight = size * torch.randn(V, D, generator=torch.Generator().manual_seed(0))
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


@pytest.fixture
def setting(fine, after):
    return fitted(fine, after)


def test_slope_in_scores_is_the_gradient(setting, after, monkeypatch):
    monkeypatch.setattr("hf_vqlogits.conversion.code_learning.CHUNK_BYTES", 4 * V * 7)
    head, _, teacher, hidden = setting
    hidden = hidden[:31]
    scores = (0.3 * torch.randn(31, R)).requires_grad_()
    levels = levels_of(head)
    found = slope_in_scores(head, levels.float(), scores.detach(), teacher, hidden)
    logits = postprocess(scores.double() @ levels.double().T, after)
    wanted = teacher(hidden).double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), wanted, reduction="sum", log_target=True
    )
    (slope,) = torch.autograd.grad(kl, scores)
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5)


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
    torch.testing.assert_close(slope.gradient.double(), vectors.grad, atol=1e-3, rtol=1e-3)
    raw = (x.double() @ vectors.detach().T).requires_grad_()
    (inner,) = torch.autograd.grad(postprocess(raw, after).sum(), raw)
    q = log_q.detach().exp()
    curvature = (q * (1 - q) * inner.square()).sum(0)
    torch.testing.assert_close(slope.curvature.double(), curvature, atol=1e-3, rtol=1e-3)


def test_moving_codes_lowers_the_divergence_on_other_text(setting):
    head, metric, teacher, hidden = setting
    other = hidden_states(2000, 2)
    codebook = head.codebook.clone()
    head.codes[:, 0] ^= 4  # a bit of every token is wrong
    fine_codes = None if head.fine_codes is None else head.fine_codes.clone()
    if fine_codes is not None:
        head.fine_codes[:, 1] ^= 2
    before, codes = held_out_kl(head, [other], teacher), head.codes.clone()
    for _ in range(4):
        move_codes(head, metric, slope_of_divergence(head, metric, teacher, [hidden]), 2.0)
    flips = (ops.unpack_signs(codes, R) != ops.unpack_signs(head.codes, R)).sum(1)
    assert 0 < int(flips.max()) <= 4 * FLIPS
    assert held_out_kl(head, [other], teacher) < 0.8 * before
    if fine_codes is not None:
        wrong = fine_codes.clone()
        wrong[:, 1] ^= 2
        assert (head.fine_codes != wrong).any(1).double().mean() > 0.5
    assert torch.equal(head.codebook, codebook)
    head.check_codes()


def test_a_token_makes_few_flips_at_once(setting):
    head, metric, teacher, hidden = setting
    head.codes[:, :2] ^= 255
    codes = head.codes.clone()
    move_codes(head, metric, slope_of_divergence(head, metric, teacher, [hidden]), 1.0)
    flips = (ops.unpack_signs(codes, R) != ops.unpack_signs(head.codes, R)).sum(1)
    assert int(flips.max()) == FLIPS


def test_without_text_tokens_move_towards_their_dense_vectors(setting):
    head, metric, _, _ = setting
    head.codes[:, 0] ^= 4

    def error():
        vectors = levels_of(head).float() @ whitened_codebook(head, metric)
        return float(metric.error(metric.rows - vectors).sum())

    before = error()
    nothing = Slope(torch.zeros_like(metric.rows), torch.zeros_like(metric.weight))
    move_codes(head, metric, nothing, 1.0)
    assert error() < 0.8 * before


def test_frozen_bits_stay(setting):
    head, metric, teacher, hidden = setting
    head.codes[:, :] ^= 4  # a bit of each byte; those of the second and third may go back
    head.codes[:, 1] ^= 64
    before = {
        name: getattr(head, name).clone()
        for name in ("codes", "fine_codes")
        if head.fine_ids is not None or name == "codes"
    }
    slope = slope_of_divergence(head, metric, teacher, [hidden])
    move_codes(head, metric, slope, 2.0, 11)
    for name, codes in before.items():
        one, other = (ops.unpack_signs(t, R) for t in (codes, getattr(head, name)))
        assert torch.equal(one[:, :11], other[:, :11])
        assert not torch.equal(one[:, 11:], other[:, 11:])


def test_strong_damping_moves_nothing(setting):
    head, metric, teacher, hidden = setting
    codes = head.codes.clone()
    slope = slope_of_divergence(head, metric, teacher, [hidden])
    move_codes(head, metric, slope, 1e9)
    assert torch.equal(head.codes, codes)


def test_codes_move_alike_however_the_scale_is_divided(fine):
    """Long vectors with a small `logit_scale` are the same layer, Cohere's and Granite's way."""
    moved = []
    for scale in (1.0, 1 / 16):
        head, metric, dense, hidden = fitted(fine, {"logit_scale": scale}, size=1 / scale)
        before = ops.unpack_signs(head.codes, R)
        # Not the layer of the fit, towards which the prior pulls.
        slope = slope_of_divergence(head, metric, lambda h, of=dense: of(h).roll(1, -1), [hidden])
        move_codes(head, metric, slope, 1.0)
        moved.append(before != ops.unpack_signs(head.codes, R))
    assert moved[0].any()
    assert torch.equal(*(some.sum(1) > 0 for some in moved))
    assert (moved[0] == moved[1]).double().mean() > 0.99


def indexed(groups, size, seed=0):
    """A head of random index codes and its dense layer: sums of the codewords, by right codes."""
    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(vocab_size=V, n_embd=D, n_head=1)
    fields = {"code_type": "index", "num_codebooks": groups, "codebook_size": size}
    head = VQLogitsHead(VQLogitsConfig(text_config=config, **fields))
    with torch.no_grad():
        drawn = torch.randn(head.codebook.shape, generator=generator)
        head.codebook.copy_(drawn / head.score_scale)
        head.codes.copy_(torch.randint(0, size, head.codes.shape, generator=generator))
    weight, bias = head.to_linear()
    hidden = hidden_states(2000, 1)
    accumulator = StatisticsAccumulator(weight, bias=bias)
    accumulator.update(hidden)
    metric = token_metric(weight, accumulator.finish(), bias=bias)
    return head, metric, (lambda h: h @ weight.T + bias), hidden


@pytest.mark.parametrize(("groups", "size"), [(1, 12), (4, 5)])
def test_wrong_index_codes_are_put_right(groups, size):
    head, metric, teacher, hidden = indexed(groups, size)
    right = head.codes.clone()
    wrong = torch.arange(V) % 4 == 0
    head.codes[wrong, 0] = (head.codes[wrong, 0] + 1) % size
    before = held_out_kl(head, [hidden_states(500, 2)], teacher)
    for _ in range(3):
        move_codes(head, metric, slope_of_divergence(head, metric, teacher, [hidden]), 0.5)
    head.check_codes()
    assert held_out_kl(head, [hidden_states(500, 2)], teacher) < 0.1 * before
    assert (head.codes == right).all(1)[wrong].double().mean() > 0.8
    assert torch.equal(head.codes[~wrong], right[~wrong])


def test_slope_and_coordinates_of_index_codes(monkeypatch):
    head, metric, _, hidden = indexed(3, 5)
    weight, bias = head.to_linear()
    vectors = reconstruct(head.codes.long(), whitened_codebook(head, metric))
    x = torch.nn.functional.pad((hidden - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    torch.testing.assert_close(x @ vectors.T, hidden @ weight.T + bias, atol=1e-3, rtol=1e-3)
    teacher = torch.randn(V, D, generator=torch.Generator().manual_seed(3))
    some, rows = hidden[:50], x[:50]
    monkeypatch.setattr(
        "hf_vqlogits.conversion.code_learning.product_dtype", lambda device: torch.float32
    )
    slope = slope_of_divergence(head, metric, lambda h: h @ teacher.T, some.split(20))
    q = (some @ weight.T + bias).double().softmax(-1)
    p = (some @ teacher.T).double().softmax(-1)
    torch.testing.assert_close(
        slope.gradient.double(), (q - p).T @ rows.double(), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(slope.curvature.double(), (q * (1 - q)).sum(0), atol=1e-3, rtol=1e-3)


def test_what_all_rows_have_in_common_is_no_error_of_the_codes():
    """The metric's rows are without it; those of index codes that group whole vectors are not."""
    head, metric, teacher, hidden = indexed(1, 12)
    right = head.codes.clone()
    with torch.no_grad():
        head.codebook += 3.0 / head.score_scale
        head.codebook_bias += 5.0 / head.score_scale
    move_codes(head, metric, slope_of_divergence(head, metric, teacher, [hidden[:3]]), 0.5)
    assert torch.equal(head.codes, right)
