"""The default device of a model, and its free memory."""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from .errors import UsageError, one_line

CONTROL_GROUP = Path("/sys/fs/cgroup")  # version 2
ORDER = ("cuda", "mps", "xpu")  # tried in this order; the CPU is last


def available_devices() -> list[str]:
    """The kinds of device of this machine, the default first; `cpu` is always the last."""
    is_there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    return [kind for kind in ORDER if is_there[kind]()] + ["cpu"]


def find_device(name: str | None = None) -> torch.device:
    """The device of that name, by default cuda, mps, xpu or cpu: the first of them that this machine has.

    Raises:
        UsageError: there is no such device here.
    """
    here = available_devices()
    try:
        device = torch.device(name or here[0])
    except RuntimeError as error:
        raise UsageError(f"--device {name} cannot be used: {one_line(error).partition('. ')[0]}") from error
    if device.type in ORDER and device.type not in here:
        raise UsageError(f"--device {name}: this machine has no {device.type}, it has {', '.join(here)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {one_line(error)[:200]}") from error
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device can still give, unused ones that torch holds included; None if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "xpu" and hasattr(torch.xpu, "mem_get_info"):
        free, _ = torch.xpu.mem_get_info(device)
        return free + torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    if device.type == "mps":  # shared with the CPU, which may have less left
        left = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return max(min(left, psutil.virtual_memory().available), 0)
    if device.type != "cpu":
        return None
    limit = free_in_container()
    free = psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def free_in_container() -> int | None:
    """Bytes up to the limit of the container that the process runs in; None if there is none."""
    try:
        limit, used = ((CONTROL_GROUP / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text("ascii").splitlines())
        return max(int(limit) - int(used) + int(pages["inactive_file"]), 0)  # the system would give these up
    except (OSError, KeyError, ValueError):  # no such group, or "max"
        return None
