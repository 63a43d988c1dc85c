"""Where and with what a figure was measured."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("hf-vqlogits", "torch", "transformers", "faiss-cpu", "numpy")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on; `more` where installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, and the GPU when `device` is one."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    device = torch.device(device)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
