"""Perplexity as a metric of the `evaluate` library, in its own file so that `evaluate.load` can."""

from pathlib import Path

import evaluate

FOLDER = Path(__file__).parent


def load_metric(**options: object) -> evaluate.Metric:
    """Load the metric from the installed package, without a network.

    The same as `evaluate.load(str(FOLDER))`.

    Args:
        options: passed to `evaluate.load`, `keep_in_memory=True` for example.

    Returns:
        A metric; see [`perplexity.Perplexity`].
    """
    return evaluate.load(str(FOLDER), **options)
