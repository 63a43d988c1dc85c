import pytest
import torch
from transformers import GPT2Config

from benchmarks.peers.dense import bfloat16
from benchmarks.peers.vector_codes import full_precision, half_precision
from hf_vqlogits import VQLogitsConfig, VQLogitsHead


def head(**fields) -> VQLogitsHead:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=12, n_head=2, n_layer=1)
    made = VQLogitsHead(VQLogitsConfig(text_config=config, **fields))
    torch.nn.init.normal_(made.codebook_bias)
    return made


def test_sign_codes_in_half_precision():
    some = head(num_codebooks=19)
    before = some.codebook.clone()
    made = half_precision(some, error=0.5)
    bits = (some.codes[:, torch.arange(19) // 8] >> (torch.arange(19) % 8)) & 1
    signs = 2 * bits.double() - 1
    words = some.codebook.bfloat16().double() * some.score_scale
    torch.testing.assert_close(made.weight.double(), signs @ words, rtol=1e-5, atol=1e-6)
    biases = some.codebook_bias.bfloat16().double() * some.score_scale
    torch.testing.assert_close(made.bias.double(), signs @ biases, rtol=1e-5, atol=1e-6)
    assert made.total_bytes == 50 * 3 + 2 * 19 * 13
    assert made.details["error"] == 0.5
    assert made.details["bits_per_token"] == 19
    assert torch.equal(some.codebook, before)


def test_full_precision_is_what_the_report_counts():
    some = head(num_codebooks=19)
    made = full_precision(some)
    assert made.total_bytes == some.storage()["total_bytes"] == 50 * 3 + 4 * 19 * 13
    torch.testing.assert_close(made.weight, some.to_linear()[0])


@pytest.mark.parametrize(("books", "words", "bits"), [(1, 20, 5), (6, 4, 12)])
def test_index_codes_are_counted_without_gaps(books, words, bits):
    some = head(code_type="index", num_codebooks=books, codebook_size=words)
    assert half_precision(some).total_bytes == -(-50 * bits // 8) + 2 * books * words * 13


def test_dense():
    weight = torch.randn(5, 3)
    made = bfloat16(weight)
    assert made.total_bytes == 30
    assert made.bits_per_weight == 16
    assert torch.equal(made.weight, weight.bfloat16().float())
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(made(hidden), hidden @ made.weight.T)
