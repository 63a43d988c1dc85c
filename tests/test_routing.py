"""The auxiliary loss of mixtures of experts."""

import pytest
import torch
from tiny import VOCABULARY, perturb, text_config
from transformers import MixtralForCausalLM

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, routing


def mixture(**fields):
    """A Mixtral and its lossless counterpart, in which every token has a code of its own."""
    torch.manual_seed(0)
    config = text_config("mixtral", tie_word_embeddings=False, **fields)
    original = MixtralForCausalLM(config).eval()
    perturb(original)
    head = {"code_type": "index", "num_codebooks": 1, "codebook_size": VOCABULARY}
    model = VQLogitsForCausalLM(VQLogitsConfig(text_config=config, **head)).eval()
    model.model.backbone.load_state_dict(original.model.state_dict())
    with torch.no_grad():
        model.lm_head.codes.copy_(torch.arange(VOCABULARY)[:, None])
        model.lm_head.codebook.copy_(original.lm_head.weight[None])
        model.lm_head.codebook_bias.zero_()
    return original, model


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_router_loss_of_mixtures_of_experts(ids, by):
    original, model = mixture(output_router_logits=by == "configuration")
    arguments = {"output_router_logits": True} if by == "argument" else {}
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = original(ids, labels=ids, attention_mask=mask, **arguments)
    outputs = model(ids, labels=ids, attention_mask=mask, **arguments)
    assert wanted.aux_loss > 0.1
    torch.testing.assert_close(outputs.aux_loss, wanted.aux_loss)
    torch.testing.assert_close(outputs.loss, wanted.loss, atol=1e-4, rtol=1e-4)
    assert len(outputs.router_logits) == len(wanted.router_logits) == 2
    plain = model(ids, labels=ids, attention_mask=mask, output_router_logits=False)
    assert plain.aux_loss is None
    assert plain.loss < outputs.loss


def test_masks_of_other_shapes_are_ignored(ids):
    _, model = mixture()
    router_logits = model(ids, output_router_logits=True).router_logits
    wanted, factor = routing.router_loss(model.model.backbone, router_logits, None)
    given, _ = routing.router_loss(model.model.backbone, router_logits, torch.ones(2, 1, 7, 7))
    assert torch.equal(given, wanted)
    assert factor == model.config.text_config.router_aux_loss_coef


def test_unknown_families_are_warned_about_once(make_model, ids, caplog):
    routing._warn_once.cache_clear()
    backbone = make_model("llama").model.backbone
    for _ in range(2):
        assert routing.router_loss(backbone, (torch.zeros(14, 4),), None) is None
    assert caplog.text.count("router's auxiliary loss of 'llama' is not known here") == 1
