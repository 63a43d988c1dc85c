import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny import VOCABULARY, reference_logits
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_vqlogits import VQLogitsForCausalLM
from hf_vqlogits.embedding import VQEmbedding
from hf_vqlogits.refinement import Refinement

D, V, T = 6, 40, 7
OWN = {"refine_top_k": T, "num_fine_tokens": 8}
BUFFERS = ("bias", "error", "mean", "spread", "common", "common_bias")
SHARED = OWN | {"refine_with_embedding": True}


def make_refinement(*, top_k=T, deviations=None, with_embedding=False) -> Refinement:
    torch.manual_seed(0)
    refinement = Refinement(
        SimpleNamespace(
            refine_top_k=top_k,
            refine_deviations=deviations,
            refine_with_embedding=with_embedding,
            vocab_size=V,
            hidden_size=D,
        )
    )
    for tensor in refinement.state_dict(keep_vars=True).values():
        nn.init.normal_(tensor)
    for tensor in (refinement.error, refinement.spread):
        tensor.abs_()
    return refinement


CAPPED = {"logit_scale": 2.0, "final_logit_softcapping": 3.0}


def capped(raw):
    return 3 * torch.tanh(2 * raw / 3)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits():
    return torch.randn(2, 5, V, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(2, 5), (10,), ()])
@pytest.mark.parametrize("deviations", [None, 0.7])
@pytest.mark.parametrize("own", [True, False])
def test_the_best_are_scored_by_the_dense_layer(hidden, logits, shape, deviations, own):
    refinement = make_refinement(deviations=deviations)
    weight = refinement.weight.detach()
    handed = None
    if not own:
        refinement.weight, handed = None, weight
    hidden = hidden.view(10, D)[: math.prod(shape)].view(*shape, D)
    logits = logits.view(10, V)[: math.prod(shape)].view(*shape, V)
    given = logits.clone()
    with torch.no_grad():
        refined = refinement(hidden, logits, weight=handed, **CAPPED)
    assert torch.equal(refined, logits)  # in place
    scored = 0
    for place in itertools.product(*map(range, shape)):
        h = hidden[place].double()
        dense = capped(h @ weight.double().T + refinement.bias.double())
        wanted = given[place].double() - (h @ refinement.common.double() + refinement.common_bias)
        best = wanted.argsort(descending=True)[:T].tolist()
        rho = float(((h - refinement.mean) / refinement.spread).square().mean().sqrt())
        below = {token: float(wanted[best[0]] - wanted[token]) for token in best}
        for token in best:
            deviation = rho * float(refinement.error[[best[0], token]].double().norm())
            if deviations is None or below[token] <= deviations * deviation:
                wanted[token] = dense[token]
                scored += 1
        torch.testing.assert_close(refined[place].double(), wanted, atol=1e-5, rtol=1e-5)
    assert scored == T * math.prod(shape) if deviations is None else scored > 0


def test_the_rule_looks_further_where_errors_are_larger(hidden, logits):
    counts = []
    tokens = logits.topk(T).indices
    for factor in (0.0, 0.1, 0.5, 2.0, 1e6):
        refinement = make_refinement(deviations=1.0)
        refinement.error *= factor
        quantised = logits - refinement.offset(hidden)
        refined = refinement(hidden, logits)
        counts.append(int((refined != quantised).gather(-1, tokens).sum()))
    assert counts == sorted(counts)
    assert counts[0] == 10  # the best ones alone
    assert counts[0] < counts[2] < counts[-1] == 10 * T


def test_gradients_reach_the_hidden_states_through_exact_and_quantised_logits(hidden, logits):
    refinement = make_refinement().double()
    hidden = hidden.double().requires_grad_()
    logits = logits.double().requires_grad_()
    given = logits.detach().clone()
    assert torch.autograd.gradcheck(lambda h, z: refinement(h, z, **CAPPED), (hidden, logits))
    refinement(hidden, logits).sum().backward()
    assert refinement.weight.grad is None
    assert torch.equal(logits, given)
    assert set(logits.grad.flatten().tolist()) == {0.0, 1.0}
    assert int((logits.grad == 0).sum()) == 10 * T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_the_dense_layer_does(hidden, logits, dtype):
    refinement = make_refinement(top_k=V).to(dtype)
    hidden = hidden.to(dtype)
    refined = refinement(hidden, logits.to(dtype))
    assert refined.dtype == dtype
    dense = nn.functional.linear(hidden.float(), refinement.weight.float(), refinement.bias.float())
    torch.testing.assert_close(refined, dense.to(dtype), atol=2e-2, rtol=1e-2)


def test_no_position_has_nothing_to_refine():
    refinement = make_refinement()
    assert refinement(torch.zeros(0, D), torch.zeros(0, V)).shape == (0, V)


def test_without_rows_it_says_what_to_hand_in(hidden, logits):
    refinement = make_refinement(with_embedding=True)
    with pytest.raises(ValueError, match="no dense weight of its own: hand in `weight`"):
        refinement(hidden, logits)


def test_rows_that_were_offloaded_are_refused(hidden, logits):
    refinement = make_refinement(with_embedding=True)
    with pytest.raises(ValueError, match="was offloaded.*`device_map`.*`refine_top_k=0`"):
        refinement(hidden, logits, weight=torch.empty(V, D, device="meta"))


# In a model


