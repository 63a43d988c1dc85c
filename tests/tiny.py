"""Tiny backbones and float64 references shared by the tests."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hf_vqlogits import VQLogitsHead

VOCABULARY = 61
WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 8},
    "mamba": {"state_size": 4},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
}


def text_config(family: str, **fields: Any) -> PreTrainedConfig:
    """Configuration of a tiny backbone."""
    return AutoConfig.for_model(family, **(WIDTHS | OTHER_FIELDS.get(family, {}) | fields))


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every tensor off its initial value, so that no reload passes by initialising anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for head in (m for m in model.modules() if isinstance(m, VQLogitsHead)):
        # Logits that differ by several nats: ties and rounding must not decide what is generated.
        head.codebook.normal_(generator=generator)
        head.codebook.div_(head.score_scale * head.num_codebooks**0.5)
        head.codebook_bias.normal_(0, 0.1 / head.score_scale, generator=generator)
        for tensor in (head.hidden_mean, head.fold_direction):
            tensor.normal_(0, 0.1, generator=generator)


def dense_weight(head: VQLogitsHead) -> tuple[Tensor, Tensor]:
    """Weight (V, d) and bias (V,) that the codes stand for, in float64 and written out plainly."""
    codes = head.codes.cpu().numpy()
    codebook = head.codebook.detach().double().cpu()
    columns = torch.cat([codebook, head.codebook_bias.detach().double().cpu()[..., None]], -1)
    columns = columns * head.score_scale
    if head.code_type == "sign":
        bits = np.unpackbits(codes, axis=1, count=head.num_codebooks, bitorder="little")
        signs = bits * 2.0 - 1.0
        if head.fine_ids is not None:
            fine = head.fine_codes.cpu().numpy()
            bits = np.unpackbits(fine, axis=1, count=head.num_codebooks, bitorder="little")
            signs[head.fine_ids.cpu().numpy()] += bits - 0.5
        dense = torch.from_numpy(signs) @ columns
    else:
        dense = torch.stack([sum(columns[g, c] for g, c in enumerate(row)) for row in codes])
    return dense[:, :-1], dense[:, -1]


def reference_logits(head: VQLogitsHead, hidden: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., d) in float64."""
    weight, bias = dense_weight(head)
    logits = (hidden.detach().double().cpu() @ weight.T + bias) * head.logit_scale
    cap = head.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)
