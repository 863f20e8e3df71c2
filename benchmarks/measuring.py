"""Times, forwards and memory of contenders, taken turn by turn in one run."""

import contextlib
import ctypes
import gc
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import Contender, Decoded
from plain_decoder import Task


@dataclass
class Result:
    """What was measured of one contender on one task.

    Attributes:
        name: of the contender.
        block_size: tokens denoised together.
        steps: denoising steps per block.
        num_prompts: prompts in the task.
        is_batched: whether they were decoded together.
        num_tokens: response tokens, of all prompts.
        forwards: forwards of the language model by kind, for all prompts.
        forwards_to_first_block: those up to the end of each prompt's first block.
        agreement: share of tokens that are those of this engine; None for autoregressive decoding.
        seconds: of whole calls, one a repetition.
        first_block_seconds: of calls that stop after the first block, one a repetition.
        peak_memory_bytes: highest use in a whole call, model included: the allocator's on CUDA, else the process's.
        memory_growth_bytes: by how much that is more than before the call.
        error: why nothing was measured.
    """

    name: str
    block_size: int
    steps: int
    num_prompts: int
    is_batched: bool
    num_tokens: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    forwards_to_first_block: int = 0
    agreement: float | None = None
    seconds: list[float] = field(default_factory=list)
    first_block_seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    error: str | None = None

    def figures(self) -> dict[str, list[float]]:
        """Per repetition: what the raw seconds mean.

        `ms_per_forward`: time after the first block over the forwards in it, deciding included.
        `ms_to_first_block`: one prompt's, or the batch's; the mean over prompts that are decoded one by one.
        `decode_tokens_per_second`: tokens after the first block over the time for them.
        `tokens_per_second`: all tokens over all the time.

        Time after the first block is that of a whole call less that of a call that stops there, run next to each other:
        no streamer disturbs the loop. It means something where it is long against the noise of the two.
        """
        calls = 1 if self.is_batched else self.num_prompts
        forwards = sum(self.forwards.values()) - self.forwards_to_first_block
        tokens = self.num_tokens - self.num_prompts * self.block_size
        pairs = list(zip(self.seconds, self.first_block_seconds, strict=True))
        return {
            "ms_per_forward": [1000 * (whole - first) / forwards for whole, first in pairs],
            "ms_to_first_block": [1000 * first / calls for _, first in pairs],
            "decode_tokens_per_second": [tokens / (whole - first) for whole, first in pairs],
            "tokens_per_second": [self.num_tokens / whole for whole, _ in pairs],
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum and maximum of each figure."""
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in self.figures().items()
        }


def measure(
    contenders: list[Contender],
    prompts: list[torch.Tensor],
    task: Task,
    repetitions: int,
    say: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Warm every contender up and check its tokens, then time them in turns: A B C, A B C, ...

    Raises:
        ValueError: a block-diffusion contender gives, in float32, other tokens than the others.
    """
    results, ready = [], []
    expected: list[list[int]] | None = None
    # The engine first: its tokens are what the others are compared with.
    for contender in sorted(contenders, key=lambda contender: not contender.name.startswith("this engine")):
        say(f"warming up: {contender.name}")
        result = Result(contender.name, task.block_size, task.denoising_steps, len(prompts), contender.is_batched)
        results.append(result)
        try:
            decoded = _warm_up(contender, prompts, task, result)
        except Exception as error:
            if not contender.is_optional:
                raise
            result.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if contender.is_block_diffusion:
            expected = expected or decoded.tokens
            result.agreement = _agreement(contender, decoded, expected)
        ready.append((contender, result))
    for repetition in range(repetitions):
        for contender, result in ready:
            say(f"repetition {repetition + 1}: {contender.name}")
            _measure_once(contender, prompts, task, result)
    order = [contender.name for contender in contenders]
    return sorted(results, key=lambda result: order.index(result.name))


def _warm_up(contender: Contender, prompts: list[torch.Tensor], task: Task, result: Result) -> Decoded:
    """Run as the timed runs do; compilation and the capture of graphs take two rounds."""
    for _ in range(2 if contender.is_optional else 1):
        first = contender.decode(prompts, task, first_block_only=True)
        decoded = contender.decode(prompts, task)
    lengths = {len(tokens) for tokens in decoded.tokens}
    if lengths != {task.max_new_tokens}:
        raise RuntimeError(f"{contender.name} wrote {sorted(lengths)} tokens, not {task.max_new_tokens}")
    result.num_tokens = sum(len(tokens) for tokens in decoded.tokens)
    result.forwards = dict(decoded.forwards)
    result.forwards_to_first_block = sum(first.forwards.values())
    return decoded


def _agreement(contender: Contender, decoded: Decoded, expected: list[list[int]]) -> float:
    mine, theirs = (torch.tensor(tokens) for tokens in (decoded.tokens, expected))
    agreement = (mine == theirs).float().mean().item()
    if agreement < 1 and contender.dtype == torch.float32:
        raise ValueError(
            f"{contender.name} agrees with this engine on {agreement:.1%} of the tokens only: a fault, or a tie that "
            "rounding decided, which is rare in float32; in that case another `--seed` agrees"
        )
    return agreement


def _measure_once(contender: Contender, prompts: list[torch.Tensor], task: Task, result: Result) -> None:
    device = prompts[0].device
    before = reset_peak_memory(device)
    result.seconds.append(seconds_of(lambda: contender.decode(prompts, task), device))
    peak = peak_memory(device)
    result.peak_memory_bytes = max(result.peak_memory_bytes, peak)
    result.memory_growth_bytes = max(result.memory_growth_bytes, peak - before)
    stop = seconds_of(lambda: contender.decode(prompts, task, first_block_only=True), device)
    result.first_block_seconds.append(stop)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a call, its work on the device included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> int:
    """Give back what is free and start a new peak, where the system can; return the bytes now in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or what one decoder freed would hide what the next one takes
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on CUDA, else of the process; since the last reset on Linux, else since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a large copy, the best of several."""
    size = (2**30 if device.type == "cuda" else 2**27) // 4
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bard_vl": importlib.metadata.version("bard-vl"),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
