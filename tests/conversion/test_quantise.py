import pytest
import torch
from tiny_models import tiny_model

from hf_vqlogits.conversion import quantise
from hf_vqlogits.conversion.calibration import StatisticsAccumulator
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation import Distillation
from hf_vqlogits.conversion.families import take_apart
from hf_vqlogits.conversion.held_out import split
from hf_vqlogits.conversion.metric import token_metric
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_gives_the_original_logits(family, dtype, monkeypatch):
    """With the family's bias, scale and soft-cap, in whichever type its product is taken."""
    monkeypatch.setattr(quantise, "product_dtype", lambda device: dtype)
    parts = take_apart(tiny_model(family))
    hidden = 5 * torch.randn(11, parts.weight.shape[1])
    wanted = parts.logits(hidden)
    error = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    logits = quantise._teacher(parts)(hidden)
    assert logits.dtype == torch.float32
    assert (logits - wanted).abs().max() <= error * wanted.abs().max()


def calibrated(rereadings, *, seed=0, rows=40):
    parts = take_apart(tiny_model("llama"))
    blocks = torch.randint(3, 96, (rows, 9), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(blocks, blocks, "text", "text", [])
    quantiser = Quantiser(parts, corpus, seed=seed, rereadings=rereadings)
    return quantiser, quantiser.calibrate(to_distill=True)


def test_the_text_is_read_again_with_half_of_its_tokens_redrawn():
    quantiser, statistics = calibrated(2)
    text = quantiser.corpus.calibration
    assert statistics.positions == 3 * 40 * 8
    assert quantiser.states.versions == 3
    versions = quantiser.states.blocks.view(3, 40, 9)
    assert torch.equal(versions[0], text)
    for version in versions[1:]:
        assert torch.equal(version[:, 0], text[:, 0])
        assert 0.35 < (version != text)[:, 1:].float().mean() < 0.55
    assert not torch.equal(versions[1], versions[2])
    # The states that are kept, and were counted, are those of the rows as they became.
    hidden = torch.cat(list(quantiser.states(torch.arange(120))))
    with torch.no_grad():
        exact = quantiser.parts.backbone(quantiser.states.blocks[:, :-1]).last_hidden_state
    torch.testing.assert_close(hidden, exact.flatten(0, 1), rtol=0, atol=0.05)
    torch.testing.assert_close(statistics.mean.float(), hidden.mean(0), rtol=0, atol=1e-5)


def test_tokens_are_redrawn_from_the_models_distribution_of_its_own_reading():
    """In a second rereading too: by what the first, not the text, leads the model to expect."""
    quantiser, _ = calibrated(2, rows=3000)
    parts, versions = quantiser.parts, quantiser.states.blocks.view(3, 3000, 9)
    for before, after in ((0, 1), (1, 2)):
        with torch.no_grad():
            hidden = parts.backbone(versions[before][:, :-1]).last_hidden_state
            nats = parts.logits(hidden).log_softmax(-1)
        changed = (versions[after] != versions[0])[:, 1:]
        told = nats.gather(-1, versions[after][:, 1:, None]).squeeze(-1)[changed].mean()
        entropy = -(nats.exp() * nats).sum(-1).mean()
        assert told == pytest.approx(-float(entropy), abs=0.05)


@pytest.mark.parametrize("rereadings", [0, 2])
def test_text_that_judges_a_distillation_enters_no_statistics(rereadings):
    parts = take_apart(tiny_model("llama"))
    blocks = torch.randint(3, 96, (700, 9))
    corpus = Corpus(blocks, blocks, "text", "text", [])
    quantiser = Quantiser(parts, corpus, seed=3, rereadings=rereadings)
    statistics = quantiser.calibrate(to_distill=True)
    versions = 1 + rereadings
    held, order = split(quantiser.states.blocks, 100, 3, versions=versions)
    fitted = quantiser.states.blocks[order.unique()]
    assert len(fitted) == versions * (700 - len(held))
    alone = StatisticsAccumulator(parts.weight, bias=parts.bias)
    with torch.no_grad():
        alone.update(parts.backbone(fitted[:, :-1]).last_hidden_state.flatten(0, 1).float())
    wanted = alone.finish()
    assert statistics.positions == wanted.positions == 8 * len(fitted)
    for name in ("mean", "covariance", "probability"):
        torch.testing.assert_close(
            getattr(statistics, name), getattr(wanted, name), atol=1e-2, rtol=5e-2
        )
    assert torch.equal(quantiser.states.blocks[held], blocks[held])
    again = [quantiser.states.blocks[held + 700 * version] for version in range(versions)]
    assert all(torch.equal(some, blocks[held]) for some in again)


def test_without_rereadings_the_text_is_read_once():
    quantiser, statistics = calibrated(0)
    assert statistics.positions == 40 * 8
    assert torch.equal(quantiser.states.blocks, quantiser.corpus.calibration)


def test_the_seed_decides_what_is_redrawn():
    first, again, other = (calibrated(1, seed=seed)[0].states.blocks for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("code_type", "options", "learnt"),
    [("sign", {}, True), ("sign", {"learn_codes": False}, False), ("index", {}, True)],
)
def test_codes_are_learnt_in_the_metric_of_the_fit(code_type, options, learnt, monkeypatch):
    parts = take_apart(tiny_model("llama"))
    blocks = torch.randint(3, 96, (40, 9))
    quantiser = Quantiser(parts, Corpus(blocks, blocks, "text", "text", []), seed=3)
    statistics = quantiser.calibrate(to_distill=True)
    if code_type == "sign":
        size = HeadSize("sign", 7, 2, 5)
        head = quantiser.sign_heads([size], statistics)[size]
    else:
        head = quantiser.index_head(HeadSize("index", 1, 7), "random", statistics)
    given = {}

    def record(head, states, **options):
        given.update(options, states=states)
        return Distillation(5, 0.2, 0.1)

    monkeypatch.setattr(quantise, "distill", record)
    quantiser.distill(head, 5, statistics, **options)
    assert (given["metric"] is not None) == learnt
    if learnt:
        wanted = token_metric(parts.weight, statistics, bias=parts.bias)
        assert torch.equal(given["metric"].rows, wanted.rows)
    assert given["states"] is quantiser.states
    hidden = torch.randn(5, parts.weight.shape[1])
    torch.testing.assert_close(given["judge"](hidden), parts.logits(hidden), atol=0, rtol=0)
    assert (given["steps"], given["seed"]) == (5, 3)
    assert quantiser.details["distillation"]["kl_after"] == 0.1
