r"""Speed and memory of a training step, in several forms side by side in one run.

    python benchmarks/training.py --shape 100m --lengths 512 1024 2048
    python benchmarks/training.py --shape 4b --device cuda --lengths 1024 2048 4096 8192 --json 4b.json

A step is forward, backward and AdamW over random conversations of text that together take about the given number of
packed columns, under mixed noise. The forms differ from the package's own step in one thing each:
- rows: several samples in one, or one sample in each, padded to the longest,
- loss: corrupted positions in chunks, the same positions at once, or the logits of every column,
- mask: FlexAttention on CUDA, a dense boolean mask,
- gradient checkpointing: with or without,
and the last one has none of them. All forms compute the same loss, which is checked.

Tokens per second count the tokens of the conversations, not their copies, nor padding.
"""

import argparse
import gc
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import environment, peak_memory, reset_peak_memory, seconds_of
from report import plain_arguments, say, say_nothing, write_json
from shapes import SHAPES, build_model, num_parameters
from training_steps import MASKS, Batch, Form, Step, conversations, forms, make_batch

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of losses, relative: sums in another order
COLUMN_MULTIPLE = 128  # tiles of FlexAttention


@dataclass
class Result:
    """The measurements of one form at one length.

    Attributes:
        name: of the form.
        length: packed columns asked for.
        rows, columns: of the batch.
        num_tokens: of the conversations.
        num_learnt: corrupted positions, which have a loss.
        loss: of the step.
        seconds: of steps, one a repetition.
        peak_memory_bytes: highest use in a step, model and optimizer included: the allocator's on CUDA, else the
            process's.
        memory_growth_bytes: by how much that is more than before the step: activations, logits and gradients.
        error: why nothing was measured.
    """

    name: str
    length: int
    rows: int
    columns: int
    num_tokens: int
    num_learnt: int
    loss: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    error: str | None = None

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum and maximum of the seconds and of the tokens per second."""
        figures = {"seconds": self.seconds, "tokens_per_second": [self.num_tokens / value for value in self.seconds]}
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in figures.items()
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with a message if the values do not go together."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="100m", help="text stack: 2b, 4b and 8b are Qwen3-VL's (default: 100m)")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=tuple(TOLERANCE), help="of weights and moments; default: float32 on cpu, else bfloat16")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="packed columns; a table each")
    add("--block-size", type=int, default=16, help="tokens per block (default: 16)")
    add("--chunk-size", type=int, default=1024, help="positions projected to the vocabulary at once (default: 1024)")
    add("--masks", nargs="+", choices=MASKS, help="the last is the package's; default: flex dense on cuda, else dense")
    add("--only", nargs="+", metavar="NAME", help="measure only forms whose name holds one of these words")
    add("--without-optimizer", action="store_true", help="forward and backward alone")
    add("--repetitions", type=int, default=3, help="timed rounds, every form once a round (default: 3)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice, see OMP_NUM_THREADS)")
    add("--seed", type=int, default=0, help="of weights and conversations")
    add("--json", type=Path, metavar="FILE", help="write the raw numbers, hardware and versions")
    add("--markdown", type=Path, metavar="FILE", help="write the tables, which are also printed")
    add("--quiet", action="store_true", help="no progress on stderr")
    chosen = parser.parse_args(arguments)
    on_cpu = torch.device(chosen.device).type == "cpu"
    chosen.dtype = chosen.dtype or ("float32" if on_cpu else "bfloat16")
    chosen.masks = chosen.masks or (["dense"] if on_cpu else list(MASKS))
    if on_cpu and "flex" in chosen.masks:
        parser.error("--masks flex needs CUDA: FlexAttention has no backward on a CPU")
    if min(chosen.block_size, chosen.chunk_size, chosen.repetitions) < 1:
        parser.error("--block-size, --chunk-size and --repetitions must be at least 1")
    shortest = 32 * chosen.block_size
    if min(chosen.lengths) < shortest:
        parser.error(f"--lengths must be at least {shortest}, 32 blocks, got {min(chosen.lengths)}")
    if chosen.only and not _chosen_forms(chosen):
        names = ", ".join(repr(form.name) for form in forms(chosen.masks))
        parser.error(f"--only {' '.join(chosen.only)} leaves nothing of {names}")
    return chosen


def _chosen_forms(chosen: argparse.Namespace) -> list[Form]:
    every = forms(chosen.masks)
    return [form for form in every if not chosen.only or any(word in form.name for word in chosen.only)]


def measure(
    step: Step,
    compared: list[tuple[Form, Batch, Result]],
    device: torch.device,
    repetitions: int,
    tolerance: float,
    say: Callable[[str], None],
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Warm every form up and check its loss, then time them in turns: A B C, A B C, ...

    A form that finds too little memory is left out, and its result says so. `keep` takes the results, so far, after
    each measurement.

    Raises:
        ValueError: a form computes another loss than the first.
    """
    ready, results = [], [result for _, _, result in compared]
    for form, batch, result in compared:
        say(f"{result.length} columns, warming up: {form.name}")
        try:
            result.loss = step.run(form, batch)
        except torch.cuda.OutOfMemoryError:
            result.error = "out of memory"
        else:
            ready.append((form, batch, result))
        if result.error:  # outside of the handler: the exception holds the tensors of the step
            _free(step, device)
        keep(results)
    for _, _, result in ready:
        expected = ready[0][2].loss
        if not abs(result.loss - expected) <= tolerance * abs(expected):
            raise ValueError(f"{result.name!r} has the loss {result.loss}, {ready[0][2].name!r} has {expected}")
    for repetition in range(repetitions):
        for form, batch, result in ready:
            say(f"{result.length} columns, repetition {repetition + 1}: {form.name}")
            _free(step, device)
            before = reset_peak_memory(device)
            result.seconds.append(seconds_of(lambda form=form, batch=batch: step.run(form, batch), device))
            peak = peak_memory(device)
            result.peak_memory_bytes = max(result.peak_memory_bytes, peak)
            result.memory_growth_bytes = max(result.memory_growth_bytes, peak - before)
            keep(results)
    return results


