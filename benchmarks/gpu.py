r"""Measurements on a GPU of 80 GB, in three parts of some minutes; each line of results is written once it is known.

    python benchmarks/gpu.py a --shape 4b            # kernels: floors, attention, the slot kernel, tests/test_cuda.py
    python benchmarks/gpu.py b --shape 4b            # decoding of one row, and what its steps launch
    python benchmarks/gpu.py c --shape 4b            # a training step, and ragged batches of 8 and 32 rows
    python benchmarks/gpu.py a --shape tiny --device cpu    # the same code on a CPU, in seconds
    python benchmarks/gpu.py table results.jsonl     # the tables of RESULTS.md

benchmarks/gpu.sh runs the parts one after the other. Results are added to results.jsonl in the folder of `--out`,
beside test_cuda.txt, profile_*.txt and what other processes printed. A piece that fails or takes too long has an error
for a result, and the next one follows. Weights and prompts are random; see decoding.py for what that means.

`BARD_VL_OLD` names a folder that holds an earlier checkout as `bard_vl`: part B then also measures that engine, in a
process of its own.
"""

import argparse
import importlib.util
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bard_vl
import torch
from contenders import AutoregressiveContender, Contender, EngineContender, collate, rounds_of_prompts, static_task
from gpu_kernels import attention, floors, slot_kernel
from gpu_report import tables
from gpu_run import BLOCK, HERE, Bench, Found, Piece, run, run_child
from shapes import SHAPES, stock_twin

ENGINE: dict[str, dict[str, Any]] = {"eager": {"cache_implementation": "dynamic"}, "default": {}}


def build(bench: Bench) -> Found:
    """The model, which writes a line of its own, so that no piece's time goes into it."""
    assert bench.model is not None
    yield from ()


def cuda_tests(bench: Bench) -> Found:
    """tests/test_cuda.py in a process of its own; its output is test_cuda.txt."""
    if importlib.util.find_spec("pytest") is None:
        yield "tests/test_cuda.py", {"skipped": "pytest is not installed"}
        return
    command = ["-m", "pytest", "tests/test_cuda.py", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    log = bench.chosen.out / "test_cuda.txt"
    returned = run_child(command, log, bench.seconds_left(100))
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED) +\[ *\d+%\]$", log.read_text(encoding="utf-8"), re.MULTILINE)
    yield "tests/test_cuda.py", {"outcomes": Counter(word.lower() for word in words), "exit_code": returned}


def decode(
    bench: Bench,
    contender: Contender,
    lengths: list[int],
    new_tokens: int | None = None,
    steps: tuple[int, ...] = (4, 2),
    repetitions: int = 5,
) -> Found:
    """One contender: what its first calls took, then its figures, for each number of steps per block."""
    rows = f"{len(lengths)} rows, " if len(lengths) > 1 else ""
    for each in steps:
        comparison = bench.comparison(tuple(lengths), new_tokens or bench.new_tokens, each)
        result, name = comparison.start(contender), f"{rows}{contender.name}, {each} steps"
        comparison.warm_up(contender, result)
        yield f"{name}, first calls", {"seconds": result.warm_up_seconds, "agreement": result.agreement}
        for number in range(1, (repetitions if bench.on_cuda else 1) + 1):
            comparison.time(contender, result, number)
        yield name, {**result.record(), "prompt_lengths": lengths}


def qwen(bench: Bench) -> Found:
    """Qwen3-VL of the same weights, a token at a time; fewer tokens, whose time is the same for each."""
    contender = AutoregressiveContender("Qwen3-VL, eager", stock_twin(bench.model, "sdpa"))
    yield from decode(bench, contender, [bench.prompt_length], min(bench.new_tokens, 64), (4,), 3)


def single(way: str) -> Callable[[Bench], Found]:
    """This engine with one row."""
    return lambda bench: decode(bench, _engine(bench, way), [bench.prompt_length])


