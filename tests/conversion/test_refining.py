import math

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from hf_vqlogits.conversion import refining
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.families import take_apart
from hf_vqlogits.conversion.held_out import keep_out
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.refining import deviations_for
from hf_vqlogits.conversion.sizes import HeadSize

# An output layer with a bias; scaled logits; soft-capped ones.
FAMILIES = ("llama", "gptj", "granite", "gemma2")


def fitted(family, *, bits=24, rows=60, top_k=8, agreement=0.9, fine=0, dtype=torch.float32):
    parts = take_apart(tiny_model(family).to(dtype))
    blocks = torch.randint(3, VOCAB, (rows, 17), generator=torch.Generator().manual_seed(1))
    corpus = keep_out(Corpus(blocks, blocks, "text", "text", []), 0)
    quantiser = Quantiser(parts, corpus, seed=0, rereadings=0)
    statistics = quantiser.calibrate(to_distill=True)
    size = HeadSize("sign", bits, 2, num_fine_tokens=fine)
    head = quantiser.sign_heads([size], statistics)[size].to(dtype)
    refined = quantiser.refine(
        head, size, statistics, top_k=top_k, agreement=agreement, with_embedding=False
    )
    hidden = torch.cat(list(quantiser.states(torch.arange(len(corpus.calibration)))))
    return quantiser, head, statistics, refined, hidden


def exact_errors(parts, head, hidden):
    """Final logits of the head less those of the dense layer, before a soft-cap, float64."""
    hidden = hidden.double()
    weight, bias = (part.double() for part in head.to_linear())
    dense = hidden @ parts.weight.double().T + (0 if parts.bias is None else parts.bias.double())
    return head.logit_scale * (hidden @ weight.T + bias - dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_logits_are_told_but_for_what_all_have_in_common(family):
    quantiser, head, statistics, refined, hidden = fitted(family)
    parts, errors, metric = quantiser.parts, refined.errors, refined.metric
    found = exact_errors(parts, head, hidden)
    own = found - refined.refinement.offset(hidden).double()
    share = statistics.probability / statistics.probability.sum()
    if family == "gemma2":  # soft-capped: a constant is not free
        assert not refined.refinement.offset(hidden).any()
    else:
        assert (own @ share).abs().max() < 1e-3
        assert (found @ share).abs().max() > 0.01
    x = torch.nn.functional.pad((hidden - metric.mean) @ metric.unwhiten.T, (0, 1), value=1.0)
    assert (own.abs() <= errors.length * x.norm(dim=1, keepdim=True) * (1 + 1e-4)).all()
    weight, bias = head.to_linear()
    dense_bias = torch.zeros(VOCAB) if parts.bias is None else parts.bias
    e = head.logit_scale * metric.whitened_form(weight - parts.weight, bias - dense_bias)
    e -= errors.common
    torch.testing.assert_close(x.double() @ e.double().T, own, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(errors.length, e.norm(dim=1), rtol=1e-3, atol=1e-6)
    # That is the deviation of the error over the text, the share of a noise floor apart.
    torch.testing.assert_close(
        errors.length, own.square().mean(0).sqrt().float(), rtol=0.05, atol=1e-3
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("agreement", [0.8, 0.95, 1.0])
def test_the_choice_is_the_dense_layers_as_often_as_asked(family, agreement):
    quantiser, head, _, refined, _ = fitted(family, agreement=agreement, top_k=VOCAB, rows=120)
    kept_out = quantiser.corpus.kept_out
    with torch.no_grad():
        hidden = quantiser.parts.backbone(kept_out[:, :-1]).last_hidden_state.flatten(0, 1)
        choice = quantiser.parts.logits(hidden).argmax(-1, keepdim=True)
        quantised = head(hidden) - refined.refinement.offset(hidden)
        logits = refined.logits(quantiser.parts, head)(hidden)
    values, tokens = quantised.topk(VOCAB)
    within = refined.refinement.within(hidden, values, tokens)
    share = float((within & (tokens == choice)).any(-1).float().mean())
    # It was fitted to hidden states in the type that the device multiplies fastest.
    assert abs(share - agreement) <= 0.02 or refined.refinement.deviations == 0
    same, alone = (
        float((found.argmax(-1, keepdim=True) == choice).float().mean())
        for found in (logits, quantised)
    )
    assert same > alone
    # No token outside of the rule was the dense layer's choice but in the share left.
    assert same >= share - 0.02


def test_nothing_is_kept_out_of_little_text():
    blocks = torch.zeros(4, 17, dtype=torch.long)
    corpus = Corpus(blocks, blocks, "text", "text", [])
    assert keep_out(corpus, 0) is corpus


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
    # The kernel of many rows may round otherwise than that of one.
    assert whole.certified == pytest.approx(certified / len(hidden), abs=0.005)
    assert 0 < certified < len(hidden)
    assert 0 < whole.scored <= 6


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
    assert fine.length.mean() < 0.5 * coarse.length.mean()