def _free(step: Step, device: torch.device) -> None:
    step.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the command line asks for; the result is what `--json` writes, after each form."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device, shape = torch.device(chosen.device), SHAPES[chosen.shape]
    measured: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/training.py", *chosen.command_line]),
        "arguments": plain_arguments(chosen),
        "environment": environment(device),
        "shape": asdict(shape),
    }
    model = build_model(shape, device, getattr(torch, chosen.dtype), chosen.seed)
    measured |= {"parameters": num_parameters(model), "results": []}
    step = Step(model, chosen.chunk_size, not chosen.without_optimizer)
    for length in chosen.lengths:
        samples = conversations(length, chosen.block_size, shape.num_prompt_ids, chosen.seed)
        batches = {
            packed: make_batch(samples, packed, chosen.block_size, COLUMN_MULTIPLE, shape, device)
            for packed in (True, False)
        }
        num_tokens = sum(len(sample.input_ids) for sample in samples)
        compared = []
        for form in _chosen_forms(chosen):
            batch = batches[form.packed]
            rows, columns = batch.noisy_ids.shape
            learnt = int((batch.weights > 0).sum())
            compared.append((form, batch, Result(form.name, length, rows, columns, num_tokens, learnt)))
        earlier = measured["results"]

        def keep(results: list[Result], earlier: list[dict[str, Any]] = earlier) -> None:
            records = [{**asdict(each), "summary": each.summary() if each.seconds else {}} for each in results]
            measured["results"] = [*earlier, *records]
            write_json(measured, chosen.json)

        notice = say_nothing if chosen.quiet else say
        measure(step, compared, device, chosen.repetitions, TOLERANCE[chosen.dtype], notice, keep)
    return measured


HEADER = "| step | rows x columns | s per step | tokens/s (min-max) | x first | peak MiB (growth) | x first |"


def to_markdown(run: dict[str, Any]) -> str:
    """The whole run: hardware, versions, arguments, one table a length."""
    chosen = run["arguments"]
    environment = ", ".join(f"{name} {value}" for name, value in run["environment"].items())
    step = "forward and backward" if chosen["without_optimizer"] else "forward, backward and AdamW"
    lines = [
        f"## {chosen['shape']}, {chosen['device']}, {chosen['dtype']}, block {chosen['block_size']}",
        "",
        f"Measured with `{run['command']}` on: {environment}.",
        f"{run['parameters'] / 1e6:.1f} M parameters in the text stack. Medians of {chosen['repetitions']} interleaved "
        f"repetitions; a step is {step}. Growth is what a step takes beyond weights and moments, gradients included.",
    ]
    for length in chosen["lengths"]:
        results = [result for result in run["results"] if result["length"] == length]
        lines += [
            "",
            f"### About {length} packed columns: {results[0]['num_tokens']} tokens, {results[0]['num_learnt']} learnt",
            "",
            HEADER,
            "|---|" + "---:|" * 6,
            *(table_row(result, results[0]) for result in results),
        ]
    return "\n".join(lines) + "\n"


def table_row(result: dict[str, Any], first: dict[str, Any]) -> str:
    """One form; speed and growth of memory relative to the first of its table."""
    shape = f"{result['rows']} x {result['columns']}"
    if result["error"]:
        return f"| {result['name']} | {shape} | {result['error']} |" + " |" * 4
    speed = result["summary"]["tokens_per_second"]
    relative = ["", ""]
    if not first["error"]:
        growth = result["memory_growth_bytes"] / max(first["memory_growth_bytes"], 1)
        relative = [f"{speed['median'] / first['summary']['tokens_per_second']['median']:.2f}", f"{growth:.2f}"]
    peak, growth = (result[name] / 2**20 for name in ("peak_memory_bytes", "memory_growth_bytes"))
    cells = [
        result["name"],
        shape,
        f"{result['summary']['seconds']['median']:.3g}",
        f"{speed['median']:.4g} ({speed['min']:.4g}-{speed['max']:.4g})",
        relative[0],
        f"{peak:.0f} ({growth:.0f})",
        relative[1],
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write the files asked for."""
    chosen = parse_arguments(arguments)
    chosen.command_line = sys.argv[1:] if arguments is None else arguments
    measured = run(chosen)
    tables = to_markdown(measured)
    print(tables)
    if chosen.markdown:
        chosen.markdown.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
