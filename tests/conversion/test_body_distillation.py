"""Training of the whole model: `distill_body`, `trained_body` and the converter's option."""

import copy
import json

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from hf_vqlogits.conversion import convert_to_vq, end_to_end, streaming
from hf_vqlogits.conversion.cli import main
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation_state import HEAD, save_state
from hf_vqlogits.conversion.end_to_end import distill_body
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.evaluation import perplexity
from hf_vqlogits.conversion.families import assemble, take_apart
from hf_vqlogits.conversion.held_out import split
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize
from hf_vqlogits.conversion.text import split_lines, tokenize

V, R, FINE = 96, 12, 10


class Setting:
    """A tiny model with a head of few bits, and a copy of its body to be trained."""

    def __init__(self, mode="keep", family="llama"):
        self.mode = mode
        self.parts = take_apart(tiny_model(family, tie_word_embeddings=mode == "tied"))
        self.blocks = torch.randint(3, V, (200, 17), generator=torch.Generator().manual_seed(1))
        corpus = Corpus(self.blocks, self.blocks, "text", "text", [])
        self.quantiser = Quantiser(self.parts, corpus, seed=0, rereadings=0)
        self.size = HeadSize("sign", R, 2, FINE)
        statistics = self.quantiser.calibrate(to_distill=True)
        self.head = self.quantiser.sign_heads([self.size], statistics)[self.size]
        self.embedding = None
        if mode != "keep":
            self.embedding = self.quantiser.embedding(mode, self.head, R)
        self.body = copy.deepcopy(self.parts.backbone).float()
        if self.embedding is not None:
            self.body.set_input_embeddings(self.embedding)

    @torch.no_grad()
    def damage(self):
        """Give the body something to learn, which text without order does not."""
        generator = torch.Generator().manual_seed(2)
        for layer in self.body.layers.parameters():
            layer += 0.3 * layer.std() * torch.randn(layer.shape, generator=generator)

    def distill(self, steps=20, **options):
        return distill_body(
            self.body,
            self.head,
            self.quantiser.states,
            teacher=self.parts.logits,
            steps=steps,
            **options,
        )

    def tensors(self):
        sides = {"head": self.head, "body": self.body}
        return {
            f"{side}.{name}": tensor.clone()
            for side, module in sides.items()
            for name, tensor in module.state_dict().items()
        }

    def load(self, tensors):
        for side, module in (("head.", self.head), ("body.", self.body)):
            own = {k.removeprefix(side): v for k, v in tensors.items() if k.startswith(side)}
            module.load_state_dict(own)


@pytest.fixture(params=["keep", "tied", "vq"])
def setting(request, monkeypatch):
    for module in (end_to_end, streaming):
        monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    return Setting(request.param)


def test_body_and_codebooks_learn_what_codes_and_a_dense_embedding_do_not(setting):
    original = {k: v.clone() for k, v in setting.parts.backbone.state_dict().items()}
    setting.damage()
    before = setting.tensors()
    done = setting.distill(60, learning_rate=0.02)
    assert done.kl_after < 0.9 * done.kl_before
    assert (done.steps, done.stopped) == (60, None)
    assert all(torch.equal(v, original[k]) for k, v in setting.parts.backbone.state_dict().items())
    changed = {k for k, v in setting.tensors().items() if not torch.equal(v, before[k])}
    assert "body.layers.0.mlp.up_proj.weight" in changed
    assert "body.norm.weight" in changed
    assert {"head.codebook", "head.codebook_bias"} <= changed
    assert not {name for name in changed if "codes" in name or "fine_ids" in name}
    assert "body.embed_tokens.weight" not in changed
    if setting.embedding is not None:
        assert {"body.embed_tokens.codebook", "body.embed_tokens.offset"} <= changed
        shared = setting.head.codebook is setting.embedding.codebook
        assert shared == (setting.mode == "tied")
    assert all(p.requires_grad for p in setting.body.parameters())


def test_the_body_wins_what_the_head_alone_cannot(monkeypatch):
    for module in (end_to_end, streaming):
        monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    whole, alone = Setting(), Setting()
    for one in (whole, alone):
        one.damage()
    done = whole.distill(60, learning_rate=0.02)
    head_only = alone.distill(60, learning_rate=0.0)
    assert done.kl_before == head_only.kl_before
    assert done.kl_after < 0.95 * head_only.kl_after


