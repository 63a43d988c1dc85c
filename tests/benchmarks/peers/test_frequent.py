import math

import pytest
import torch

from benchmarks.peers.frequent import Split, frequent_rows, log_share, splits


@pytest.fixture
def problem():
    torch.manual_seed(0)
    weight, hidden = torch.randn(20, 6), torch.randn(1300, 6)
    probability = (hidden @ weight.T).double().softmax(1)
    order = probability.mean(0).argsort(descending=True)
    return weight, hidden, probability, order


def test_splits_against_float64_sums(problem):
    weight, hidden, probability, order = problem
    kept = [order[:3], order[:9]]
    found = splits(hidden.split(700), weight, kept)
    logits = (hidden @ weight.T).double()
    for tokens, split in zip(kept, found, strict=True):
        torch.testing.assert_close(
            split.log_mass, logits[:, tokens].logsumexp(1), rtol=1e-5, atol=1e-5
        )
        assert split.others == pytest.approx(1 - float(probability[:, tokens].sum(1).mean()))


def test_the_constant_gives_the_others_their_probability():
    split = Split(torch.tensor([0.0, 3.0, -2.0], dtype=torch.float64), 0.1)
    mass = math.exp(log_share(split))
    assert float((mass / (mass + split.log_mass.exp())).mean()) == pytest.approx(0.1)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="not in"):
            log_share(Split(split.log_mass, share))


def test_kept_rows_and_bytes(problem):
    weight, hidden, probability, order = problem
    kept = order[:5]
    (split,) = splits([hidden], weight, [kept])
    made = frequent_rows(weight, probability.mean(0), kept, split)
    assert made.total_bytes == 2 * (5 * 6 + 15) + 3
    torch.testing.assert_close(made.weight[kept], weight[kept].bfloat16().float())
    assert made.bias is not None
    assert made.bias[kept].eq(0).all()
    assert made.weight[order[5:]].eq(0).all()


def test_no_other_constants_are_nearer_to_the_dense_layer(problem):
    weight, hidden, probability, order = problem
    kept = order[:5]
    (split,) = splits([hidden], weight, [kept])
    made = frequent_rows(weight, probability.mean(0), kept, split)
    assert made.bias is not None

    def divergence(bias: torch.Tensor) -> float:
        logits = (hidden @ made.weight.T + bias).double()
        return float(-(probability * logits.log_softmax(1)).sum(1).mean())

    least = divergence(made.bias)
    for token in order[5:].tolist():
        for change in (-0.1, 0.1):
            other = made.bias.clone()
            other[token] += change
            assert divergence(other) > least
