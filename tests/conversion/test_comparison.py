import math

import pytest
import torch

from hf_vqlogits.conversion.comparison import compare_heads


def test_scores_against_a_float64_reference():
    torch.manual_seed(0)
    hidden, labels = torch.randn(3000, 8), torch.randint(0, 20, (3000,))
    dense, other = torch.randn(20, 8), torch.randn(20, 8)
    batches = list(zip(hidden.split(1300), labels.split(1300), strict=True))
    scores = compare_heads(batches, lambda h: h @ dense.T, {"other": lambda h: h @ other.T})
    for name, weight in (("dense", dense), ("other", other)):
        logits = hidden.double() @ weight.double().T
        nats = torch.nn.functional.cross_entropy(logits, labels)
        assert scores[name].nats == pytest.approx(nats.item(), rel=1e-5)
        assert scores[name].perplexity == pytest.approx(math.exp(nats), rel=1e-4)
        assert scores[name].tokens == 3000
    same = (hidden @ dense.T).argmax(1) == (hidden @ other.T).argmax(1)
    assert scores["dense"].agreement == 1.0
    assert scores["other"].agreement == pytest.approx(same.float().mean().item())


def test_no_positions():
    with pytest.raises(ValueError, match="no positions"):
        compare_heads([], lambda h: h, {})
