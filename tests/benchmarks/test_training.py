import math

import pytest
import torch

from benchmarks import training
from benchmarks.models import dense_model, quantised_model
from benchmarks.training import (
    Schedule,
    agreement,
    compare,
    fine_tune,
    first_tokens,
    judge,
    parameter_groups,
    training_rows,
)
from hf_vqlogits import VQLogitsHead
from hf_vqlogits.conversion.comparison import HeadScore
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize

SIZE = HeadSize("sign", 24, 2, 10)


@pytest.fixture
def schedule():
    return Schedule(steps=20, tokens_per_step=128, batch_size=4, context=16)


def quantised(case, embeddings="keep"):
    quantiser = Quantiser(case.parts, case.corpus(), 0)
    torch.manual_seed(1)
    head = VQLogitsHead(quantiser.config(SIZE))
    return quantised_model(quantiser, SIZE, head, embeddings=embeddings)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "keep", "tied"])
def test_training_lowers_the_loss(kind, dtype, tiny_case, schedule, monkeypatch):
    monkeypatch.setattr(training, "product_dtype", lambda device: dtype)
    model = dense_model(tiny_case.parts) if kind == "dense" else quantised(tiny_case, kind)
    before = judge(model, tiny_case.evaluation)["novels"].nats
    steps = []
    losses = fine_tune(
        model,
        training_rows(tiny_case.calibration, 16),
        schedule,
        learning_rate=3e-2,
        seed=0,
        notify=lambda step, loss: steps.append((step, loss)),
    )
    assert steps == list(enumerate(losses, 1))
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.05
    assert judge(model, tiny_case.evaluation)["novels"].nats < before - 0.05
    assert not model.training


def test_nothing_is_trained_but_the_copies(tiny_case, schedule):
    before = state_of(tiny_case.parts.backbone)
    weight = tiny_case.parts.weight.clone()
    rows = training_rows(tiny_case.calibration, 16)
    for model in (dense_model(tiny_case.parts), quantised(tiny_case, "tied")):
        fine_tune(model, rows, schedule, learning_rate=1e-2, seed=0)
    after = tiny_case.parts.backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(tiny_case.parts.weight, weight)


@pytest.mark.parametrize("what", ["head", "all"])
def test_what_is_trained(what, tiny_case, schedule):
    model = quantised(tiny_case)
    before = state_of(model)
    rows = training_rows(tiny_case.calibration, 16)
    fine_tune(model, rows, schedule, learning_rate=1e-2, seed=0, what=what)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    floats = {"lm_head.codebook", "lm_head.codebook_bias"}
    if what == "head":
        assert changed == floats
    else:
        assert changed >= floats | {"model.backbone.wte.weight", "model.backbone.ln_f.weight"}
        assert "lm_head.codes" not in changed


def test_tied_sides_stay_one(tiny_case, schedule):
    model = quantised(tiny_case, "tied")
    rows = training_rows(tiny_case.calibration, 16)
    fine_tune(model, rows, schedule, learning_rate=1e-2, seed=0)
    assert model.get_input_embeddings().codebook is model.lm_head.codebook


def test_the_seed_decides_the_order_alike_for_all_models(tiny_case, schedule, monkeypatch):
    seen = []
    forward = torch.nn.Module.__call__

    def record(self, *args, **kwargs):
        if "labels" in kwargs and "input_ids" in kwargs:
            seen[-1].append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", record)
    rows = training_rows(tiny_case.calibration, 16)
    for seed, model in (
        (0, dense_model(tiny_case.parts)),
        (0, quantised(tiny_case)),
        (1, dense_model(tiny_case.parts)),
    ):
        seen.append([])
        fine_tune(model, rows, schedule, learning_rate=1e-3, seed=seed)
    one, two, three = (torch.cat(batches) for batches in seen)
    assert len(one) == 20 * 8
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    # All rows are seen before one is seen again.
    assert len({tuple(row.tolist()) for row in one[: len(rows)]}) == len(rows.unique(dim=0))