def test_what_is_told_is_the_divergence_of_the_model_that_is_kept(setting):
    """Against the converted model beside the original, both as a user would run them."""
    told, advanced = [], []
    done = setting.distill(
        20, notify=lambda made, kl: told.append((made, kl)), advance=advanced.append
    )
    assert told == done.history
    assert advanced == list(range(1, 21))
    assert done.kl_after == min(kl for _, kl in told)
    held, _ = split(setting.blocks, 20, 0)
    ids, fields = setting.blocks[held, :-1], {"embeddings": setting.mode}
    if setting.mode == "vq":
        fields["embedding_codebooks"] = R
    with torch.no_grad():
        hidden = setting.parts.backbone(ids).last_hidden_state
        p = log_softmax(setting.parts.logits(hidden).double(), -1)
        config = setting.quantiser.config(setting.size, **fields)
        setting.parts.backbone = setting.body
        model = assemble(setting.parts, config, setting.head, setting.embedding)
        q = log_softmax(model(ids).logits.double(), -1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert done.kl_after == pytest.approx(expected, rel=1e-3)


def test_training_that_diverges_stops_with_the_best(setting):
    before = setting.tensors()
    done = setting.distill(20, learning_rate=1e4)
    assert done.stopped.startswith("the divergence rose from")
    assert done.kl_after == done.kl_before
    assert all(torch.equal(v, before[k]) for k, v in setting.tensors().items())


class Interrupt(Exception):
    """Raised in the place of Ctrl-C."""


@pytest.mark.parametrize("after", [0, 12])
def test_an_interrupted_run_goes_on_to_the_same_model(setting, tmp_path, after):
    start, file = setting.tensors(), tmp_path / "state"
    whole = setting.distill(20)
    wanted = setting.tensors()
    setting.load(start)
    save_state(file, HEAD, "key", {"of": "the head"})

    def interrupt(made, kl):
        if made >= after:
            raise Interrupt

    with pytest.raises(Interrupt, match="^$"):
        setting.distill(20, state_file=file, notify=interrupt)
    setting.load(start)
    assert setting.distill(20, state_file=file) == whole
    assert all(torch.equal(v, wanted[k]) for k, v in setting.tensors().items())
    setting.load(start)
    with pytest.raises(ConversionError, match="is of another distillation"):
        setting.distill(21, state_file=file)


@pytest.mark.parametrize(
    "family", ["gpt2", "gemma3_text", "opt", "bloom", "mixtral", "mamba", "recurrent_gemma"]
)
def test_families(family):
    setting = Setting(family=family)
    done = setting.distill(10)
    assert done.kl_after <= done.kl_before
    assert done.stopped is None


def test_a_trained_body_is_a_copy_in_the_type_of_the_original():
    setting = Setting("vq")
    inverse = setting.parts.backbone.rotary_emb.inv_freq.clone()
    for parameter in setting.parts.backbone.parameters():  # as a model is loaded
        parameter.data = parameter.data.bfloat16()
    body = setting.quantiser.trained_body(setting.head, setting.embedding, 3)
    assert body is not setting.parts.backbone
    assert body.get_input_embeddings() is setting.embedding
    assert setting.parts.backbone.get_input_embeddings() is not setting.embedding
    assert {p.dtype for p in body.layers.parameters()} == {torch.bfloat16}
    assert torch.equal(body.rotary_emb.inv_freq, inverse)
    assert body.rotary_emb.inv_freq.dtype == torch.float32
    assert setting.quantiser.details["body"]["steps"] == 3


@pytest.mark.parametrize("embeddings", ["keep", "tied"])
def test_the_command_trains_the_whole_model(
    embeddings, tiny_folder, text_file, text, tokenizer, tmp_path, capsys
):
    words = [
        *("--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--bits", "6"),
        *("--calibration-data", str(text_file), "--embeddings", embeddings),
        *("--distill-steps", "0", "--body-distill-steps", "30"),
        *("--distill-state", str(tmp_path / "state")),
    ]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "whole-model distillation: 30 steps; divergence from the original model" in printed
    assert not (tmp_path / "state").exists()
    stored = json.loads((tmp_path / "out" / "vq_report.json").read_text())
    assert "head_alone" not in stored["perplexity"]
    assert "its body too, trained by distillation" in (tmp_path / "out" / "README.md").read_text()
    assert stored["fit"]["body"]["kl_after"] < stored["fit"]["body"]["kl_before"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source = AutoModelForCausalLM.from_pretrained(tiny_folder).transformer.state_dict()
    trained = model.model.backbone.state_dict()
    assert not torch.equal(trained["h.0.mlp.c_fc.weight"], source["h.0.mlp.c_fc.weight"])
    held_out = tokenize(split_lines(text, 0.8)[1], tokenizer, 25_000)
    measured = perplexity(model, held_out, context=64)
    assert stored["perplexity"]["after"] == pytest.approx(measured.perplexity, rel=0.01)


def test_a_loaded_model_is_left_as_it_is(tiny_folder, tokenizer, text_file):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = convert_to_vq(
        model, tokenizer=tokenizer, calibration_data=text_file, bits=6, body_distill_steps=3
    )
    assert all(torch.equal(tensor, before[k]) for k, tensor in model.state_dict().items())
    assert report.model.model.backbone is not model.transformer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"body_distill_steps": -1}, "`body_distill_steps` must be at least 0, got -1"),
        ({"nested": [0.9, 0.8]}, r"`body_distill_steps` 4 does not go with `nested` \[0.9, 0.8\]"),
        ({"refine_top_k": 4}, "`body_distill_steps` 4 does not go with `refine_top_k` 4"),
        (
            {"max_perplexity_increase": 0.1},
            "`body_distill_steps` 4 does not go with `max_perplexity_increase` 0.1",
        ),
        ({"calibration_tokens": 200}, "needs at least .*`body_distill_steps` 0"),
    ],
)
def test_bad_options(options, message, tiny_folder, text_file):
    options = {"body_distill_steps": 4, "calibration_data": str(text_file), **options}
    with pytest.raises(ConversionError, match=message):
        convert_to_vq(tiny_folder, **options)
