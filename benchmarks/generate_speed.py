"""Time of whole models that generate, dense and with the quantised head, in turns in one run.

    python -m benchmarks.generate_speed --output benchmarks/results/generate_speed.json

Greedy `generate`, batch 1, bfloat16, a prompt of 32 tokens and 128 new ones; by PyTorch's
operations one by one (`eager`), and compiled with a static cache. Bodies are SmolLM2-135M's and
random ones in the shapes of GPT-2 and Gemma 3 270M; heads have random codes, on which no time
depends. What replacing the output layer can gain at most is t / (t - t_head), t the dense model's
time and t_head what it spends in its output layer, measured in the same run.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedModel,
)

from hf_vqlogits import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsHead
from hf_vqlogits.conversion.families import assemble, take_apart
from hf_vqlogits.conversion.sizes import DEFAULT_FINE_SHARE
from hf_vqlogits.conversion.smollm2 import fetch
from hf_vqlogits.conversion.source import load_source
from hf_vqlogits.conversion.timing import paired_medians

from .record import record, write

PROMPT, NEW_TOKENS = 32, 128
REPEATS = 5


def smollm2() -> PreTrainedModel:
    """The real model."""
    file = fetch()
    return load_source(file.folder, gguf_file=file.file, dtype=torch.bfloat16).model


def random_model(config: Any) -> PreTrainedModel:
    """Random weights of a shape."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def gpt2_shape() -> PreTrainedModel:
    """GPT-2, 124 million parameters."""
    return random_model(GPT2Config())


def gemma_shape() -> PreTrainedModel:
    """Gemma 3 270M, most of which is its table of 262,144 tokens."""
    return random_model(
        Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
        )
    )


CASES: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {  # what makes the body, and R
    "SmolLM2-135M, 98%": (smollm2, 981),
    "GPT-2 shape, 99%": (gpt2_shape, 500),
    "Gemma 3 270M shape, R = 900": (gemma_shape, 900),
}


def quantised(dense: PreTrainedModel, bits: int) -> VQLogitsForCausalLM:
    """The model with a random head around a copy of its body."""
    parts = take_apart(copy.deepcopy(dense))
    config = VQLogitsConfig(
        text_config=copy.deepcopy(parts.config),
        num_codebooks=bits,
        num_fine_tokens=int(DEFAULT_FINE_SHARE * len(parts.weight)),
        logit_scale=parts.transform.scale,
        final_logit_softcapping=parts.transform.softcap,
    )
    return assemble(parts, config, VQLogitsHead(config).to(dense.dtype))


class HeadClock:
    """Counts the seconds that a module spends in its forward."""

    def __init__(self, module: nn.Module):
        self.seconds, self._start = 0.0, 0.0
        self._handles = (
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end),
        )

    def _begin(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _generate(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Greedy, without an end."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


@torch.no_grad()
def measure(
    dense: PreTrainedModel, bits: int, *, compiled: bool, new_tokens: int, seed: int
) -> dict[str, Any]:
    """Median seconds of both models, and how near their ratio is to its bound."""
    torch.manual_seed(seed)
    dense = dense.eval()
    ours = quantised(dense, bits).eval()
    prompt = torch.randint(3, dense.config.get_text_config().vocab_size, (1, PROMPT))
    head: Any = dense.get_output_embeddings()
    clocks = []
    for _ in range(REPEATS):
        clock = HeadClock(head)
        _generate(dense, prompt, new_tokens)
        clock.remove()
        clocks.append(clock.seconds)
    head_seconds = statistics.median(clocks)
    options: dict[str, Any] = {}
    if compiled:
        compilation: Any = CompileConfig()
        compilation._compile_all_devices = True  # else `generate` compiles on accelerators only
        options = {"cache_implementation": "static", "compile_config": compilation}
    models: dict[str, Any] = {"dense": dense, "quantised": ours}
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(_generate, model, prompt, new_tokens, **options)
        for name, model in models.items()
    }
    for name, call in calls.items():
        found = call()
        if found.shape != (1, PROMPT + new_tokens):
            raise ValueError(f"The {name} model generated {tuple(found.shape)} tokens.")
    seconds = paired_medians(calls, torch.device("cpu"), repeats=REPEATS)
    total = seconds["dense"]
    bound, faster = total / max(total - head_seconds, 1e-9), total / seconds["quantised"]
    return {
        "bits": bits,
        "compiled": compiled,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "dense_head_seconds": head_seconds,
        "tokens_per_second": {name: new_tokens / value for name, value in seconds.items()},
        "times_faster": faster,
        "bound": bound,
        "share_of_the_bound": faster / bound,
    }


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--only", choices=CASES, help="one of the models")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="8 new tokens, not compiled")
    p.add_argument("--output", type=Path, required=True)
    options = p.parse_args()
    rows: list[dict[str, Any]] = []
    result = record("generate_speed", quick=options.quick, seed=options.seed, rows=rows)
    new_tokens = 8 if options.quick else NEW_TOKENS
    for name in [options.only] if options.only else CASES:
        make, bits = CASES[name]
        torch.manual_seed(options.seed)
        dense = make()
        for compiled in (False,) if options.quick else (False, True):
            found = measure(
                dense, bits, compiled=compiled, new_tokens=new_tokens, seed=options.seed
            )
            rows.append({"model": name, **found})
            write(result, options.output)
            print(
                f"{name}, {'compiled' if compiled else 'eager'}: "
                f"{found['tokens_per_second']['dense']:.1f} -> "
                f"{found['tokens_per_second']['quantised']:.1f} tokens a second, "
                f"{found['times_faster']:.2f}x of at most {found['bound']:.2f}x "
                f"({found['share_of_the_bound']:.0%} of the bound)"
            )


if __name__ == "__main__":
    main()
