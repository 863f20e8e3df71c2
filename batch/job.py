"""A run: the pipeline on Ray Data, its progress, and how it ends."""

import contextlib
import functools
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..app.errors import UsageError
from .answers import Answers
from .requests import Inventory, Piece, open_requests, take_stock
from .workers import ENGINES, Recipe

FAILED = 3  # exit code of a run that ended, with errors among its answers
STARTS = 3  # of Ray on this machine
ADVICE = "Failed to apply UDF transform"  # what Ray Data puts behind a message
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Plan:
    """The layout of a run.

    Attributes:
        batch_size: requests decoded together.
        num_workers: processes with the model; None for one per GPU.
        address: of a Ray cluster; None for this machine.
    """

    batch_size: int = 8
    num_workers: int | None = None
    address: str | None = None


def run_batch(
    source: list[Piece],
    output: str,
    recipe: Recipe,
    plan: Plan,
    retry_errors: bool = False,
    is_quiet: bool = False,
) -> int:
    """Answer what is left of an input, and complete the output when all is there; the exit code.

    Args:
        source: the pieces of the input.
        output: a file that ends in .jsonl, or a folder.
    """
    inventory = take_stock(source, recipe.asking)
    answers = Answers(output, inventory)
    run = {**recipe.identity, "requests": inventory.digest}
    try:
        done = answers.begin(run, print_error, retry_errors)
        left = len(inventory.rows) - len(done)
        if left:
            start_ray(plan.address)
            with contextlib.closing(Progress(left, is_quiet)) as progress:
                for lines, tokens, errors in answer_all(inventory, done, recipe, plan):
                    answers.append(lines)
                    progress.add(len(lines), tokens, errors)
        total, errors = answers.finish()
    finally:
        answers.close()
    print(f"{total} answers in {answers.output}, {len(done)} from earlier runs, {errors} errors")
    return FAILED if errors else 0


def start_ray(address: str | None) -> None:
    """Join a cluster, or make this machine one; Ray says nothing, and nobody is told of it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # by whoever calls this from Python
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address or "RAY_ADDRESS" in os.environ:
        ray.init(address=address, **options)
        return
    # One CPU more than there are, for tasks that read: the workers take all others.
    options |= {"num_cpus": (os.cpu_count() or 1) + 1, "include_dashboard": False}
    patiently(lambda: ray.init(address="local", **options))


def patiently(start: Callable[[], Any]) -> Any:
    """Start Ray on this machine; it gives up after 30 s, which is too little for a busy machine."""
    import ray

    for _ in range(STARTS - 1):
        try:
            return start()
        except Exception:  # Ray's own has no class
            ray.shutdown()
    return start()


def answer_all(
    inventory: Inventory, done: np.ndarray, recipe: Recipe, plan: Plan
) -> Iterator[tuple[list[bytes], int, int]]:
    """Answers as they come: lines of JSON, how many tokens they have, and how many of them are errors.

    Raises:
        RuntimeError: a worker failed in a way that every other request would meet.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    finished = ray.put(done)
    repeats = ray.put(inventory.repeats)
    pieces = [piece for piece in inventory.pieces if num_left(piece, inventory.rows, done)]

    def read(row: dict[str, Any]) -> Iterator[dict[str, bytes]]:
        for request in open_requests(pickle.loads(row["piece"]), recipe.asking, ray.get(finished), ray.get(repeats)):
            yield {"request": pickle.dumps(request)}

    requests = ray.data.from_items(
        [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
    )
    answered = (
        requests.flat_map(read)
        .repartition(target_num_rows_per_block=plan.batch_size)
        .map_batches(
            ENGINES[recipe.engine],
            batch_size=None,
            fn_constructor_args=(recipe, start_counter()),
            **share_out(ray.cluster_resources(), recipe.gpus, plan),
        )
    )
    try:
        batch: Any
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield batch["line"].to_pylist(), sum(batch["tokens"].to_pylist()), sum(batch["is_error"].to_pylist())
    except ray.exceptions.RayError as error:
        cause = str(getattr(error, "cause", None) or error)
        raise RuntimeError(f"a worker failed: {cause.partition(ADVICE)[0].strip()}") from error


def start_counter() -> Callable[[str, int], int]:
    """A function that adds to the number of a name, and returns it; its process outlives workers."""
    import ray

    class Counter:  # defined in here it travels as it is: that process need not import this package
        def __init__(self) -> None:
            self.numbers: dict[str, int] = {}

        def count(self, name: str, change: int) -> int:
            self.numbers[name] = self.numbers.get(name, 0) + change
            return self.numbers[name]

    counter = ray.remote(num_cpus=0, max_restarts=-1)(Counter).remote()
    return functools.partial(count, counter)


def count(counter: Any, name: str, change: int) -> int:
    """The answer of a counter."""
    import ray

    return ray.get(counter.count.remote(name, change))


def num_left(piece: Any, rows: np.ndarray, done: np.ndarray) -> int:
    """Requests of a piece that have no answer yet."""
    ends = [piece.first + 1, piece.first + piece.count + 1]
    return int(np.diff(np.searchsorted(rows, ends))[0] - np.diff(np.searchsorted(done, ends))[0])


def share_out(resources: dict[str, float], gpus: int, plan: Plan) -> dict[str, Any]:
    """The number of workers and the share of each; `UsageError` if this machine has too little.

    Without GPUs there is one worker, with all CPUs but one, which is for the tasks that read.
    """
    import ray

    available = int(resources.get("GPU", 0))
    num_workers = plan.num_workers or (max(available // gpus, 1) if gpus else 1)
    if gpus and plan.address is None and num_workers * gpus > available:
        raise UsageError(f"{num_workers} workers need {num_workers * gpus} GPUs, this machine has {available}")
    cpus = 1 if gpus else max(int(resources.get("CPU", 1) - 1) // num_workers, 1)
    # Two blocks at once: the worker opens the pictures of one while it decodes the other.
    pool = ray.data.ActorPoolStrategy(
        size=num_workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )
    return {"num_gpus": gpus, "num_cpus": cpus, "compute": pool}


class Progress:
    """A line on standard error: answers, tokens a second, time left."""

    def __init__(self, total: int, is_quiet: bool):
        self.tokens, self.errors, self.start = 0, 0, time.monotonic()
        self.bar = tqdm(
            total=total,
            unit="answer",
            disable=is_quiet,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            bar_format="{n_fmt} of {total_fmt} answers{postfix}, {remaining} left",
        )

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.close()

    def add(self, answers: int, tokens: int, errors: int) -> None:
        """Count answers that have come."""
        self.tokens, self.errors = self.tokens + tokens, self.errors + errors
        speed = self.tokens / (time.monotonic() - self.start)
        self.bar.set_postfix_str(f"{speed:.1f} tokens/s, {self.errors} errors", refresh=False)
        self.bar.update(answers)


def print_error(message: str) -> None:
    """Print a line on standard error."""
    print(message, file=sys.stderr)
