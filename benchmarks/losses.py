"""Training losses of output layers, forward and backward, for the benchmarks of time and memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import GPT2Config

from hf_vqlogits import VQLogitsConfig, VQLogitsHead
from hf_vqlogits.conversion.sizes import DEFAULT_FINE_SHARE

Step = Callable[[], Tensor]


def dense_step(hidden: Tensor, labels: Tensor, vocab_size: int, dtype: torch.dtype) -> Step:
    """A plain layer without bias, its product in `dtype`, the loss of float32 logits."""
    weight = nn.Parameter(0.02 * torch.randn(vocab_size, hidden.shape[1]))

    def step() -> Tensor:
        logits = linear(hidden.to(dtype), weight.to(dtype)).float()
        return _backward(cross_entropy(logits, labels), hidden, weight)

    return step


def adaptive_cutoffs(vocab_size: int) -> list[int]:
    """Ends of the tiers of frequent tokens, in the order of the ids."""
    usual = (2_000, 10_000, 40_000, 200_000)
    return [cutoff for cutoff in usual if cutoff < vocab_size] or [vocab_size // 4]


def adaptive_step(hidden: Tensor, labels: Tensor, vocab_size: int) -> Step:
    """`torch.nn.AdaptiveLogSoftmaxWithLoss`, which computes the tiers of the labels alone."""
    layer = nn.AdaptiveLogSoftmaxWithLoss(hidden.shape[1], vocab_size, adaptive_cutoffs(vocab_size))
    return lambda: _backward(layer(hidden, labels).loss, hidden, *layer.parameters())


def quantised_step(
    hidden: Tensor, labels: Tensor, vocab_size: int, bits: int, dtype: torch.dtype
) -> Step:
    """Ours, its products in `dtype`."""
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=hidden.shape[1], bos_token_id=0, eos_token_id=0
    )
    fine_tokens = int(DEFAULT_FINE_SHARE * vocab_size)  # as the converter makes them
    head = VQLogitsHead(
        VQLogitsConfig(text_config=config, num_codebooks=bits, num_fine_tokens=fine_tokens)
    )

    def step() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = head(hidden, labels)
        return _backward(loss, hidden, head.codebook, head.codebook_bias)

    return step


def steps(
    rows: int, vocab_size: int, hidden_size: int, bits: int, *, seed: int
) -> dict[str, Callable[[], Step]]:
    """What makes each step, by name: hidden states and labels of its own, the same for all.

    Args:
        rows: N.
        vocab_size: V.
        hidden_size: d.
        bits: R.
        seed: of everything random.
    """

    def made(make: Callable[..., Step], *more: object) -> Callable[[], Step]:
        def build() -> Step:
            torch.manual_seed(seed)
            hidden = torch.randn(rows, hidden_size, requires_grad=True)
            return make(hidden, torch.randint(0, vocab_size, (rows,)), vocab_size, *more)

        return build

    return {
        "quantised": made(quantised_step, bits, torch.float32),
        "quantised_bfloat16": made(quantised_step, bits, torch.bfloat16),
        "dense_float32": made(dense_step, torch.float32),
        "dense_bfloat16": made(dense_step, torch.bfloat16),
        "adaptive softmax": made(adaptive_step),
    }


def _backward(loss: Tensor, *leaves: Tensor) -> Tensor:
    """The loss, after its gradients were taken."""
    torch.autograd.grad(loss, leaves)
    return loss.detach()
