import pytest
import torch

from benchmarks import losses

N, V, D, R = 6, 300, 16, 40


def test_all_losses_are_of_the_same_hidden_states_and_labels(monkeypatch):
    seen = []

    def keep(hidden, labels, vocab_size, *more):
        seen.append((hidden.detach().clone(), labels, vocab_size))
        return lambda: hidden.sum()

    for name in ("dense_step", "adaptive_step", "quantised_step"):
        monkeypatch.setattr(losses, name, keep)
    made = losses.steps(N, V, D, R, seed=3)
    for build in made.values():
        build()()
    ours, others = ["quantised", "quantised_bfloat16"], ["dense_float32", "dense_bfloat16"]
    assert list(made) == [*ours, *others, "adaptive softmax"]
    assert len(seen) == 5
    for hidden, labels, vocab_size in seen:
        assert torch.equal(hidden, seen[0][0])
        assert torch.equal(labels, seen[0][1])
        assert vocab_size == V
        assert hidden.shape == (N, D)


@pytest.mark.parametrize(
    "layer", ["quantised", "quantised_bfloat16", "dense_float32", "dense_bfloat16"]
)
def test_a_step_is_a_cross_entropy_with_gradients(layer, monkeypatch):
    taken = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: taken.append(grad(*a)) or taken[-1])
    loss = losses.steps(N, V, D, R, seed=0)[layer]()()
    # Small weights: each token is about as likely as the others.
    assert float(loss) == pytest.approx(torch.tensor(V).log().item(), abs=0.2)
    (gradients,) = taken
    assert all(g.isfinite().all() and g.any() for g in gradients)
    assert gradients[0].shape == (N, D)
    ours = layer.startswith("quantised")
    assert sum(g.numel() for g in gradients[1:]) == (R * D + R if ours else V * D)


def test_the_adaptive_softmax_learns_from_its_own_tiers():
    assert float(losses.steps(N, V, D, R, seed=0)["adaptive softmax"]()()) > 0
