import copy

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import kl_div, log_softmax

from hf_vqlogits.conversion import end_to_end, streaming
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.distillation_state import HEAD, load_state, save_state
from hf_vqlogits.conversion.embeddings import fit_embedding
from hf_vqlogits.conversion.end_to_end import distill_end_to_end, gradient_of_divergence
from hf_vqlogits.conversion.errors import ConversionError
from hf_vqlogits.conversion.families import assemble, take_apart
from hf_vqlogits.conversion.held_out import split
from hf_vqlogits.conversion.quantise import Quantiser
from hf_vqlogits.conversion.sizes import HeadSize
from hf_vqlogits.conversion.streaming import KeptStates
from hf_vqlogits.embedding import SHARED
from hf_vqlogits.ops import unpack_signs

V, R, FINE = 96, 20, 10


class Setting:
    """A tiny model with both sides quantised by few bits: one's codes for both, or two of them."""

    def __init__(self, mode, family="llama"):
        self.mode = mode
        self.parts = take_apart(tiny_model(family, tie_word_embeddings=mode == "tied"))
        self.backbone = self.parts.backbone
        self.blocks = torch.randint(3, V, (200, 17))
        corpus = Corpus(self.blocks, self.blocks, "text", "text", [])
        self.quantiser = Quantiser(self.parts, corpus, seed=0)
        self.size = HeadSize("sign", R, 2, FINE)
        statistics = self.quantiser.calibrate()
        self.head = self.quantiser.sign_heads([self.size], statistics)[self.size]
        self.embedding = self.quantiser.embedding(mode, self.head, R)
        self.states = KeptStates(self.backbone, self.blocks)

    def distill(self, steps=20, **options):
        return distill_end_to_end(
            self.backbone,
            self.embedding,
            self.head,
            self.states,
            teacher=self.parts.logits,
            steps=steps,
            **options,
        )

    def tensors(self):
        sides = {"head": self.head, "embedding": self.embedding}
        return {
            f"{side}.{name}": tensor.clone()
            for side, module in sides.items()
            for name, tensor in module.state_dict().items()
        }

    def load(self, tensors):
        for side in ("head", "embedding"):
            own = {k.removeprefix(side + "."): v for k, v in tensors.items() if k.startswith(side)}
            getattr(self, side).load_state_dict(own)


@pytest.fixture(params=["tied", "vq"])
def setting(request, monkeypatch):
    for module in (end_to_end, streaming):
        monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    return Setting(request.param)


def reference_kl(setting, rows, head, embedding, tensors):
    """Mean KL (float64) by plain autograd through a dense model of the given codebooks."""
    codebook, bias, own, offset = tensors

    def levels(layer):
        signs = unpack_signs(layer.codes, R, dtype=torch.float64)
        if layer.fine_ids is not None:
            fine = unpack_signs(layer.fine_codes, R, dtype=torch.float64)
            signs = signs.index_add(0, layer.fine_ids.long(), fine / 2)
        return layer.score_scale * signs

    backbone = copy.deepcopy(setting.backbone).double()
    ids, weight = setting.blocks[rows, :-1], setting.parts.weight.double()
    wanted = backbone(ids).last_hidden_state @ weight.T
    table = levels(embedding) @ own + offset
    hidden = backbone(inputs_embeds=table[ids], use_cache=False).last_hidden_state
    logits = hidden @ (levels(head) @ codebook).T + levels(head) @ bias
    p, q = log_softmax(wanted, -1).flatten(0, 1), log_softmax(logits, -1).flatten(0, 1)
    return kl_div(q, p, reduction="batchmean", log_target=True)


def test_gradient_in_chunks_against_autograd_in_float64(setting, monkeypatch):
    monkeypatch.setattr(end_to_end, "CHUNK_BYTES", 7 * 4 * V)  # 7 rows of 48, and 6 in the last
    rows, head, embedding = torch.arange(3), setting.head, setting.embedding
    hidden = end_to_end._Student(setting.backbone, embedding)(setting.blocks[rows, :-1])
    wanted = torch.cat([*setting.states(rows)])
    hidden.backward(gradient_of_divergence(head, setting.parts.logits, hidden, wanted))

    names = ("codebook", "codebook_bias")
    exact = [getattr(head, n).detach().double().requires_grad_() for n in names]
    own = exact[0] if setting.mode == "tied" else embedding.codebook.detach().double()
    exact += [own.requires_grad_(), embedding.offset.detach().double().requires_grad_()]
    reference_kl(setting, rows, head, embedding, exact).backward()
    trained = [head.codebook, head.codebook_bias, embedding.codebook, embedding.offset]
    for parameter, tensor in zip(trained, exact, strict=True):
        largest = tensor.grad.abs().max()
        assert largest > 0
        torch.testing.assert_close(
            parameter.grad.double(), tensor.grad, atol=2e-3 * float(largest), rtol=0
        )


def test_the_judge_measures_and_the_teacher_teaches(setting):
    plain = setting.distill(2, learning_rate=1e-9)
    other = setting.distill(2, learning_rate=1e-9, judge=lambda h: 5 * setting.parts.logits(h))
    assert abs(other.kl_before - plain.kl_before) > 1e-3


