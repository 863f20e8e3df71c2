r"""Speed and memory of block-diffusion decoding, side by side in one run.

    python benchmarks/decoding.py --shape 100m --prompt-length 1024 --new-tokens 256 --block-size 16 --steps 4 2
    python benchmarks/decoding.py --shape 100m --batch 8 --ragged 64 256 --steps 4
    python benchmarks/decoding.py --shape 4b --device cuda --prompt-length 2048 --compile --json 4b.json

It compares
- a plain baseline that decodes as published block-diffusion decoders do (plain_decoder.py),
- the rungs of a ladder from there to this engine, each with one improvement more than the one before,
- this engine, `generate` of the package,
- with `--before`, `generate` of another checkout of it,
- Qwen3-VL of the same shape and weights, token by token, through transformers' own `generate`.

Weights and prompts are random, so the time per forward is real and the text is not. Every round has new prompts, a few
tokens longer or shorter than asked for: nobody warms up on what is timed. How many steps a block takes
depends on the text; here it is fixed by the static rule: with `--steps` S every step commits block size / S tokens. No
response ends early. What a trained model needs is measured elsewhere, as tokens per forward.
"""

import argparse
import importlib.util
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration
from checkout import CheckoutContender
from contenders import (
    AutoregressiveContender,
    Contender,
    EngineContender,
    compile_everywhere,
    rounds_of_prompts,
    static_task,
)
from measuring import Result, copy_bandwidth, environment, measure
from plain_decoder import LADDER, LadderContender
from report import plain_arguments, plot, say, say_nothing, to_markdown, write_json
from shapes import SHAPES, build_model, bytes_read_per_forward, num_parameters, stock_twin

GROUPS = ("plain", "ladder", "engine", "qwen")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with a message if the values do not go together."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="100m", help="text stack: 2b, 4b and 8b are Qwen3-VL's (default: 100m)")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, else bfloat16")
    add("--batch", type=int, default=1, help="prompts; with several, engine and baseline also decode them one by one")
    add("--prompt-length", type=int, default=1024, help="tokens of every prompt (default: 1024)")
    add("--ragged", type=int, nargs=2, metavar=("LOW", "HIGH"), help="prompts of evenly spread lengths instead")
    add("--new-tokens", type=int, default=256, help="response tokens, more than one block (default: 256)")
    add("--block-size", type=int, default=16, help="tokens denoised together (default: 16)")
    add("--steps", type=int, nargs="+", default=[4, 2], help="denoising steps per block; a table each (default: 4 2)")
    add("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="leave the others out")
    add(
        "--before", type=Path, metavar="CHECKOUT", help="also decode with the package in this folder, an earlier commit"
    )
    add("--compile", action="store_true", help="also static caches and compiled forwards; the warm-up takes minutes")
    add("--repetitions", type=int, default=5, help="timed rounds, every decoder once a round (default: 5)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice, see OMP_NUM_THREADS)")
    add("--seed", type=int, default=0, help="of weights and prompts")
    add("--json", type=Path, metavar="FILE", help="write the raw numbers, hardware and versions")
    add("--markdown", type=Path, metavar="FILE", help="write the tables, which are also printed")
    add("--plot", type=Path, metavar="FILE", help="write a picture of tokens/s; needs matplotlib")
    add("--quiet", action="store_true", help="no progress on stderr")
    chosen = parser.parse_args(arguments)
    chosen.dtype = chosen.dtype or ("float32" if torch.device(chosen.device).type == "cpu" else "bfloat16")
    if chosen.before and not (chosen.before / "modeling_bard_vl.py").is_file():
        parser.error(f"--before {chosen.before} is no checkout of the package")
    if chosen.new_tokens <= chosen.block_size:
        parser.error(f"--new-tokens {chosen.new_tokens} must be more than one block of {chosen.block_size}")
    if not all(1 <= steps <= chosen.block_size for steps in chosen.steps):
        parser.error(f"--steps must lie between 1 and the block size {chosen.block_size}, got {chosen.steps}")
    if chosen.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "--plot needs matplotlib; or write --json now and draw later: python benchmarks/report.py FILE --plot"
        )
    if min(chosen.batch, chosen.repetitions, chosen.prompt_length, *(chosen.ragged or [1])) < 1:
        parser.error("--batch, --repetitions and the lengths of prompts must be at least 1")
    return chosen


