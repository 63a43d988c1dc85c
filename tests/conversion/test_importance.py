import torch

from hf_vqlogits.conversion.importance import FLATTENING, PREDICTED_SHARE, token_importance


def problem(vocab=400, size=6, noise=0.0, seed=0):
    """Rows whose last coordinate says how frequent a token is, up to noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocab, size, generator=generator)
    logs = 2.0 + 1.5 * rows[:, -1] + noise * torch.randn(vocab, generator=generator)
    return rows, logs


def test_what_rows_predict_is_kept_and_flattened():
    rows, logs = problem()
    weights = token_importance(rows, logs.exp())
    expected = torch.softmax(FLATTENING * logs, 0)
    assert weights.sum().sub(1).abs() < 1e-5
    # The ridge takes a few per cent off the slope of the prediction.
    torch.testing.assert_close(weights.log(), expected.log(), rtol=0, atol=0.1)


def test_what_rows_do_not_predict_is_drawn_towards_the_prediction():
    rows, logs = problem(noise=0.5)
    noise = logs - (2.0 + 1.5 * rows[:, -1])
    left = token_importance(rows, logs.exp()).log() / FLATTENING - 1.5 * rows[:, -1]
    left = left - left.mean()
    slope = float((left @ noise) / (noise @ noise))
    assert abs(slope - (1 - PREDICTED_SHARE)) < 0.05


def test_tokens_never_seen_count_as_their_rows_say():
    rows, logs = problem()
    fisher = logs.exp()
    fisher[:40] = 0
    weights = token_importance(rows, fisher)
    assert (weights > 0).all()
    unseen = torch.stack([weights[:40].log(), rows[:40, -1]])
    assert torch.corrcoef(unseen)[0, 1] > 0.99
    assert weights[:40].max() < weights[40:].median()


def test_the_unit_of_the_rows_does_not_matter():
    rows, logs = problem(noise=0.5)
    torch.testing.assert_close(
        token_importance(1000 * rows, logs.exp()), token_importance(rows, logs.exp())
    )


def test_equal_rows_and_counts_give_equal_weights():
    weights = token_importance(torch.ones(8, 3), torch.zeros(8))
    torch.testing.assert_close(weights, torch.full((8,), 1 / 8))
