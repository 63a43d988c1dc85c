import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense_weight, perturb, text_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_vqlogits import (
    VQLogitsConfig,
    VQLogitsForCausalLM,
    VQLogitsHead,
    VQLogitsMixtureHead,
    mixture,
)
from hf_vqlogits.gates import ACTIVATIONS
from hf_vqlogits.mixture import output_layer, split

D, V = 12, 90
CODES = {
    "sign": {"code_type": "sign", "num_codebooks": 19, "codebook_size": 2},
    "sign, second codes": {
        "code_type": "sign",
        "num_codebooks": 19,
        "codebook_size": 2,
        "num_fine_tokens": 30,
    },
    "index, G = 1": {"code_type": "index", "num_codebooks": 1, "codebook_size": 40},
    "index, G = 2": {"code_type": "index", "num_codebooks": 2, "codebook_size": 40},
    "index, G = 3": {"code_type": "index", "num_codebooks": 3, "codebook_size": 40},
}
AFTER = {"logit_scale": 0.5, "final_logit_softcapping": 2.0}


def sizes(fields: dict, **more) -> SimpleNamespace:
    config = {"vocab_size": V, "hidden_size": D, "num_fine_tokens": 0, "logit_scale": 1.0}
    config |= {"final_logit_softcapping": None, "nested_codebooks": [], "num_mixtures": 3}
    config |= {"gate_activation": "linear", "gate_temperature": 1.0}
    return SimpleNamespace(**(config | fields | more))


def make_mixture(fields: dict, **more) -> VQLogitsMixtureHead:
    torch.manual_seed(0)
    head = VQLogitsMixtureHead(sizes(fields, **more))
    perturb(head)
    with torch.no_grad():
        for name in ("factors", "gate_slopes", "gate_biases"):
            getattr(head, name).add_(torch.randn(getattr(head, name).shape))
        head.shifts.copy_(0.3 * torch.randn(head.shifts.shape) / head.score_scale)
    return head