def prompt_lengths(chosen: argparse.Namespace) -> list[int]:
    """Tokens of each prompt."""
    if chosen.ragged is None:
        return [chosen.prompt_length] * chosen.batch
    low, high = chosen.ragged
    return [round(length) for length in torch.linspace(low, high, chosen.batch).tolist()]


def contenders(model: BardVLForConditionalGeneration, groups: list[str], batch: int, compiled: bool) -> list[Contender]:
    """Those of `groups`, the plain baseline first.

    Args:
        model: of the shape that is measured.
        groups: of `GROUPS`. `ladder` is for one prompt; with several, engine and baseline also go one by one.
        batch: number of prompts.
        compiled: add static caches with compilation.
    """
    chosen: list[Contender] = []
    twins = {rung.attention: stock_twin(model, rung.attention) for rung in LADDER}
    for place, rung in enumerate(LADDER):
        if "plain" in groups if place == 0 else "ladder" in groups and batch == 1:
            chosen.append(LadderContender(twins[rung.attention], rung))
    if batch > 1 and chosen:
        chosen[0].name += ", one by one"
    if "engine" in groups:
        if batch > 1:
            chosen.append(EngineContender("this engine, one by one", model, is_batched=False))
        chosen.append(EngineContender("this engine", model, is_batched=True))
        if compiled:
            static = {"cache_implementation": "static"}
            chosen.append(EngineContender("this engine, static and compiled", model, is_batched=True, **static))
    if "qwen" in groups:
        chosen.append(AutoregressiveContender("Qwen3-VL, eager", twins["sdpa"]))
        if compiled:
            static = {"cache_implementation": "static", "compile_config": compile_everywhere()}
            twin = stock_twin(model, "sdpa")
            chosen.append(AutoregressiveContender("Qwen3-VL, static and compiled", twin, **static))
    return chosen


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the command line asks for; the result is what `--json` writes, after each contender."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device, shape = torch.device(chosen.device), SHAPES[chosen.shape]
    measured: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/decoding.py", *chosen.command_line]),
        "arguments": plain_arguments(chosen),
        "environment": environment(device),
        "shape": asdict(shape),
        "prompt_lengths": prompt_lengths(chosen),
    }
    model = build_model(shape, device, getattr(torch, chosen.dtype), chosen.seed)
    bandwidth = copy_bandwidth(device)
    measured |= {
        "parameters": num_parameters(model),
        "copy_bytes_per_second": bandwidth,
        "weight_read_ms": 1000 * bytes_read_per_forward(model) / bandwidth,
        "results": [],
    }
    prompts = rounds_of_prompts(measured["prompt_lengths"], shape, chosen.seed, device)
    compared = contenders(model, chosen.only, chosen.batch, chosen.compile)
    if chosen.before:
        twin = {name: getattr(chosen, name) for name in ("shape", "device", "dtype", "seed")}
        static = [{}, {"cache_implementation": "static"}] if chosen.compile else [{}]
        for settings in static:
            name = "the commit before" + (", static and compiled" if settings else "")
            compared.append(CheckoutContender(name, chosen.before, twin, is_batched=True, **settings))
    for steps in chosen.steps:
        task = static_task(shape, chosen.new_tokens, chosen.block_size, steps)
        earlier = measured["results"]

        def keep(results: list[Result], earlier: list[dict[str, Any]] = earlier) -> None:
            measured["results"] = [*earlier, *(result.record() for result in results)]
            write_json(measured, chosen.json)

        measure(compared, prompts, task, chosen.repetitions, say_nothing if chosen.quiet else say, keep)
    return measured


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write the files asked for."""
    chosen = parse_arguments(arguments)
    chosen.command_line = sys.argv[1:] if arguments is None else arguments
    measured = run(chosen)
    tables = to_markdown(measured)
    print(tables)
    if chosen.markdown:
        chosen.markdown.write_text(tables, encoding="utf-8")
    if chosen.plot:
        plot(measured, chosen.plot)


if __name__ == "__main__":
    main()
