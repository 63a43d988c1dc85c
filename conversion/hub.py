"""Doing without the hub where it does not answer, and finding that out quickly."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import huggingface_hub.constants
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

SECONDS = 4.0


def hub_answers(dataset: str, seconds: float = SECONDS) -> bool:
    """Whether the hub answers a question about a data set in time; a refusal is an answer, too.

    Neither the caller nor the end of the process waits longer, be it for a hub that is silent or
    for its address.

    Args:
        dataset: name of the data set.
        seconds: how long to wait at most.
    """
    answers: list[bool] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(dataset, timeout=seconds)
        except HfHubHTTPError:
            pass
        except Exception:  # no connection, or something else than the hub at its address
            return
        answers.append(True)

    # In a thread, since the request's own limit holds anew for each address of the hub, and not at
    # all while these are looked up. A daemon, as Python waits for the end of any other (and for a
    # pool's) before it ends itself.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


@contextmanager
def offline_unless_answered(dataset: str) -> Iterator[bool]:
    """Within this, where the hub does not answer, data sets come from the local cache or fail.

    The `datasets` library by itself would try again for some 20 seconds first. It is told as
    `HF_HUB_OFFLINE` would tell it, which it reads only once: by flags of the whole process, so
    other threads are offline meanwhile, too. Where it is offline already, the hub is not asked.

    Args:
        dataset: the one wanted.

    Yields:
        Whether the hub was asked and did not answer within `SECONDS`.
    """
    import datasets.config

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    silent = not any(before) and not hub_answers(dataset)
    try:
        if silent or any(before):
            for module in modules:
                module.HF_HUB_OFFLINE = True
        yield silent
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