def test_portions_of_a_step_do_not_change_it(tiny_case):
    rows = training_rows(tiny_case.calibration, 16)
    states = []
    for batch_size in (2, 8):
        model = dense_model(tiny_case.parts)
        schedule = Schedule(steps=2, tokens_per_step=128, batch_size=batch_size, context=16)
        fine_tune(model, rows, schedule, learning_rate=1e-3, seed=0)
        states.append(model.lm_head.weight.detach().clone())
    # Adam's steps are of the gradient's sign where that is all but zero.
    close = (states[0] - states[1]).abs() < 1e-4
    assert close.float().mean() > 0.99


def test_codewords_and_components_have_rates_of_their_own(tiny_case):
    factors = Schedule(1, 16, 1, 16, head_factor=3.0, mixture_factor=5.0)

    def rates(model):
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        groups = parameter_groups(model, 0.1, factors)
        found = [(names[id(tensor)], group["lr"]) for group in groups for tensor in group["params"]]
        assert len(found) == len({name for name, _ in found}) == len(names)
        return dict(found)

    coded = {"codebook", "codebook_bias", "offset"}
    components = {"factors", "shifts", "gate_slopes", "gate_biases"}
    model = quantised(tiny_case, "tied")
    for name, rate in rates(model).items():
        assert rate == pytest.approx(0.3 if name.split(".")[-1] in coded else 0.1)
    model = quantised(tiny_case)
    model.split_head(2)
    for name, rate in rates(model).items():
        last = name.split(".")[-1]
        assert rate == pytest.approx(1.5 if last in components else 0.3 if last in coded else 0.1)
    (alone,) = parameter_groups(dense_model(tiny_case.parts), 0.1, factors)
    assert alone["lr"] == 0.1


def test_judging_is_the_cross_entropy_of_the_logits(tiny_case):
    model = quantised(tiny_case).train()
    blocks = tiny_case.evaluation["novels"]
    score = judge(model, {"novels": blocks})["novels"]
    assert model.training
    with torch.no_grad():
        logits = model.eval()(blocks[:, :-1]).logits.double()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    # The compiled kernels round logits to 16 bits.
    assert score.nats == pytest.approx(float(nats), abs=2e-3)
    assert score.tokens == blocks[:, 1:].numel()


def score(nats, *choices):
    return HeadScore(nats, 1.0, len(choices), torch.tensor(choices))


def test_comparison():
    factor, texts = compare(
        {"a": score(2.0, 1, 2, 3, 4), "b": score(3.0, 1, 2)},
        {"a": score(1.8, 1, 2, 0, 0), "b": score(2.9, 1, 2)},
    )
    assert factor == pytest.approx(math.exp(0.15))
    assert texts["a"] == {
        "dense_perplexity": pytest.approx(math.exp(1.8)),
        "perplexity": pytest.approx(math.exp(2.0)),
        "factor": pytest.approx(math.exp(0.2)),
        "greedy_agreement": 0.5,
        "tokens": 4,
    }
    assert agreement(score(0.0, 1, 2), score(0.0, 1, 2)) == 1


def test_rows():
    ids = torch.arange(25)
    blocks = ids.unfold(0, 9, 8)
    assert torch.equal(training_rows(blocks, 4), ids[:24].view(6, 4))
    with pytest.raises(ValueError, match="divide the protocol's 8 tokens, got 3"):
        training_rows(blocks, 3)
    assert len(first_tokens(blocks, 16)) == 2
    assert len(first_tokens(blocks, 1)) == 1


def test_impossible_schedules(tiny_case, schedule):
    with pytest.raises(ValueError, match="4 rows of 16 tokens; got 0 and 128"):
        Schedule(steps=0, tokens_per_step=128, batch_size=4, context=16)
    with pytest.raises(ValueError, match="multiple of a forward pass.*got 1 and 100"):
        Schedule(steps=1, tokens_per_step=100, batch_size=4, context=16)
    with pytest.raises(ValueError, match="`what` must be one of head, all; got 'body'"):
        fine_tune(
            dense_model(tiny_case.parts),
            tiny_case.calibration,
            schedule,
            learning_rate=1e-3,
            seed=0,
            what="body",
        )