def reference(head: VQLogitsMixtureHead, hidden: Tensor) -> Tensor:
    """Log-probabilities (N, V) in float64, one component at a time, from dense matrices."""
    total = torch.zeros(len(hidden), head.out_features, dtype=torch.float64)
    act = ACTIVATIONS[head.gate_activation]
    hidden = hidden.detach().double()
    slopes, biases = head.gate_slopes.detach().double(), head.gate_biases.detach().double()
    gate = act(hidden @ slopes.T / math.sqrt(D)) + biases
    gate = (gate / head.gate_temperature).softmax(-1)
    for component in range(head.num_mixtures):
        plain = copy.deepcopy(head).double()
        factors, shifts = plain.factors[component], plain.shifts[component]
        with torch.no_grad():
            plain.codebook.mul_(factors.unsqueeze(-1))
            plain.codebook_bias.mul_(factors).add_(shifts)
        weight, bias = dense_weight(plain)
        logits = (hidden @ weight.T + bias) * head.logit_scale
        cap = head.final_logit_softcapping
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        total += gate[:, component, None] * logits.softmax(-1)
    return total.log()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(10, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("fields", CODES.values(), ids=CODES.keys())
def test_it_is_a_mixture_of_softmaxes(fields, after, activation, hidden):
    gate = {"gate_activation": activation, "gate_temperature": 0.7}
    head = make_mixture(fields, **after, **gate)
    wanted = reference(head, hidden)
    torch.testing.assert_close(head(hidden).double(), wanted, atol=2e-2, rtol=1e-2)
    head.double()
    torch.testing.assert_close(head(hidden.double()), wanted)
    torch.testing.assert_close(head(hidden.double()).logsumexp(-1), torch.zeros(10).double())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("after", [{}, AFTER], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("fields", CODES.values(), ids=CODES.keys())
def test_the_loss_is_the_cross_entropy_of_the_logits(fields, after, reduction, hidden):
    head = make_mixture(fields, **after).double()
    labels = torch.tensor([0, 1, -100, V - 1, 7, 3, -100, 5, 9, 2])
    hidden = hidden.double()
    wanted = torch.nn.functional.nll_loss(head(hidden), labels, reduction=reduction)
    given = head(hidden, labels, reduction=reduction)
    torch.testing.assert_close(given, wanted)
    by_loss = torch.autograd.grad(given.sum(), [*head.parameters()])
    by_logits = torch.autograd.grad(wanted.sum(), [*head.parameters()])
    for one, other in zip(by_loss, by_logits, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_counts_items_of_several_batches_and_no_rows_at_all(hidden):
    head = make_mixture(CODES["sign"])
    labels = torch.arange(10).view(2, 5)
    whole = head(hidden.view(2, 5, D), labels, reduction="sum")
    spread = head(hidden.view(2, 5, D), labels, num_items_in_batch=40)
    torch.testing.assert_close(spread, whole / 40)
    ignored = head(hidden, torch.full((10,), -100), reduction="sum")
    ignored.backward()
    assert float(ignored.detach()) == 0.0
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("name", ["sign", "index, G = 2"])
def test_gradients(name):
    head = make_mixture(CODES[name], gate_activation="gelu").double()
    hidden = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, -100, 0, V - 1])
    names = [name for name, _ in head.named_parameters()]

    def loss(hidden: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(head, given, (hidden, labels))

    assert torch.autograd.gradcheck(loss, (hidden, *head.parameters()))


@given(temperature=st.floats(0.05, 20.0), shift=st.floats(-5.0, 5.0))
@settings(deadline=None, max_examples=20)
def test_what_a_gate_cannot_tell(temperature, shift):
    """Shares add up to one, and a shift that all biases share changes none."""
    head = make_mixture(CODES["sign"], gate_temperature=temperature, gate_activation="tanh")
    rows = torch.randn(7, D)
    shares = head.log_gate(rows)
    torch.testing.assert_close(shares.exp().sum(-1), torch.ones(7))
    with torch.no_grad():
        head.gate_biases.add_(shift)
    torch.testing.assert_close(head.log_gate(rows), shares, atol=1e-4, rtol=1e-4)


def test_temperature_shares_or_chooses(hidden):
    dense = make_mixture(CODES["sign"], gate_temperature=1e4).log_gate(hidden).exp()
    sparse = make_mixture(CODES["sign"], gate_temperature=1e-4).log_gate(hidden).exp()
    torch.testing.assert_close(dense, torch.full_like(dense, 1 / 3), atol=1e-2, rtol=0)
    assert (sparse.max(-1).values > 0.999).all()


def test_equal_components_are_one_softmax(hidden):
    head = make_mixture(CODES["sign"]).double()
    with torch.no_grad():
        head.factors.fill_(1.0)
        head.shifts.zero_()
    plain = VQLogitsHead(sizes(CODES["sign"])).double()
    plain.load_state_dict(head.state_dict(), strict=False)
    hidden = hidden.double()
    torch.testing.assert_close(head(hidden), plain(hidden).log_softmax(-1))


def test_top_tokens_are_those_of_the_logits_whatever_the_chunks(hidden, monkeypatch):
    head = make_mixture(CODES["sign"])
    rows = hidden.view(2, 5, D)
    wanted = head(rows).float().topk(4)
    for at_once in (1, 3, 100):
        monkeypatch.setattr(mixture, "CHUNK_BYTES", 4 * V * at_once)
        values, tokens = head.topk(rows, 4)
        assert values.shape == tokens.shape == (2, 5, 4)
        torch.testing.assert_close(tokens, wanted.indices)
        torch.testing.assert_close(values, wanted.values, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(head.argmax(rows), wanted.indices[..., 0])
    assert head.topk(hidden[:0], 2)[1].shape == (0, 2)
    with pytest.raises(ValueError, match=r"`k` must be in 1\.\.90, the vocabulary, got 91"):
        head.topk(hidden, 91)


def test_samples_follow_the_mixture():
    head = make_mixture(CODES["sign"])
    row, draws = torch.randn(D), 20_000
    drawn = head.sample(row.expand(draws, D), generator=torch.Generator().manual_seed(2))
    chances = head(row).detach().exp()
    bound = 5 * (chances * (1 - chances) / draws).sqrt() + 1e-3
    found = drawn.bincount(minlength=V) / draws
    assert ((found - chances).abs() <= bound).all()


@pytest.mark.parametrize("fields", CODES.values(), ids=CODES.keys())
def test_a_split_head_computes_nearly_the_same_and_can_be_told_apart(fields, hidden):
    torch.manual_seed(0)
    head = VQLogitsHead(sizes(fields))
    perturb(head)
    before = head(hidden).log_softmax(-1)
    made = split(head, sizes(fields, num_mixtures=4))
    assert made.codebook is head.codebook
    assert made.codes is head.codes
    divergence = (before.exp() * (before - made(hidden))).sum(-1)
    assert divergence.abs().max() < 1e-2
    assert not torch.equal(made.factors[0], made.factors[1])
    again = split(head, sizes(fields, num_mixtures=4))
    other = split(head, sizes(fields, num_mixtures=4), seed=1)
    assert torch.equal(again.factors, made.factors)
    assert not torch.equal(other.factors, made.factors)


def test_only_a_plain_head_is_split():
    made = make_mixture(CODES["sign"])
    with pytest.raises(ValueError, match="Only a plain head is split.* it has 3 and .* is 2"):
        split(made, sizes(CODES["sign"], num_mixtures=2))
    with pytest.raises(ValueError, match="it has 1 and `num_mixtures` is 1"):
        split(VQLogitsHead(sizes(CODES["sign"])), sizes(CODES["sign"], num_mixtures=1))


def test_losses_that_need_one_softmax_are_refused(hidden):
    head, labels = make_mixture(CODES["sign"]), torch.arange(10)
    for option in ({"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"output_loss": "squared_hinge"}):
        with pytest.raises(ValueError, match="trains by plain cross-entropy"):
            head(hidden, labels, **option)
    with pytest.raises(ValueError, match="`reduction` is 'best'"):
        head(hidden, labels, reduction="best")
    with pytest.raises(ValueError, match="A mixture of 3 softmaxes has no dense layer"):
        head.to_linear()


def test_storage_counts_what_a_mixture_has_more():
    plain, made = VQLogitsHead(sizes(CODES["sign"])), make_mixture(CODES["sign"])
    more = 3 * (2 * 19 + D + 1)
    one, other = plain.storage(), made.storage()
    assert other["float_parameters"] == one["float_parameters"] + more
    assert other["total_bytes"] == one["total_bytes"] + 4 * more
    assert other["codes_bytes"] == one["codes_bytes"]


def test_one_softmax_is_a_plain_head():
    assert type(output_layer(sizes(CODES["sign"], num_mixtures=1))) is VQLogitsHead
    assert type(output_layer(sizes(CODES["sign"]))) is VQLogitsMixtureHead


def make_model(**fields) -> VQLogitsForCausalLM:
    torch.manual_seed(0)
    model = VQLogitsForCausalLM(
        VQLogitsConfig(text_config=text_config("llama"), num_codebooks=19, **fields)
    )
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("embeddings", ["keep", "vq", "tied"])
def test_a_split_model_is_saved_and_loaded(embeddings, tmp_path):
    model = make_model(embeddings=embeddings)
    ids = torch.arange(5, 15).view(2, 5)
    before = model(ids).logits.log_softmax(-1)
    made = model.split_head(2, gate_activation="tanh", gate_temperature=0.5)
    assert model.lm_head is made
    torch.testing.assert_close(model(ids).logits, before, atol=0.1, rtol=0.05)
    with torch.no_grad():
        for name in ("factors", "shifts", "gate_slopes", "gate_biases"):
            getattr(made, name).add_(0.1 * torch.randn(getattr(made, name).shape))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, VQLogitsMixtureHead)
    assert (loaded.lm_head.gate_activation, loaded.lm_head.gate_temperature) == ("tanh", 0.5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.embeddings == embeddings
    shared = loaded.lm_head.codebook is getattr(loaded.get_input_embeddings(), "codebook", None)
    assert shared == (embeddings == "tied")


def test_a_mixture_from_scratch_learns_and_generates():
    torch.manual_seed(0)
    config = VQLogitsConfig(text_config=text_config("llama"), num_codebooks=19, num_mixtures=2)
    model = VQLogitsForCausalLM(config).train()
    ids = torch.randint(3, 61, (4, 12))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        output = model(ids, labels=ids)
        assert output.logits is None
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.lm_head.gate_slopes.abs().max() > 0
    model.eval()
    greedy = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(greedy[:, 4], model(ids[:, :4]).logits[:, -1].argmax(-1))
    loss = model(ids, labels=ids)
    wanted = torch.nn.functional.nll_loss(loss.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.loss, wanted, atol=2e-3, rtol=1e-3)


def test_new_tokens_have_a_place_in_every_component():
    model = make_model()
    model.split_head(2)
    model.resize_token_embeddings(70)
    logits = model(torch.arange(5).view(1, 5)).logits
    assert logits.shape[-1] == 70
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, 5), atol=1e-3, rtol=0)


def test_a_refused_split_changes_nothing():
    model = make_model(refine_top_k=4)
    head = model.lm_head
    with pytest.raises(ValueError, match="`num_mixtures` 2 goes with `refine_top_k` 0 only, got 4"):
        model.split_head(2)
    with pytest.raises(ValueError, match="`gate_temperature` must be positive and finite, got 0"):
        make_model().split_head(2, gate_temperature=0)
    config = make_model().split_head(2)
    with pytest.raises(ValueError, match="A mixture of 2 softmaxes has no dense layer"):
        model.set_output_embeddings(config)
    assert model.lm_head is head
    assert model.config.num_mixtures == 1


def test_a_mixture_has_no_dense_model():
    model = make_model()
    model.split_head(2)
    with pytest.raises(ValueError, match="A mixture of 2 softmaxes has no dense layer"):
        model.to_dense()


def test_it_compiles_without_a_break(hidden):
    head = make_mixture(CODES["sign"])
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), head(hidden), atol=1e-2, rtol=1e-2)
