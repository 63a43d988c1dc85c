import pytest
import torch
from tiny import VOCABULARY, perturb, text_config
from torch import nn
from transformers import AutoModelForCausalLM

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM

WITHOUT_BIAS = ["gpt2", "llama", "gemma2", "opt", "gpt_neox", "mamba", "mixtral"]
WITH_BIAS = ["gptj", "phi"]


def scale_of(family):
    """A configuration with the family's own scale between backbone and logits."""
    fields = {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0}}
    return text_config(family, **fields[family])


def reloaded(dense, folder):
    """The model after saving and loading, by the original architecture's own class."""
    dense.model.save_pretrained(folder)
    loaded, info = type(dense.model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded).__module__.startswith("transformers.models.")
    return loaded


def assert_same_logits(dense, model, ids):
    torch.testing.assert_close(dense(ids).logits, model(ids).logits, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_exact_without_bias(make_model, ids, tmp_path, family, tied):
    fields = {} if family == "mamba" else {"tie_word_embeddings": tied}
    model = make_model(family, text_config=text_config(family, **fields))
    nn.init.zeros_(model.lm_head.codebook_bias)
    dense = model.to_dense()
    assert (dense.bias_folded, dense.logit_error, dense.bias_deviation) == (True, 0.0, 0.0)
    loaded = reloaded(dense, tmp_path)
    assert type(loaded.get_output_embeddings()) is nn.Linear
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert loaded.config.tie_word_embeddings is False
    assert_same_logits(loaded, model, ids)


@pytest.mark.parametrize("family", WITH_BIAS)
def test_layers_with_a_bias_take_it(make_model, ids, tmp_path, family):
    model = make_model(family)
    dense = model.to_dense()
    assert not dense.bias_folded
    assert dense.logit_error == 0
    assert dense.bias_deviation > 0.1
    assert_same_logits(reloaded(dense, tmp_path), model, ids)


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_scales_are_left_to_the_family(make_model, ids, tmp_path, family):
    model = make_model(family, text_config=scale_of(family), logit_scale=0.25)
    nn.init.zeros_(model.lm_head.codebook_bias)
    assert_same_logits(reloaded(model.to_dense(), tmp_path), model, ids)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("gemma2", {"final_logit_softcapping": None}), ("cohere", {"logit_scale": 1.0})],
)
def test_a_scale_that_is_not_the_familys_is_refused(make_model, family, fields):
    config = text_config(family) if family == "gemma2" else scale_of(family)
    model = make_model(family, text_config=config, **fields)
    model.lm_head.codebook.data.mul_(1e-3)  # where a soft-cap would not show
    nn.init.zeros_(model.lm_head.codebook_bias)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="computes other logits from the same output layer"):
        model.to_dense()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def with_statistics(model, count=400):
    """Store the statistics of random texts in the head, as calibration does; return the rows."""
    texts = torch.randint(3, VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rows = model.model(texts).last_hidden_state.flatten(0, 1).double()
        mean = rows.mean(0)
        second = rows.T @ rows / len(rows)
        model.lm_head.hidden_mean.copy_(mean)
        model.lm_head.fold_direction.copy_(torch.linalg.solve(second, mean))
    return texts, rows


def test_folding_costs_what_it_says(make_model, tmp_path):
    model = make_model("llama")
    texts, _ = with_statistics(model)
    dense = model.to_dense()
    assert dense.bias_folded
    assert 0 < dense.logit_error < dense.bias_deviation
    changed = reloaded(dense, tmp_path)(texts).logits - model(texts).logits
    changed = changed - changed.mean(-1, keepdim=True)  # the same for all tokens: no effect
    measured = float(changed.detach().square().mean().sqrt())
    assert measured == pytest.approx(dense.logit_error, rel=0.05)
    bias = model.lm_head.to_linear()[1]
    assert dense.bias_deviation == pytest.approx(float(bias.std()), rel=0.02)


def test_folding_is_exact_behind_a_layer_norm(make_model, ids):
    # (h - bias) / weight sums to 0 there, so that some direction has the same product with every h.
    model = make_model("gpt2")
    with_statistics(model)
    dense = model.to_dense()
    assert dense.logit_error < 1e-2 * dense.bias_deviation
    given, wanted = (m(ids).logits.log_softmax(-1) for m in (dense.model, model))
    torch.testing.assert_close(given, wanted, atol=2e-2, rtol=1e-2)


def test_folding_is_the_least_squares_solution(make_model):
    model = make_model("llama")
    _, rows = with_statistics(model)
    weight, bias = (t.double() for t in model.lm_head.to_linear())
    folded = model.to_dense().model.lm_head.weight.double()
    target = (bias - bias.mean()).expand(len(rows), -1)
    best = torch.linalg.lstsq(rows, target).solution.T
    torch.testing.assert_close(folded - weight, best, atol=1e-4, rtol=1e-3)


def test_soft_caps_keep_the_mean_of_the_bias(make_model):
    model = make_model("gemma2")
    with_statistics(model)
    bias = model.lm_head.to_linear()[1]
    expected = float(bias.square().mean().sqrt())
    assert model.to_dense().bias_deviation == pytest.approx(expected, rel=1e-4)


def test_without_statistics_the_bias_is_lost_and_this_is_said(make_model):
    model = make_model("llama")
    model.lm_head.fold_direction.zero_()
    dense = model.to_dense()
    assert dense.logit_error == dense.bias_deviation > 0.1
    torch.testing.assert_close(dense.model.lm_head.weight, model.lm_head.to_linear()[0])


def test_model_and_mode_are_kept(make_model, ids):
    model = make_model("llama").to(torch.bfloat16)
    nn.init.zeros_(model.lm_head.codebook_bias)
    model.generation_config.max_new_tokens = 33
    state = {n: t.clone() for n, t in model.state_dict().items()}
    dense = model.train().to_dense().model
    assert dense.training
    assert model.training
    assert dense.dtype == dense.lm_head.weight.dtype == torch.bfloat16
    assert dense.generation_config.max_new_tokens == 33
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    perturb(dense)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert dense(ids).logits.dtype == torch.bfloat16


def test_after_resizing(make_model, ids, tmp_path):
    model = make_model("gpt2")
    nn.init.zeros_(model.lm_head.codebook_bias)
    model.resize_token_embeddings(70)
    loaded = reloaded(model.to_dense(), tmp_path)
    assert loaded.config.vocab_size == 70
    assert_same_logits(loaded, model, ids)


def test_index_codes(make_model, ids, tmp_path):
    head = {"code_type": "index", "num_codebooks": 3, "codebook_size": 7}
    model = make_model("phi", **head)
    assert_same_logits(reloaded(model.to_dense(), tmp_path), model, ids)


@pytest.mark.parametrize("bits", [8, 19])
def test_nested_codes(make_model, ids, tmp_path, bits):
    model = make_model("phi", nested_codebooks=[4, 8], num_fine_tokens=7)
    model.keep_codebooks(bits)
    assert_same_logits(reloaded(model.to_dense(), tmp_path), model, ids)


def test_quantised_bodies_are_refused(make_model):
    model = make_model("llama")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="loaded with a `quantization_config`; load .* without it"):
        model.to_dense()


def test_dense_models_generate(make_model, ids):
    config = VQLogitsConfig(text_config=text_config("llama"), num_codebooks=19)
    model = VQLogitsForCausalLM(config).eval()
    perturb(model)
    nn.init.zeros_(model.lm_head.codebook_bias)
    dense = model.to_dense().model
    assert type(dense) is AutoModelForCausalLM._model_mapping[type(config.text_config)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    given = [
        m.generate(ids, attention_mask=torch.ones_like(ids), **options) for m in (dense, model)
    ]
    assert torch.equal(*given)
