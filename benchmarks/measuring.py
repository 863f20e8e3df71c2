"""Times, forwards and memory of contenders, taken turn by turn in one run."""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bard_vl
import torch
import transformers
from contenders import Contender, Decoded, Task


@dataclass
class Result:
    """The measurements of one contender on one task.

    Attributes:
        name: of the contender.
        block_size: tokens denoised together.
        steps: denoising steps per block.
        num_prompts: prompts in the task.
        is_batched: whether they were decoded together.
        num_tokens: response tokens, of all prompts.
        forwards: forwards of the language model by kind, for all prompts.
        forwards_after_first_block: those after the end of each prompt's first block, one number a repetition.
        agreement: share of tokens that are those of this engine; None for autoregressive decoding.
        warm_up_seconds: of the calls before, in turns one that stops after the first block and a whole one.
        seconds: of whole calls, one a repetition.
        first_block_seconds: of calls that stop after the first block, one a repetition.
        peak_memory_bytes: highest use in a whole call, model included: the allocator's on CUDA, else the process's; 0
            for a contender in a process of its own.
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
    forwards_after_first_block: list[int] = field(default_factory=list)
    agreement: float | None = None
    warm_up_seconds: list[float] = field(default_factory=list)
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

        Time after the first block is that of a whole call less that of a call for one block, run next to each other:
        no streamer or criterion disturbs the loop. It means something where it is long against the noise of the two.
        """
        calls = 1 if self.is_batched else self.num_prompts
        tokens = self.num_tokens - self.num_prompts * self.block_size
        after = [whole - first for whole, first in zip(self.seconds, self.first_block_seconds, strict=True)]
        counts = zip(after, self.forwards_after_first_block, strict=True)
        return {
            "ms_per_forward": [1000 * seconds / forwards for seconds, forwards in counts],
            "ms_to_first_block": [1000 * first / calls for first in self.first_block_seconds],
            "decode_tokens_per_second": [tokens / seconds for seconds in after],
            "tokens_per_second": [self.num_tokens / whole for whole in self.seconds],
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum and maximum of each figure."""
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in self.figures().items()
        }

    def record(self) -> dict[str, Any]:
        """The content of a file: the raw numbers, and the figures made of them if there are any."""
        return {**asdict(self), **({"figures": self.figures(), "summary": self.summary()} if self.seconds else {})}


class Comparison:
    """Contenders on one task. A round has prompts of its own: 0, -1, ... warm up, 1, 2, ... are timed."""

    def __init__(self, prompts: Callable[[int], list[torch.Tensor]], task: Task):
        self.prompts, self.task = prompts, task
        self.expected: dict[int, list[list[int]]] = {}  # by round, of the first block-diffusion contender

    def start(self, contender: Contender) -> Result:
        """A result that is still empty."""
        task = self.task
        num_prompts = len(self.prompts(0))
        return Result(contender.name, task.block_size, task.denoising_steps, num_prompts, contender.is_batched)

    def warm_up(self, contender: Contender, result: Result) -> None:
        """Run as the timed runs do, on other prompts.

        Raises:
            RuntimeError: a response is too short.
            ValueError: a block-diffusion contender gives, in float32, other tokens than the first.
        """
        shares = []
        for number in range(0, -contender.num_warm_ups, -1):
            first, whole = self._decode(contender, number)
            result.warm_up_seconds += [first.seconds, whole.seconds]
            result.forwards = dict(whole.forwards)
            result.num_tokens = sum(len(tokens) for tokens in whole.tokens)
            if contender.is_block_diffusion:
                expected = self.expected.setdefault(number, whole.tokens)
                shares.append(_agreement(contender, whole.tokens, expected))
        result.agreement = min(shares, default=None)

    def time(self, contender: Contender, result: Result, number: int) -> None:
        """Add the measurements of one round."""
        device = self.prompts(number)[0].device
        before = reset_peak_memory(device)
        first, whole = self._decode(contender, number)
        result.first_block_seconds.append(first.seconds)
        result.seconds.append(whole.seconds)
        result.forwards_after_first_block.append(whole.forwards.total() - first.forwards.total())
        if not contender.is_in_process:
            return
        peak = peak_memory(device)
        result.peak_memory_bytes = max(result.peak_memory_bytes, peak)
        result.memory_growth_bytes = max(result.memory_growth_bytes, peak - before)

    def _decode(self, contender: Contender, number: int) -> list[Decoded]:
        """A call that stops after the first block, and a whole one."""
        prompts, found = self.prompts(number), []
        for task in (self.task.first_block, self.task):
            synchronise(prompts[0].device)
            start = time.perf_counter()
            decoded = contender.decode(prompts, task)
            synchronise(prompts[0].device)
            decoded.seconds = time.perf_counter() - start
            lengths = {len(tokens) for tokens in decoded.tokens}
            if lengths != {task.max_new_tokens}:
                raise RuntimeError(f"{contender.name} wrote {sorted(lengths)} tokens, not {task.max_new_tokens}")
            found.append(decoded)
        return found


def measure(
    contenders: list[Contender],
    prompts: Callable[[int], list[torch.Tensor]],
    task: Task,
    repetitions: int,
    say: Callable[[str], None] = lambda message: None,
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Warm every contender up and check its tokens, then time them in turns: A B C, A B C, ...

    Args:
        contenders: in the order of the results.
        prompts: of each round, by number.
        task: what to decode.
        repetitions: rounds that are timed.
        say: takes a line before each piece of work.
        keep: takes the results, so far, after each.

    Raises:
        ValueError: a block-diffusion contender gives, in float32, other tokens than the others.
    """
    comparison, ready = Comparison(prompts, task), []
    results = {contender.name: comparison.start(contender) for contender in contenders}
    # The engine first: its tokens are what the others are compared with.
    for contender in sorted(contenders, key=lambda contender: not contender.name.startswith("this engine")):
        say(f"warming up: {contender.name}")
        try:
            comparison.warm_up(contender, results[contender.name])
        except Exception as error:
            if not contender.is_optional:
                raise
            results[contender.name].error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            ready.append(contender)
        keep(list(results.values()))
    for number in range(1, repetitions + 1):
        for contender in ready:
            say(f"repetition {number}: {contender.name}")
            comparison.time(contender, results[contender.name], number)
            keep(list(results.values()))
    return list(results.values())


def _agreement(contender: Contender, found: list[list[int]], expected: list[list[int]]) -> float:
    mine, theirs = (torch.tensor(tokens) for tokens in (found, expected))
    agreement = (mine == theirs).float().mean().item()
    if agreement < 1 and contender.dtype == torch.float32:
        raise ValueError(
            f"{contender.name} agrees with this engine on {agreement:.1%} of the tokens only: a fault, or a tie that "
            "rounding decided, which is rare in float32; in that case another `--seed` agrees"
        )
    return agreement


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


def median_ms(call: Callable[[], Any], device: torch.device, repetitions: int = 20) -> float:
    """Milliseconds of a call after three that warm up: between events on CUDA, else by the clock."""
    for _ in range(3):
        call()
    found = []
    for _ in range(repetitions):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            found.append(1000 * seconds_of(call, device))
    return statistics.median(found)


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph's replay, free of what its launches cost the host; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as far as they are known."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bard_vl": bard_vl.__version__,
        "commit": _commit(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {"triton": _version_of("triton"), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver()}
    return {name: value for name, value in found.items() if value is not None}


def _commit() -> str | None:
    """The commit of the package's checkout, or what BARD_VL_COMMIT says."""
    stated = os.environ.get("BARD_VL_COMMIT")
    folder = str(Path(bard_vl.__file__).resolve().parent)
    head = stated or _output_of("git", "-C", folder, "rev-parse", "--short", "HEAD", "--show-prefix")
    # A folder inside of another checkout has a prefix there, on a second line.
    return None if head is None or "\n" in head else head


def _driver() -> str | None:
    found = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found and found.splitlines()[0]


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