def dense_logits(model: VQLogitsForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    weight = model.refinement.weight
    if weight is None:
        weight = model.get_input_embeddings().weight
    hidden = model.model(ids).last_hidden_state
    raw = nn.functional.linear(hidden, weight.detach(), model.refinement.bias)
    return model.lm_head.postprocess(raw).detach()


@pytest.mark.parametrize("fields", [OWN, SHARED], ids=["own rows", "the embedding's"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_largest_logits_are_the_dense_ones(make_model, ids, family, fields):
    model = make_model(family, **fields)
    hidden = model.model(ids).last_hidden_state
    quantised = model.lm_head(hidden)
    tokens = quantised.topk(T).indices
    quantised = quantised - model.refinement.offset(hidden)
    wanted = quantised.scatter(-1, tokens, dense_logits(model, ids).gather(-1, tokens))
    torch.testing.assert_close(model(ids).logits, wanted)
    last = model(ids, logits_to_keep=1).logits
    # The kernel rounds to 16 bits, for few rows otherwise than for many.
    torch.testing.assert_close(last, wanted[:, -1:], atol=5e-3, rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted)
    torch.testing.assert_close(model.train()(ids).logits, model.lm_head(model.model(ids)[0]))


def test_the_loss_is_the_quantised_heads(make_model, ids):
    model = make_model("llama", **OWN)
    loss = model(ids, labels=ids).loss
    logits = reference_logits(model.lm_head, model.model(ids).last_hidden_state)[:, :-1]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), wanted, atol=1e-2, rtol=1e-2)


def test_all_candidates_make_greedy_decoding_that_of_the_dense_model(make_model, ids):
    model = make_model("llama", refine_top_k=VOCABULARY)
    dense = model.to_dense().model
    dense.get_output_embeddings().weight = nn.Parameter(model.refinement.weight.detach())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("fields", [OWN, SHARED], ids=["own rows", "the embedding's"])
def test_saved_and_loaded(make_model, ids, tmp_path, fields):
    model = make_model("llama", refine_deviations=1.5, **fields)
    for buffer in model.refinement.buffers():
        nn.init.uniform_(buffer)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name for name in file.keys() if name.startswith("refinement")}
    own = {"refinement.weight"} if fields is OWN else set()
    assert saved == own | {f"refinement.{name}" for name in BUFFERS}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    weight = loaded.refinement.weight
    assert weight is None if fields is SHARED else not weight.requires_grad

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, refine_top_k=0)
    assert plain.refinement is None
    quantised = plain(ids).logits
    assert torch.equal(quantised, model.lm_head(model.model(ids).last_hidden_state))
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path, refine_top_k=1, refine_deviations=None)
    shifted = quantised - model.refinement.offset(model.model(ids).last_hidden_state)
    assert int((fewer(ids).logits != shifted).sum()) == ids.numel()
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_checkpoint_without_the_rows_is_refused(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks refinement\.bias, refinement\.common, "):
        AutoModelForCausalLM.from_pretrained(tmp_path, refine_top_k=3)


def test_the_configuration_says_whose_the_rows_are(make_model, tmp_path):
    make_model("llama", **OWN).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["refine_top_k"], config["refine_with_embedding"]) == (T, False)


@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 9, 5])
@pytest.mark.parametrize("fields", [OWN, SHARED], ids=["own rows", "the embedding's"])
def test_resized(make_model, ids, tmp_path, size, fields):
    ids = ids % min(size, VOCABULARY)
    model = make_model("llama", **fields)
    nn.init.uniform_(model.refinement.error)
    before = copy.deepcopy(model.refinement)
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, VOCABULARY)
    refinement = model.refinement
    assert torch.equal(refinement.error[:kept], before.error[:kept])
    assert not refinement.error[kept:].any()
    if fields is OWN:
        assert torch.equal(refinement.weight[:kept], before.weight[:kept])
        rows = model.lm_head.to_linear()[0][kept:]
        torch.testing.assert_close(refinement.weight[kept:].detach(), rows)
        assert not refinement.weight.requires_grad
    assert model.config.refine_top_k == refinement.top_k == min(T, size)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_rows_stay_when_the_embedding_they_lay_in_is_replaced(make_model, ids, tmp_path):
    model = make_model("llama", **SHARED)
    dense = model.get_input_embeddings().weight.detach().clone()
    model.set_input_embeddings(VQEmbedding(VOCABULARY, 32, num_codebooks=11))
    assert torch.equal(model.refinement.weight, dense)
    assert not model.config.refine_with_embedding
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("fields", [OWN, SHARED], ids=["own rows", "the embedding's"])
def test_another_head_has_errors_of_its_own(make_model, ids, family, fields):
    model = make_model(family, refine_deviations=1.0, logit_scale=0.5, **fields)
    head = copy.deepcopy(model.lm_head)
    nn.init.normal_(head.codebook)
    model.set_output_embeddings(head)
    assert model.refinement.deviations is None
    assert model.config.refine_deviations is None
    offset = model.refinement.offset(model.model(ids).last_hidden_state)
    if family == "gemma2":  # soft-capped: a constant is not free
        assert not offset.any()
        return
    hidden = model.model(ids).last_hidden_state
    less = model.lm_head(hidden) - offset - dense_logits(model, ids)
    assert less.mean(-1).abs().max() < 1e-2  # the kernel rounds to 16 bits
    assert offset.abs().max() > 0.1


def test_compiled_without_a_break(make_model, ids):
    model = make_model("llama", refine_deviations=1.0, **OWN)
    nn.init.uniform_(model.refinement.error)
    with torch.no_grad():
        wanted = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, wanted)


def test_training_leaves_the_rows_alone(make_model, ids):
    model = make_model("llama", **OWN).train()
    before = model.refinement.weight.detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    assert torch.equal(model.refinement.weight, before)
