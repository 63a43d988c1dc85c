import math

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from hf_vqlogits.conversion import refining
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.families import take_apart
from hf_vqlogits.conversion.held_out import split
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.refining import deviations_for
from hf_vqlogits.conversion.sizes import HeadSize

# An output layer with a bias; scaled logits; soft-capped ones.
FAMILIES = ("llama", "gptj", "granite", "gemma2")


def fitted(family, *, bits=24, rows=60, top_k=8, agreement=0.9, fine=0, dtype=torch.float32):
    parts = take_apart(tiny_model(family).to(dtype))
    blocks = torch.randint(3, VOCAB, (rows, 17), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(blocks, blocks, "text", "text", [])
    quantiser = Quantiser(parts, corpus, seed=0, rereadings=0)
    statistics = quantiser.calibrate(keep_states=True)
    size = HeadSize("sign", bits, 2, num_fine_tokens=fine)
    head = quantiser.sign_heads([size], statistics)[size].to(dtype)
    refined = quantiser.refine(
        head, size, statistics, top_k=top_k, agreement=agreement, with_embedding=False
    )
    hidden = torch.cat(list(quantiser.states(torch.arange(rows))))
    return quantiser, head, statistics, refined, hidden


def exact_errors(parts, head, hidden):
    """Final logits of the head less those of the dense layer, before a soft-cap, float64."""
    hidden = hidden.double()
    weight, bias = (part.double() for part in head.to_linear())
    dense = hidden @ parts.weight.double().T + (0 if parts.bias is None else parts.bias.double())
    return head.logit_scale * (hidden @ weight.T + bias - dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_logits_are_told_up_to_what_all_have_in_common(family):
    quantiser, head, statistics, refined, hidden = fitted(family)
    errors, metric = refined.errors, refined.metric
    x = torch.nn.functional.pad((hidden - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    found = exact_errors(quantiser.parts, head, hidden)
    free = statistics.shift_invariant
    assert free == (family != "gemma2")
    # A constant apart: the metric takes the mean row out, and so does `common`.
    own = found - found.mean(1, keepdim=True)
    weight, bias = head.to_linear()
    e = metric.whitened_form(weight, bias) - metric.rows
    e *= head.logit_scale
    told = x.double() @ (e - errors.common).double().T
    torch.testing.assert_close(told - told.mean(1, keepdim=True), own, rtol=1e-2, atol=1e-3)
    if not free:
        torch.testing.assert_close(told, found, rtol=1e-2, atol=1e-3)
        assert not errors.common.any()
    assert (told.abs() <= errors.length * x.norm(dim=1, keepdim=True) * (1 + 1e-4)).all()
    square = (e - errors.common).square().sum(1)
    along = ((e - errors.common) * metric.context).sum(1).square()
    torch.testing.assert_close(errors.deviation, (square + along).sqrt(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("agreement", [0.8, 0.95, 1.0])
def test_the_choice_is_scored_again_as_often_as_asked(family, agreement):
    quantiser, head, _, refined, _ = fitted(family, agreement=agreement, top_k=VOCAB, rows=120)
    held, _ = split(quantiser.states.blocks, 1, quantiser.seed)
    hidden = torch.cat(list(quantiser.states(held)))
    with torch.no_grad():
        wanted = quantiser.parts.raw_logits(hidden).argmax(-1, keepdim=True)
        values, tokens = head.topk(hidden, VOCAB)
    scored = (refined.refinement.within(values, tokens) & (tokens == wanted)).any(-1)
    share = float(scored.float().mean())
    assert agreement <= share <= agreement + 2 / len(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_certified_positions_have_the_dense_layers_choice(family):
    quantiser, head, _, refined, hidden = fitted(family, bits=60, top_k=6, agreement=0.99)
    parts = quantiser.parts
    certified = 0
    with torch.no_grad():
        for row in hidden.split(1):
            score = refined.judge(parts, head, [row])
            if score.certified:
                certified += 1
                refined_logits = refined.logits(parts, head)(row)
                assert int(refined_logits.argmax()) == int(parts.logits(row).argmax())
    whole = refined.judge(parts, head, [hidden[:500], hidden[500:]])
    assert whole.certified == pytest.approx(certified / len(hidden))
    assert 0 < certified < len(hidden)
    assert 1 <= whole.scored <= 6


def test_no_more_positions_than_needed_are_judged(monkeypatch):
    quantiser, head, _, refined, hidden = fitted("llama")
    monkeypatch.setattr(refining, "CERTIFIED_ON", 300)
    monkeypatch.setattr(refining, "CHUNK_ROWS", 32)
    first = refined.judge(quantiser.parts, head, [hidden[:300]])

    def batches():
        yield hidden[:200]
        yield hidden[200:]
        raise AssertionError("read on")

    assert refined.judge(quantiser.parts, head, batches()) == first


def test_without_positions_there_is_nothing_to_judge():
    quantiser, head, _, refined, _ = fitted("llama")
    with pytest.raises(ValueError, match="no positions to judge the refinement on"):
        refined.judge(quantiser.parts, head, [])


def test_the_source_keeps_its_weight_and_nothing_is_copied():
    quantiser, _, _, refined, _ = fitted("gptj", dtype=torch.bfloat16)
    parts = quantiser.parts
    assert refined.refinement.weight.data_ptr() == parts.weight.data_ptr()
    assert not refined.refinement.weight.requires_grad
    torch.testing.assert_close(refined.refinement.bias, parts.bias.float())


def test_with_little_text_all_candidates_are_scored():
    _, _, _, refined, _ = fitted("llama", rows=4)
    assert refined.refinement.deviations is None


@pytest.mark.parametrize(
    ("agreement", "wanted"),
    [(0.2, 0.0), (0.4, 1.0), (0.41, 2.0), (0.8, 5.0), (0.81, None), (1, None)],
)
def test_deviations_are_a_quantile(agreement, wanted):
    distances = torch.tensor([2.0, math.inf, 0.0, 5.0, 1.0])
    assert deviations_for(distances, agreement) == wanted


def test_errors_shrink_with_bits():
    coarse, fine = (fitted("llama", bits=bits)[3].errors for bits in (8, 60))
    assert fine.deviation.mean() < 0.5 * coarse.deviation.mean()