def test_divergence_falls_on_text_kept_out_and_the_body_stays(setting):
    backbone = setting.backbone
    first = next(backbone.parameters()).requires_grad_(False)
    body = {k: v.clone() for k, v in backbone.state_dict().items()}
    with torch.no_grad():  # a fit leaves little to be gained where the text is random
        setting.embedding.codebook *= 0.9
        setting.embedding.offset += 0.1 * torch.randn(32)
        setting.head.codebook_bias += 0.1 * torch.randn(R)
    before = setting.tensors()
    done = setting.distill(40, learning_rate=0.05)
    assert done.kl_after < 0.8 * done.kl_before
    assert (done.steps, done.stopped) == (40, None)
    assert all(torch.equal(v, body[k]) for k, v in backbone.state_dict().items())
    assert not first.requires_grad
    assert all(p.requires_grad for p in backbone.parameters() if p is not first)
    assert all(p.grad is None for p in backbone.parameters())
    assert not backbone.get_input_embeddings()._forward_hooks
    changed = {k for k, v in setting.tensors().items() if not torch.equal(v, before[k])}
    assert changed == {
        "head.codebook",
        "head.codebook_bias",
        "embedding.codebook",
        "embedding.offset",
    }
    tied = [getattr(setting.head, name) is getattr(setting.embedding, name) for name in SHARED]
    assert all(tied) if setting.mode == "tied" else not any(tied[:2])


def test_what_is_told_is_the_divergence_of_the_model_that_is_kept(setting):
    """Against the converted model beside the original, both as a user would run them."""
    told, advanced = [], []
    done = setting.distill(
        20, notify=lambda made, kl: told.append((made, kl)), advance=advanced.append
    )
    assert told == done.history
    assert advanced == list(range(1, 21))
    assert done.kl_before == told[0][1]
    assert done.kl_after == min(kl for _, kl in told)
    held, _ = split(setting.blocks, 20, 0)
    ids, fields = setting.blocks[held, :-1], {"embeddings": setting.mode}
    if setting.mode == "vq":
        fields["embedding_codebooks"] = R
    with torch.no_grad():
        p = log_softmax(setting.parts.logits(setting.backbone(ids).last_hidden_state).double(), -1)
        config = setting.quantiser.config(setting.size, **fields)
        model = assemble(setting.parts, config, setting.head, setting.embedding)
        q = log_softmax(model(ids).logits.double(), -1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert done.kl_after == pytest.approx(expected, rel=1e-3)


def test_training_that_diverges_stops_with_the_best(setting):
    before = setting.tensors()
    done = setting.distill(20, learning_rate=1e4)
    assert done.stopped.startswith("the divergence rose from")
    assert done.steps < 20
    assert done.kl_after == done.kl_before
    assert all(torch.equal(v, before[k]) for k, v in setting.tensors().items())


class Interrupt(Exception):
    """Raised in the place of Ctrl-C."""


@pytest.mark.parametrize("after", [0, 4, 12, 20])
def test_an_interrupted_run_goes_on_to_the_same_codebooks(setting, tmp_path, after):
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
    assert all(p.requires_grad for p in setting.backbone.parameters())
    assert not setting.backbone.get_input_embeddings()._forward_hooks
    setting.load(start)
    assert setting.distill(20, state_file=file) == whole
    assert all(torch.equal(v, wanted[k]) for k, v in setting.tensors().items())
    assert load_state(file, HEAD, "key") == {"of": "the head"}
    setting.load(start)
    with pytest.raises(ConversionError, match="is of another distillation"):
        setting.distill(21, state_file=file)


def test_the_seed_decides_the_order_of_the_text(setting):
    start, results = setting.tensors(), []
    for seed in (7, 7, 8):
        setting.load(start)
        setting.distill(5, seed=seed, learning_rate=0.01)
        results.append(setting.tensors()["embedding.codebook"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "family",
    ["gpt2", "llama", "gemma3_text", "opt", "bloom", "mixtral", "mamba", "recurrent_gemma"],
)
def test_families_in_bfloat16_where_that_is_fast(family, monkeypatch):
    """The student's body in autocast loses to float32 no more than roundings."""
    states = {}
    parts = take_apart(tiny_model(family))
    dense, ids = parts.backbone.get_input_embeddings(), torch.randint(3, V, (4, 16))
    weights, information = torch.full((V,), 1 / V), torch.eye(dense.embedding_dim)
    embedding, _ = fit_embedding(dense, weights, information, num_codebooks=R)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(end_to_end, "product_dtype", lambda device, dtype=dtype: dtype)
        states[dtype] = end_to_end._Student(parts.backbone, embedding)(ids)
        assert states[dtype].dtype == torch.float32
    embedding.zero_grad()
    states[torch.bfloat16].square().mean().backward()
    assert embedding.codebook.grad.abs().max() > 0
    exact = states[torch.float32]
    assert (states[torch.bfloat16] - exact).norm() < 0.3 * exact.norm()
    assert not torch.equal(states[torch.bfloat16], exact)
    assert not dense._forward_hooks


def test_too_little_text(setting):
    setting.states = KeptStates(setting.backbone, setting.blocks[:10])
    with pytest.raises(ConversionError, match=r"needs at least .* there are 170; .*`input_distill"):
        setting.distill(1)
