import pytest
import torch
from sign_problems import problem

from hf_vqlogits.conversion.metric import token_metric


def test_whitened_rows_give_the_logits_up_to_a_constant():
    weight, bias, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics, bias=bias)
    hidden = torch.randn(7, 5)
    vectors, offsets = metric.product_form(metric.rows)
    difference = hidden @ vectors.T + offsets - (hidden @ weight.T + bias)
    spread = difference - difference.mean(1, keepdim=True)
    assert spread.abs().max() < 1e-4
    assert difference.abs().max() > 1e-2  # the mean row was taken out


def test_whitened_form_is_the_inverse_of_the_product_form():
    weight, bias, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics, bias=bias)
    codebook = torch.randn(9, 6)
    torch.testing.assert_close(
        metric.whitened_form(*metric.product_form(codebook)), codebook, rtol=1e-3, atol=1e-4
    )


def test_with_a_soft_cap_the_constant_stays():
    weight, bias, statistics = problem(vocab=40, size=5)
    statistics.shift_invariant = False
    metric = token_metric(weight, statistics, bias=bias)
    hidden = torch.randn(7, 5)
    vectors, offsets = metric.product_form(metric.rows)
    torch.testing.assert_close(
        hidden @ vectors.T + offsets, hidden @ weight.T + bias, rtol=1e-4, atol=1e-4
    )


def test_first_part_of_the_error_is_the_mean_square_of_the_logit():
    weight, bias, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics, bias=bias)
    metric.context.zero_()
    change = 0.1 * torch.randn(40, 6)
    covariance, mean = statistics.regularised_covariance().float(), statistics.mean.float()
    vectors, offsets = metric.product_form(change)
    square = ((vectors @ covariance) * vectors).sum(1) + (vectors @ mean + offsets).square()
    torch.testing.assert_close(metric.error(change), metric.weight * square, rtol=1e-4, atol=1e-7)


def test_what_errors_count_for_besides_the_logits():
    weight, bias, statistics = problem(vocab=40, size=5)
    root = torch.randn(5, 3, dtype=torch.float64)
    besides, change = root @ root.T, torch.randn(40, 5)
    logits = token_metric(weight, statistics, bias=bias)
    both = token_metric(weight, statistics, bias=bias, besides=besides)

    def error(metric):
        """Of a change of the output vectors, over the weights."""
        offsets = change @ metric.mean
        whitened = torch.linalg.solve(metric.unwhiten.T, change.T).T
        return metric.error(torch.cat([whitened, offsets[:, None]], 1)) / metric.weight

    trace = statistics.regularised_covariance().trace()
    expected = trace * ((change.double() @ besides) * change).sum(1)
    torch.testing.assert_close(
        (error(both) - error(logits)).double(), expected, rtol=1e-3, atol=1e-3
    )
    hidden = torch.randn(7, 5)
    vectors, offsets = both.product_form(both.rows)
    difference = hidden @ vectors.T + offsets - (hidden @ weight.T + bias)
    assert (difference - difference.mean(1, keepdim=True)).abs().max() < 1e-3


def test_second_part_is_the_logit_in_the_mean_context():
    weight, _, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics)
    change = 0.1 * torch.randn(40, 6)
    vectors, offsets = metric.product_form(change)
    logit = (vectors * statistics.context).sum(1) + offsets
    seen = statistics.fisher.float()
    expected = 0.4 * (seen + 1.5) / (seen + 4) * logit.square()
    along = metric.error(change) / metric.weight - change.square().sum(1)
    torch.testing.assert_close(along, expected, rtol=1e-3, atol=1e-4)


def test_pull_is_half_the_gradient_of_the_error():
    weight, bias, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics, bias=bias)
    change = torch.randn(10, 6, requires_grad=True)
    tile = slice(20, 30)
    (gradient,) = torch.autograd.grad(metric.error(change, tile).sum(), change)
    torch.testing.assert_close(metric.pull(change.detach(), tile), gradient / 2)


def test_unseen_tokens_keep_a_weight():
    weight, _, statistics = problem(vocab=40, size=5)
    statistics.fisher[3] = 0
    metric = token_metric(weight, statistics)
    assert 0 < metric.weight[3] < metric.weight.median()
    assert metric.weight.sum() == pytest.approx(1)


def test_wrong_input_is_refused_by_name():
    weight, bias, statistics = problem(vocab=40, size=5)
    with pytest.raises(ValueError, match=r"`weight` must be \(V, d\)"):
        token_metric(weight[0], statistics)
    with pytest.raises(ValueError, match="calibrate with the same weights"):
        token_metric(weight[:-1], statistics)
    with pytest.raises(ValueError, match=r"`bias` must be \(40,\)"):
        token_metric(weight, statistics, bias=bias[:-1])
    bias[7] = torch.inf
    with pytest.raises(ValueError, match=r"`bias` holds NaN or infinity in 1 of 40 rows \(7\)"):
        token_metric(weight, statistics, bias=bias)
    weight[2, 1] = torch.nan
    weight[30, 0] = -torch.inf
    with pytest.raises(ValueError, match=r"`weight` holds NaN or infinity in 2 of 40 rows \(2, 30"):
        token_metric(weight, statistics, bias=bias)


def test_stretch_is_the_matrix_of_the_error_and_shrink_undoes_it():
    weight, bias, statistics = problem(vocab=40, size=5)
    metric = token_metric(weight, statistics, bias=bias)
    change = torch.randn(40, 6, requires_grad=True)
    metric.error(change).sum().backward()
    every = slice(None)
    stretched = metric.stretch(change.detach(), every)
    torch.testing.assert_close(2 * metric.weight[:, None] * stretched, change.grad)
    torch.testing.assert_close(2 * metric.pull(change.detach(), every), change.grad)
    torch.testing.assert_close(metric.shrink(stretched, every), change.detach())
    first = slice(3, 9)
    torch.testing.assert_close(metric.stretch(change.detach()[first], first), stretched[first])
