"""The protocol behind every quality figure: which text fits a head, which one judges it, and how.

- Calibration and training: the first 80% of the lines of WikiText-2's validation text, and 60,000
  tokens of the novels' training files (gpt2-novels: novels only, which its body was trained on;
  what trains it further takes those lines of WikiText-2, [`other_domain`]).
- Evaluation: the last 20% of those lines, and the first 60,000 tokens of the novels' validation
  text (gpt2-novels: novels only). Context and stride 512, 256 for gpt2-novels.
- Figure: exp of the mean over the texts of log(perplexity / dense perplexity).

The texts are read from `--data`: `wikitext2/valid.txt` (the WikiText-2 validation text) and
`novels/{train-0..3-of-4,valid}.txt.gz` (the corpus "100 English novels").
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_vqlogits.conversion.comparison import HeadScore, Logits, compare_heads
from hf_vqlogits.conversion.corpus import Corpus
from hf_vqlogits.conversion.families import SourceParts, take_apart
from hf_vqlogits.conversion.smollm2 import fetch
from hf_vqlogits.conversion.source import load_source
from hf_vqlogits.conversion.streaming import hidden_states
from hf_vqlogits.conversion.text import blocks, load_text, split_lines, tokenize

NOVEL_TOKENS = 60_000
TRAIN_SHARE = 0.8
MODELS = ("smollm2", "gpt2-novels")


@dataclass
class Case:
    """A model with its texts.

    Attributes:
        name: `"smollm2"` or `"gpt2-novels"`.
        parts: the model, taken apart.
        tokenizer: its tokenizer.
        calibration: (rows, context + 1).
        evaluation: (rows, context + 1) of each text, by name.
    """

    name: str
    parts: SourceParts
    tokenizer: PreTrainedTokenizerBase
    calibration: Tensor
    evaluation: dict[str, Tensor]

    def corpus(self) -> Corpus:
        """As the converter wants it."""
        both = torch.cat(list(self.evaluation.values()))
        return Corpus(self.calibration, both, "protocol", "protocol", [])

    def judge(self, heads: Mapping[str, Logits]) -> dict[str, dict[str, HeadScore]]:
        """Score heads on every text: text -> head -> score; `"dense"` is the original."""
        return {
            text: compare_heads(states, self.parts.logits, heads)
            for text, states in self._states.items()
        }

    def hidden(self, text: str) -> Iterator[Tensor]:
        """Hidden states (n, d) of a text by which heads are judged, in batches."""
        return (hidden for hidden, _ in self._states[text])

    @cached_property
    def _states(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Hidden states of every text, for all heads that will be judged."""
        return {
            text: list(hidden_states(self.parts.backbone, ids))
            for text, ids in self.evaluation.items()
        }


def load_case(name: str, data: Path, models: Path, *, quick: bool = False) -> Case:
    """Load a model and the protocol's texts.

    Args:
        name: one of `MODELS`.
        data: folder of the texts.
        models: folder that holds `gpt2-novels/`.
        quick: a twentieth of the text, to see that everything runs.
    """
    share = 20 if quick else 1
    context = 512
    if name == "smollm2":
        file = fetch()
        source = load_source(file.folder, gguf_file=file.file, dtype=torch.float32)
    else:
        source = load_source(models / name, dtype=torch.float32)
        context = 256
    parts, tokenizer = take_apart(source.model), source.tokenizer
    assert tokenizer is not None  # both models bring one
    novels = data / "novels"
    calibration = [
        tokenize(load_text(str(path)), tokenizer, NOVEL_TOKENS // 4 // share)
        for path in sorted(novels.glob("train-*.txt.gz"))
    ]
    valid = load_text(str(novels / "valid.txt.gz"))
    evaluation = {"novels": tokenize(valid, tokenizer, NOVEL_TOKENS // share)}
    if name == "smollm2":
        first, last = _wikitext(data, tokenizer, quick=quick)
        calibration.insert(0, first)
        evaluation = {"wikitext2": last, **evaluation}
    return Case(
        name,
        parts,
        tokenizer,
        torch.cat([blocks(ids, context) for ids in calibration]),
        {text: blocks(ids, context) for text, ids in evaluation.items()},
    )


def other_domain(case: Case, data: Path, *, quick: bool = False) -> Case:
    """The small GPT-2 with text that its body has not learnt, to convert it for and to train on.

    Args:
        case: `"gpt2-novels"`.
        data: folder of the texts.
        quick: 25,000 tokens of it at most.

    Returns:
        The same model, calibrated on the first lines of WikiText-2's validation text, and judged on
        the last ones and on the novels.
    """
    context = case.calibration.shape[1] - 1
    first, last = _wikitext(data, case.tokenizer, quick=quick)
    evaluation = {"wikitext2": blocks(last, context), **case.evaluation}
    return replace(case, calibration=blocks(first, context), evaluation=evaluation)


def _wikitext(
    data: Path, tokenizer: PreTrainedTokenizerBase, *, quick: bool
) -> tuple[Tensor, Tensor]:
    """Tokens of the lines that calibrate, and of those that judge."""
    limit = 10_000_000 // (400 if quick else 1)
    parts = split_lines(load_text(str(data / "wikitext2" / "valid.txt")), TRAIN_SHARE)
    first, last = (tokenize(part, tokenizer, limit) for part in parts)
    return first, last


def factor(scores: Mapping[str, Mapping[str, HeadScore]], head: str) -> float:
    """Exp of the mean over the texts of log(perplexity / dense perplexity)."""
    logs = [by_head[head].nats - by_head["dense"].nats for by_head in scores.values()]
    return math.exp(sum(logs) / len(logs))
