import pytest
import torch
from tiny_models import tiny_model

from hf_vqlogits.conversion import quantise
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation import Distillation
from hf_vqlogits.conversion.families import take_apart
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


@pytest.mark.parametrize(
    ("code_type", "options", "learnt"),
    [("sign", {}, True), ("sign", {"learn_codes": False}, False), ("index", {}, False)],
)
def test_codes_of_signs_are_learnt_in_the_metric_of_the_fit(
    code_type, options, learnt, monkeypatch
):
    parts = take_apart(tiny_model("llama"))
    blocks = torch.randint(3, 96, (40, 9))
    quantiser = Quantiser(parts, Corpus(blocks, blocks, "text", "text", []), seed=3)
    statistics = quantiser.calibrate(keep_states=True)
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
    assert (given["steps"], given["seed"]) == (5, 3)
    assert quantiser.details["distillation"]["kl_after"] == 0.1