def _engine(bench: Bench, way: str) -> EngineContender:
    return EngineContender(f"this engine, {way}", bench.model, is_batched=True, **ENGINE[way])


def profile(way: str) -> Callable[[Bench], Found]:
    """Kernels of a forward, and how long the GPU is busy with them, from calls of one block and of more."""
    return lambda bench: _profile(bench, way)


def _profile(bench: Bench, way: str) -> Found:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if bench.on_cuda else ProfilerActivity.CPU
    device_type = DeviceType.CUDA if bench.on_cuda else DeviceType.CPU
    prompts = rounds_of_prompts([bench.prompt_length], bench.shape, 0, bench.device)
    counts, busy, forwards = [], [], []
    for blocks in (1, 5 if bench.on_cuda else 2):
        task = static_task(bench.shape, blocks * BLOCK, BLOCK, 4)
        settings = {**vars(task), **ENGINE[way], "return_dict_in_generate": True}
        for number in (0, -1):  # what is made at first use is no part of it
            bench.model.generate(**collate(prompts(number)), **settings)
        inputs = collate(prompts(7))
        with profile(activities=[activity]) as profiler:
            output = bench.model.generate(**inputs, **settings)
        averages = profiler.key_averages()
        events = [event for event in averages if event.device_type == device_type]
        attribute = "self_device_time_total" if bench.on_cuda else "self_cpu_time_total"
        counts.append(sum(event.count for event in events))
        busy.append(sum(getattr(event, attribute) for event in events) / 1000)
        forwards.append(sum(output.num_forwards.values()))
    sorting = "self_cuda_time_total" if bench.on_cuda else "self_cpu_time_total"
    table = averages.table(sort_by=sorting, row_limit=40, max_name_column_width=90)
    (bench.chosen.out / f"profile_{way}.txt").write_text(table, encoding="utf-8")
    more = forwards[1] - forwards[0]
    found = {"kernels_per_forward": (counts[1] - counts[0]) / more, "busy_ms_per_forward": (busy[1] - busy[0]) / more}
    yield f"profile, {way}", {**found, "kernels": counts, "busy_ms": busy, "forwards": forwards}


