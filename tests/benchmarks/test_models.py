import pytest
import torch

from benchmarks.models import dense_model, fit_head, quantised_model
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import choose_size


def test_the_dense_model_gives_the_original_logits(tiny_case):
    model = dense_model(tiny_case.parts).eval()
    ids = tiny_case.evaluation["novels"][:, :-1]
    with torch.no_grad():
        wanted = tiny_case.parts.logits(tiny_case.parts.backbone(ids).last_hidden_state)
        assert torch.equal(model(ids).logits, wanted)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.data_ptr() != tiny_case.parts.weight.data_ptr()


@pytest.mark.parametrize("method", ["signs", "kmeans"])
def test_quantised_models_hold_copies(method, tiny_case):
    quantiser = Quantiser(tiny_case.parts, tiny_case.corpus(), 0)
    statistics = quantiser.calibrate()
    size = choose_size(method, vocab_size=300, hidden_size=32, param_reduction=0.9)
    head = fit_head(quantiser, method, size, statistics)
    assert head.code_type == size.code_type
    assert head.num_codebooks == size.num_codebooks
    model = quantised_model(quantiser, size, head)
    assert torch.equal(model.lm_head.codes, head.codes)
    assert torch.equal(model.lm_head.codebook, head.codebook)
    shared = {t.data_ptr() for t in (*head.parameters(), *tiny_case.parts.backbone.parameters())}
    assert not shared & {t.data_ptr() for t in model.parameters()}


def test_tied_models_have_one_table(tiny_case):
    quantiser = Quantiser(tiny_case.parts, tiny_case.corpus(), 0)
    size = choose_size("signs", vocab_size=300, hidden_size=32, param_reduction=0.9)
    head = fit_head(quantiser, "signs", size, quantiser.calibrate())
    model = quantised_model(quantiser, size, head, embeddings="tied")
    assert model.config.embeddings == "tied"
    assert model.get_input_embeddings().codebook is model.lm_head.codebook
    assert model.get_input_embeddings().codes is model.lm_head.codes
    # The original's is still there for the next model.
    assert isinstance(tiny_case.parts.backbone.get_input_embeddings(), torch.nn.Embedding)
