"""A tiny random model with a text, in the form that the benchmarks take."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.protocol import Case
from hf_vqlogits.conversion.families import take_apart

VOCAB, USED, WIDTH, CONTEXT = 300, 40, 32, 16


@pytest.fixture
def tiny_case():
    """Text that a few steps of training can learn something of: few tokens, in a fixed order."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    start = torch.randint(0, USED, (120, 1))
    ids = (start + torch.arange(CONTEXT + 1)) % USED
    return Case("gpt2-novels", take_apart(model), None, ids[:110], {"novels": ids[110:]})
