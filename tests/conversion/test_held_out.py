import pytest
import torch

from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.held_out import (
    check_length,
    keep_out,
    long_enough,
    rows_of_step,
    rows_to_fit,
    split,
)


def test_what_is_kept_out_is_never_trained_on():
    blocks = torch.zeros(400, 17)
    held, order = split(blocks, steps=20, seed=0)  # of 64 rows each
    assert len(held) == 80
    assert len(order) == 20 * 64
    kept, rest = set(held.tolist()), set(range(400)) - set(held.tolist())
    assert len(kept) == 80
    for epoch in range(4):  # every row once before any comes again
        assert set(order[320 * epoch :][:320].tolist()) == rest
    assert not torch.equal(order[:320], order[320:640])


def test_no_version_of_what_is_kept_out_is_trained_on():
    held, order = split(torch.zeros(1200, 17), steps=15, seed=0, versions=3)
    assert len(held) == 80
    assert held.max() < 400
    assert sorted(order.tolist()) == sorted(
        row + 400 * version for row in set(range(400)) - set(held.tolist()) for version in range(3)
    )


def test_no_steps_read_no_rows():
    held, order = split(torch.zeros(400, 17), steps=0, seed=0)
    assert (len(held), len(order)) == (80, 0)


@pytest.mark.parametrize(("width", "rows"), [(17, 64), (1025, 1), (5000, 1)])
def test_rows_of_a_step(width, rows):
    assert rows_of_step(torch.zeros(1, width)) == rows


def test_too_little_text():
    blocks = torch.zeros(79, 17)
    assert long_enough(blocks)
    check_length(blocks)
    assert not long_enough(blocks[:78])
    message = "needs at least 1,343 tokens .* there are 1,326; give more text or `some_steps` 0"
    with pytest.raises(ConversionError, match=message):
        check_length(blocks[:78], "some_steps")


def test_what_is_kept_out_is_in_no_other_text():
    blocks = torch.arange(120 * 17).view(120, 17)
    corpus = Corpus(blocks, blocks[:3], "text", "text", [])
    kept = keep_out(corpus, 0)
    assert kept.kept_out is not None
    assert 0 < len(kept.kept_out) <= 120 // 5
    both = torch.cat([kept.calibration, kept.kept_out])
    assert torch.equal(both[both[:, 0].argsort()], blocks)
    assert (kept.calibration[:, 0].diff() > 0).all()  # in the order of the text
    assert torch.equal(kept.evaluation, corpus.evaluation)
    assert corpus.kept_out is None
    assert not torch.equal(keep_out(corpus, 1).kept_out, kept.kept_out)


def test_what_is_fitted_is_what_is_trained_on():
    blocks = torch.zeros(400, 17)
    for seed in (0, 1):
        held, order = split(blocks, steps=20, seed=seed)
        rows = rows_to_fit(blocks, seed)
        assert torch.equal(rows, order.unique())
        assert not set(rows.tolist()) & set(held.tolist())
    assert rows_to_fit(blocks[:78], 0).tolist() == list(range(78))
