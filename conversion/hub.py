"""Doing without the hub where it does not answer, and finding that out quickly."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import huggingface_hub.constants
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

SECONDS = 4.0


def hub_answers(dataset: str, seconds: float = SECONDS) -> bool:
    """Whether the hub answers a question about a data set in time; a refusal is an answer, too.

    Args:
        dataset: name of the data set.
        seconds: how long to wait at most.
    """
    # In a thread, since the request's own limit holds anew for each address of the hub, and not at
    # all while these are looked up.
    pool = ThreadPoolExecutor(1)
    question = pool.submit(HfApi().dataset_info, dataset, timeout=seconds)
    pool.shutdown(wait=False)
    if question not in wait([question], seconds).done:
        return False
    return question.exception() is None or isinstance(question.exception(), HfHubHTTPError)


@contextmanager
def offline_unless_answered(dataset: str) -> Iterator[None]:
    """Within this, where the hub does not answer, data sets come from the local cache or fail.

    The `datasets` library by itself would try again for some 20 seconds first. It is told as
    `HF_HUB_OFFLINE` would tell it, which it reads only once.

    Args:
        dataset: the one wanted.
    """
    import datasets.config

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not hub_answers(dataset):
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
