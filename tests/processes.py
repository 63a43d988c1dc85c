"""Processes on one machine that train together (gloo)."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = 2


def results_of(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)`, a function of a module, returns in each process; they end with the test.

    Args:
        work: what a process does; its result is one that `torch.load` reads safely.
        folder: an empty one.
    """
    torch.multiprocessing.spawn(_enter, (work, str(folder)), nprocs=PROCESSES, daemon=True)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(PROCESSES)]


def _enter(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=2),
    )
    torch.save(work(rank), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()