def earlier(bench: Bench) -> Found:
    """The engine of an earlier commit, in a process of its own, with the time that is left."""
    folder = os.environ.get("BARD_VL_OLD")
    if not folder:
        yield "earlier engine", {"skipped": "BARD_VL_OLD names no folder"}
        return
    if not (Path(folder) / "bard_vl" / "__init__.py").is_file():
        raise FileNotFoundError(f"BARD_VL_OLD={folder} holds no checkout as `bard_vl`")
    seconds, chosen = bench.seconds_left(), bench.chosen
    command = [str(HERE / "gpu.py"), "old", "--shape", chosen.shape, "--device", chosen.device]
    command += ["--out", str(chosen.out.resolve()), "--seconds", str(int(seconds))]
    path = os.pathsep.join([str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    returned = run_child(command, chosen.out / "old.txt", seconds, PYTHONPATH=path)
    yield "earlier engine", {"exit_code": returned}


def earlier_engine(way: str, **settings: Any) -> Callable[[Bench], Found]:
    """A way of the earlier engine; 14 blocks, as many as fit into the columns that one block takes when compiled."""

    def measured(bench: Bench) -> Found:
        if Path(bard_vl.__file__).resolve().parent == HERE.parent:
            raise ImportError("this is no earlier engine but the checkout of this script")
        contender = EngineContender(f"earlier engine, {way}", bench.model, is_batched=True, **settings)
        new_tokens = max(bench.new_tokens - 2 * BLOCK, 2 * BLOCK)
        return decode(bench, contender, [bench.prompt_length], new_tokens, (4,), 3)

    return measured


def batch(way: str, rows: int) -> Callable[[Bench], Found]:
    """This engine with ragged rows."""

    def measured(bench: Bench) -> Found:
        lengths = torch.linspace(bench.prompt_length // 16, bench.prompt_length, rows).round().int().tolist()
        new_tokens = bench.new_tokens // 2
        return decode(bench, _engine(bench, way), [max(each, 8) for each in lengths], new_tokens, (4,), 3)

    return measured


def training(bench: Bench) -> Found:
    """A training step under both masks, by training.py in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "training.json"
        command = [str(HERE / "training.py"), "--shape", bench.chosen.shape, "--device", bench.chosen.device]
        command += ["--lengths", "2048" if bench.on_cuda else "512", "--repetitions", "2", "--without-optimizer"]
        command += ["--only", "packed, chunked", "mask", "--json", str(numbers)]
        returned = run_child(command, bench.chosen.out / "training.txt", bench.seconds_left(75))
        run = json.loads(numbers.read_text(encoding="utf-8")) if numbers.exists() else {"results": []}
    for result in run["results"]:
        yield f"training, {result['name']}", result
    if returned != 0:
        yield "training", {"error": f"training.py: {returned}, see training.txt"}


# Seconds of a part are those of its process less what Python takes to start; its pieces share them.
SECONDS = {"a": 250, "b": 250, "c": 180, "old": 150}
MODEL = Piece("model", 60, build)
PARTS = {
    "a": [
        MODEL,
        Piece("floors", 35, floors),
        Piece("attention", 45, attention),
        Piece("slot kernel", 60, slot_kernel),
        Piece("tests/test_cuda.py", 110, cuda_tests),
    ],
    "b": [
        MODEL,
        Piece("Qwen3-VL", 40, qwen),
        Piece("eager", 45, single("eager")),
        Piece("default", 120, single("default")),
        Piece("profile, eager", 30, profile("eager")),
        Piece("profile, default", 30, profile("default")),
        Piece("earlier engine", 200, earlier),
    ],
    "c": [
        Piece("training", 80, training),  # before the model of the others takes memory
        MODEL,
        Piece("8 rows, eager", 25, batch("eager", 8)),
        Piece("8 rows, default", 50, batch("default", 8)),
        Piece("32 rows, eager", 30, batch("eager", 32)),
        Piece("32 rows, default", 60, batch("default", 32)),
    ],
    "old": [
        MODEL,
        Piece("eager", 60, earlier_engine("eager", cache_implementation="dynamic")),
        Piece(
            "compiled", 200, earlier_engine("compiled, 4 steps a look", cache_implementation="static", check_interval=4)
        ),
    ],
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with a message if the values do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=(*PARTS, "table"), help="what to measure; `old` is what part B starts; or print tables")
    add("results", nargs="?", type=Path, help="for `table`: a results.jsonl (default: the one in --out)")
    add("--shape", choices=SHAPES, default="4b", help="text stack: 2b, 4b and 8b are Qwen3-VL's (default: 4b)")
    add("--device", default="cuda", help="cpu, cuda or cuda:N (default: cuda)")
    add("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of results (default: $OUT, or here)")
    add("--seconds", type=float, help="that the part may take (default: its own)")
    add("--only", nargs="+", metavar="PIECE", help="leave the other pieces of the part out")
    chosen = parser.parse_args(arguments)
    if chosen.part == "table":
        chosen.results = chosen.results or chosen.out / "results.jsonl"
        return chosen
    if chosen.results:
        parser.error(f"part {chosen.part} takes no file, got {chosen.results}")
    chosen.seconds = chosen.seconds or SECONDS[chosen.part]
    names = [piece.name for piece in PARTS[chosen.part]]
    if unknown := sorted(set(chosen.only or ()) - set(names)):
        parser.error(f"--only {unknown[0]!r} is no piece of part {chosen.part}: {', '.join(map(repr, names))}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Measure a part, or print the tables of a file of results."""
    chosen = parse_arguments(arguments)
    if chosen.part == "table":
        print(tables(chosen.results), end="")
    else:
        run(chosen, [piece for piece in PARTS[chosen.part] if not chosen.only or piece.name in chosen.only])


if __name__ == "__main__":
    main()
