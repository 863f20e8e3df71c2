"""Runs pieces of a GPU check one after the other, each with an alarm; what one finds is written at once."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration
from contenders import rounds_of_prompts, static_task
from measuring import Comparison, copy_bandwidth, environment
from shapes import SHAPES, build_model, bytes_read_per_forward, num_parameters

HERE = Path(__file__).resolve().parent
BLOCK = 16  # tokens denoised together, in every piece

Found = Iterator[tuple[str, dict[str, Any]]]


class Late(BaseException):
    """A piece has had its time. No `Exception`: compilers catch those and go on."""


class Bench:
    """The state that the pieces of a part share.

    Attributes:
        chosen: the command line.
        device, shape, dtype: of the model.
        prompt_length, new_tokens: of the decoding pieces.
        ends_at: when the part has had its time, by `time.monotonic`.
    """

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.device, self.shape = chosen, torch.device(chosen.device), SHAPES[chosen.shape]
        self.on_cuda, self.dtype = self.device.type == "cuda", torch.bfloat16
        self.prompt_length, self.new_tokens = (2048, 256) if self.on_cuda else (64, 48)
        self.began = time.monotonic()
        self.ends_at = self.began + chosen.seconds
        self.comparison = cache(self._comparison)  # kept: the tokens of the first contender are the others' measure

    @cached_property
    def model(self) -> BardVLForConditionalGeneration:
        """Made at its first use; a line says what is read of it in every forward."""
        start = time.monotonic()
        model = build_model(self.shape, self.device, self.dtype, 0)
        seconds, bandwidth = time.monotonic() - start, copy_bandwidth(self.device)
        found = {"seconds": seconds, "parameters": num_parameters(model), "copy_bytes_per_second": bandwidth}
        self.save("model", {**found, "weight_read_ms": 1000 * bytes_read_per_forward(model) / bandwidth})
        return model

    def _comparison(self, lengths: tuple[int, ...], new_tokens: int, steps: int) -> Comparison:
        prompts = rounds_of_prompts(list(lengths), self.shape, 0, self.device)
        return Comparison(prompts, static_task(self.shape, new_tokens, BLOCK, steps))

    def random(self, *size: int) -> torch.Tensor:
        """Noise of the model's dtype."""
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def seconds_left(self, most: float = float("inf")) -> float:
        """The time of a child process: at most the rest of its part, and a little for its results."""
        return max(min(self.ends_at - time.monotonic() - 3, most), 1)

    def save(self, piece: str, found: dict[str, Any]) -> None:
        """Add a line to the results."""
        at = round(time.monotonic() - self.began, 1)
        line = json.dumps({"part": self.chosen.part, "piece": piece, "at_seconds": at, "found": found})
        with (self.chosen.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line[:1200], flush=True)


@dataclass(frozen=True)
class Piece:
    """Of a part: measures, and gives each result with its name as soon as it has it; `seconds` are its most."""

    name: str
    seconds: float
    measure: Callable[[Bench], Found]


def run(chosen: argparse.Namespace, pieces: list[Piece]) -> None:
    """Measure the pieces of a part in their order, each with an alarm of its own."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen)
    shape = {"name": chosen.shape, **asdict(bench.shape)}
    bench.save("environment", {**environment(bench.device), "shape": shape, "dtype": str(bench.dtype)})
    before = signal.signal(signal.SIGALRM, _ring)
    try:
        for piece in pieces:
            _run_piece(bench, piece)
    finally:
        signal.signal(signal.SIGALRM, before)


def _ring(*_: Any) -> None:
    raise Late


def _run_piece(bench: Bench, piece: Piece) -> None:
    left = bench.ends_at - time.monotonic()
    seconds = min(piece.seconds, left)
    if left < 1:
        bench.save(piece.name, {"error": "no time was left"})
        return
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            for name, found in piece.measure(bench):
                bench.save(name, found)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        bench.save(piece.name, {"error": f"stopped after {seconds:.0f} s"})
    except Exception:
        bench.save(piece.name, {"error": traceback.format_exc(limit=-6)})


def run_child(arguments: list[str], log: Path, seconds: float, **variables: str) -> int | str:
    """Run Python on these arguments, its output to a file; its exit code, or that it took too long.

    Whatever the process started ends with it.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=HERE.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
