import json

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM

from hf_vqlogits import VQLogitsMixtureHead
from hf_vqlogits.conversion.calibration import CalibrationStatistics
from hf_vqlogits.conversion.cli import main
from hf_vqlogits.conversion.code_training import trainable_head
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation_state import HEAD, save_state
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.families import take_apart
from hf_vqlogits.conversion.mixing import check_mixture, mix
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize

GATE = {"num_mixtures": 2, "gate_activation": "tanh", "gate_temperature": 0.5}


def fitted(family="llama", size=None):
    parts = take_apart(tiny_model(family))
    blocks = torch.randint(3, VOCAB, (300, 17), generator=torch.Generator().manual_seed(1))
    quantiser = Quantiser(parts, Corpus(blocks, blocks, "text", "text", []), seed=0, rereadings=0)
    statistics: CalibrationStatistics = quantiser.calibrate(to_distill=True)
    size = size or HeadSize("sign", 24, 2, num_fine_tokens=5)
    if size.code_type == "sign":
        head = quantiser.sign_heads([size], statistics)[size]
    else:
        head = quantiser.index_head(size, "residual", statistics)
    return quantiser, head, size, statistics


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llama", None),
        ("gemma2", None),  # soft-capped logits
        ("llama", HeadSize("index", 2, 8)),
    ],
)
def test_a_mixture_is_distilled_below_what_one_softmax_reached(family, size):
    quantiser, head, size, statistics = fitted(family, size)
    codes = head.codes.clone()
    made = mix(quantiser, head, size, statistics, distill_steps=40, **GATE)
    told = quantiser.details["mixture"]
    assert isinstance(made, VQLogitsMixtureHead)
    assert (made.gate_activation, made.gate_temperature) == ("tanh", 0.5)
    assert told["kl_after"] < told["kl_before"]
    assert torch.equal(made.codes, codes)
    assert made.gate_slopes.abs().max() > 0
    assert quantiser.seconds["mixture"] > 0


def test_without_steps_components_are_nearly_equal():
    quantiser, head, size, statistics = fitted()
    made = mix(quantiser, head, size, statistics, distill_steps=0, **GATE)
    assert (made.factors - 1).abs().max() < 0.1
    assert "mixture" not in quantiser.details


def test_an_interrupted_distillation_of_the_mixture_goes_on(tmp_path):
    whole, parts = fitted(), fitted()
    options = {"distill_steps": 20, **GATE}
    once = mix(*whole, **options)

    class StopError(Exception):
        pass

    made = 0

    def stop(steps):
        nonlocal made
        made = steps
        if steps > 12:
            raise StopError

    quantiser, head, size, statistics = parts
    save_state(tmp_path / "state", HEAD, "key", {"of": "the head"})
    quantiser._bar = lambda *_: _Bar(stop)
    head_before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(StopError):
        mix(*parts, **options, state_file=tmp_path / "state")
    assert made > 12
    del quantiser._bar
    head.load_state_dict(head_before)
    again = mix(quantiser, head, size, statistics, **options, state_file=tmp_path / "state")
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


class _Bar:
    def __init__(self, advance):
        self.advance = advance

    def __enter__(self):
        return (lambda made, kl: None), self.advance

    def __exit__(self, *_):
        return False


def test_codes_of_a_mixture_are_not_learnt_in_training():
    quantiser, head, size, statistics = fitted()
    made = mix(quantiser, head, size, statistics, distill_steps=0, **GATE)
    with pytest.raises(ConversionError, match="this head is a mixture of 2; learn them before"):
        trainable_head(made)


def test_the_command_writes_a_mixture(tiny_folder, text_file, tmp_path, capsys):
    words = [
        *("--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--bits", "12"),
        *("--calibration-data", str(text_file), "--distill-steps", "6"),
        *("--num-mixtures", "2", "--gate-activation", "gelu", "--gate-temperature", "2.0"),
    ]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a mixture of 2 softmaxes" in printed
    assert "distillation of the mixture: 6 steps" in printed
    stored = json.loads((tmp_path / "out" / "vq_report.json").read_text())
    assert stored["num_mixtures"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.lm_head, VQLogitsMixtureHead)
    assert model.lm_head.gate_temperature == 2.0
    parameters = sum(p.numel() for p in model.lm_head.parameters())
    assert stored["head_after"]["parameters"] == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mixtures": 0}, "`num_mixtures` must be at least 1, got 0"),
        ({"gate_activation": "relu"}, "`gate_activation` must be one of .* got 'relu'"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be positive and finite, got 0"),
        ({"num_mixtures": 1}, "`gate_activation` 'tanh' is of a mixture's gate"),
        (
            {"num_mixtures": 1, "gate_activation": "linear"},
            "`gate_temperature` 0.5 is of a mixture's gate",
        ),
        ({"nested": [0.9, 0.8]}, r"`num_mixtures` 2 does not go with `nested` \[0.9, 0.8\]"),
        ({"refine_top_k": 4}, "`num_mixtures` 2 does not go with `refine_top_k` 4"),
        (
            {"max_perplexity_increase": 0.1},
            "`num_mixtures` 2 does not go with `max_perplexity_increase` 0.1",
        ),
    ],
)
def test_bad_options(options, message):
    others = {"nested": None, "refine_top_k": 0, "max_perplexity_increase": None}
    with pytest.raises(ConversionError, match=message):
        check_mixture(**{**others, **GATE, **options})
