import pytest
import torch
from transformers import GPT2Config, GPT2Model

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.distillation import distill, held_out_kl
from hf_vqlogits.conversion.errors import ConversionError


@pytest.fixture
def setting():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    backbone = GPT2Model(config).eval()
    head = VQLogitsHead(VQLogitsConfig(text_config=config, num_codebooks=24))
    weight = torch.randn(60, 16)
    return head, backbone, (lambda h: h @ weight.T), torch.randint(0, 60, (300, 17))


def test_divergence_falls_and_the_body_and_codes_stay(setting):
    head, backbone, teacher, blocks = setting
    codes = head.codes.clone()
    body = {k: v.clone() for k, v in backbone.state_dict().items()}
    done = distill(head, backbone, teacher=teacher, blocks=blocks, steps=40, learning_rate=0.1)
    assert done.kl_after < 0.9 * done.kl_before
    assert torch.equal(head.codes, codes)
    assert all(torch.equal(v, body[k]) for k, v in backbone.state_dict().items())


def test_the_best_head_is_kept_when_training_diverges(setting):
    head, backbone, teacher, blocks = setting
    done = distill(head, backbone, teacher=teacher, blocks=blocks, steps=5, learning_rate=1e4)
    assert done.kl_after <= done.kl_before
    held = blocks[-60:]
    assert held_out_kl(head, backbone, teacher, held) == pytest.approx(done.kl_after, rel=1e-3)


def test_the_same_seed_gives_the_same_head(setting):
    head, backbone, teacher, blocks = setting
    start = {k: v.clone() for k, v in head.state_dict().items()}
    results = []
    for _ in range(2):
        head.load_state_dict(start)
        distill(head, backbone, teacher=teacher, blocks=blocks, steps=5, seed=7)
        results.append(head.codebook.detach().clone())
    assert torch.equal(*results)


def test_divergence_against_a_float64_reference(setting):
    head, backbone, teacher, blocks = setting
    with torch.no_grad():
        hidden = backbone(blocks[:3, :-1]).last_hidden_state.float().flatten(0, 1)
    weight, bias = (t.double() for t in head.to_linear())
    p = torch.log_softmax(teacher(hidden).double(), -1)
    q = torch.log_softmax(hidden.double() @ weight.T + bias, -1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert held_out_kl(head, backbone, teacher, blocks[:3]) == pytest.approx(expected, rel=1e-3)


def test_too_little_text(setting):
    head, backbone, teacher, blocks = setting
    with pytest.raises(ConversionError, match=r"needs at least 1,105 tokens .* there are 170"):
        distill(head, backbone, teacher=teacher, blocks=blocks[:10], steps=1)
