"""Perplexity of any causal language model, by token and by word, as a metric of `evaluate`.

`evaluate.load` copies this file into its cache and runs it from there, hence absolute imports
only, and no class of `evaluate` among this module's names but the metric itself, since the first
one found is taken.
"""

import datasets
import evaluate

from hf_vqlogits.conversion.evaluation import exp, perplexity
from hf_vqlogits.conversion.text import prefix_ids, tokenize

DESCRIPTION = """
Perplexity of a causal language model: exp of the mean negative log-likelihood of a text's tokens,
each predicted from those before it. By word, the same nats are shared out among the words
(separated by white space), so that models with different tokenizers can be compared.
"""
INPUTS = """
Args:
    predictions (list of str): texts; each is scored on its own.
    model: a loaded causal language model of Transformers.
    tokenizer: its tokenizer. What it puts before every text by default, `<bos>` for example,
        begins every window and is not scored; no other special tokens are added.
    context (int): positions of a window, `<bos>` included, at most what the model takes.
        Default 512.
    stride (int): tokens between the beginnings of windows. The smaller, the more context each token
        has, and the longer it takes. Default: context, less `<bos>`.
    batch_size (int): windows at a time. Default 4.

Returns:
    perplexity (float): by token, over all texts; the first token of a text is not scored.
    word_perplexity (float): by word.
    nats_per_token (float): log of perplexity.
    tokens (int): tokens scored.
    words (int): words of the texts.
"""


class Perplexity(evaluate.Metric):
    """The metric; see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self, predictions, *, model, tokenizer, context=512, stride=None, batch_size=4
    ) -> dict[str, float | int]:
        nats, tokens, words = 0.0, 0, 0
        options = {"context": context, "stride": stride, "batch_size": batch_size}
        options["prefix"] = prefix_ids(tokenizer)
        for number, text in enumerate(predictions):
            ids = tokenize(text, tokenizer)
            if len(ids) < 2:
                raise ValueError(
                    f"`predictions[{number}]` has {len(ids)} tokens; the first of a text is not "
                    "scored, so at least two are needed. Leave such texts out."
                )
            score = perplexity(model, ids, **options)
            nats += score.nats
            tokens += score.tokens
            words += len(text.split())
        if not words:
            raise ValueError("`predictions` has no words in it; give at least one text.")
        return {
            "perplexity": exp(nats / tokens),
            "word_perplexity": exp(nats / words),
            "nats_per_token": nats / tokens,
            "tokens": tokens,
            "words": words,
        }
