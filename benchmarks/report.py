"""Tables and plots of a run of `decoding.py`, from what its `--json` writes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from contenders import MOST_OFFSET

HEADER = (
    "| decoder | forwards | ms per forward | ms to first block | tokens/s after it | tokens/s end to end (min-max) "
    "| x {base} | peak MiB (growth) |"
)


def to_markdown(run: dict[str, Any]) -> str:
    """The run as far as it came: hardware, versions, arguments, one table per number of steps."""
    environment = ", ".join(f"{name} {value}" for name, value in run["environment"].items())
    lines = [
        f"## {title(run)}",
        "",
        f"Measured with `{run['command']}` on: {environment}.",
        f"{run['parameters'] / 1e6:.1f} M parameters in the text stack; reading the weights of a forward once takes "
        f"{run['weight_read_ms']:.3g} ms at the measured copy bandwidth of "
        f"{run['copy_bytes_per_second'] / 1e9:.3g} GB/s. "
        f"Medians of {run['arguments']['repetitions']} interleaved repetitions, each with new prompts, up to "
        f"{MOST_OFFSET} tokens longer or shorter.",
    ]
    for steps in run["arguments"]["steps"]:
        results = [result for result in run["results"] if result["steps"] == steps]
        if not results:
            continue
        header = HEADER.format(base="plain" if results[0]["name"].startswith("plain") else "first")
        lines += ["", f"### {steps} steps per block", "", header, "|---|" + "---:|" * 7]
        lines += [table_row(result, results[0]) for result in results]
        lines += notes(results)
    return "\n".join(lines) + "\n"


def title(run: dict[str, Any]) -> str:
    """Shape, device, dtype, lengths."""
    chosen = run["arguments"]
    low, high = min(run["prompt_lengths"]), max(run["prompt_lengths"])
    prompts = f"prompt of {low}" if low == high else f"prompts of {low} to {high}"
    return (
        f"{chosen['shape']}, {chosen['device']}, {chosen['dtype']}, batch {chosen['batch']}, {prompts} tokens, "
        f"{chosen['new_tokens']} new, block {chosen['block_size']}"
    )


def table_row(result: dict[str, Any], base: dict[str, Any]) -> str:
    """One contender; speed relative to `base`, the first of its table."""
    if "summary" not in result:
        return f"| {result['name']} | did not run |" + " |" * 6
    figure = result["summary"]
    kinds = " + ".join(f"{count} {kind}" for kind, count in result["forwards"].items())
    speed = figure["tokens_per_second"]
    relative = (
        "" if "summary" not in base else f"{speed['median'] / base['summary']['tokens_per_second']['median']:.2f}"
    )
    cells = [
        result["name"],
        f"{sum(result['forwards'].values())} ({kinds})",
        f"{figure['ms_per_forward']['median']:.3g}",
        f"{figure['ms_to_first_block']['median']:.4g}",
        f"{figure['decode_tokens_per_second']['median']:.4g}",
        f"{speed['median']:.4g} ({speed['min']:.4g}-{speed['max']:.4g})",
        relative,
        f"{result['peak_memory_bytes'] / 2**20:.0f} ({result['memory_growth_bytes'] / 2**20:.0f})"
        if result["peak_memory_bytes"]
        else "",
    ]
    return "| " + " | ".join(cells) + " |"


def notes(results: list[dict[str, Any]]) -> list[str]:
    """The runs that failed, and whether the tokens are the same."""
    said = [f"{result['name']} did not run: {result['error']}" for result in results if result["error"]]
    if any(result["agreement"] is None and not result["error"] for result in results):
        said.append(f"The first block of autoregressive decoding is its first {results[0]['block_size']} tokens.")
    compared = [result for result in results if result["agreement"] is not None]
    if all(result["agreement"] == 1 for result in compared):
        said.append("All block-diffusion decoders gave the same tokens.")
    else:
        shares = ", ".join(f"{result['name']} {result['agreement']:.1%}" for result in compared)
        said.append(f"Share of tokens equal to this engine's (rounding decides the others): {shares}.")
    return ["", *said]


def plain_arguments(chosen: argparse.Namespace) -> dict[str, Any]:
    """A command line's values as JSON takes them."""
    values = {name: value for name, value in vars(chosen).items() if name != "command_line"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def write_json(run: dict[str, Any], path: Path | None) -> None:
    """Write what has been measured so far, if a path is given."""
    if path:
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def say(message: str) -> None:
    """Tell on stderr how far a run is."""
    print(message, file=sys.stderr, flush=True)


def say_nothing(message: str) -> None:
    """Stay quiet."""


def plot(run: dict[str, Any], path: str | Path) -> None:
    """Bars of tokens/s end to end, with their range, a group per number of steps. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = run["arguments"]["steps"]
    figure, axes = pyplot.subplots(1, len(steps), figsize=(6 * len(steps), 4), sharex=True, squeeze=False)
    for axis, count in zip(axes[0], steps, strict=True):
        results = [result for result in run["results"] if result["steps"] == count and "summary" in result]
        speeds = [result["summary"]["tokens_per_second"] for result in results]
        medians = [speed["median"] for speed in speeds]
        errors = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
        colours = ["tab:orange" if "Qwen" in result["name"] else "tab:blue" for result in results]
        axis.barh([result["name"] for result in results], medians, xerr=errors, color=colours)
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s end to end")
        axis.set_title(f"{count} steps per block")
    figure.suptitle(title(run), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Draw the tables and the plot of an earlier run again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="a file that decoding.py wrote with --json")
    parser.add_argument("--plot", type=Path, help="write a picture (.png, .svg, .pdf); needs matplotlib")
    arguments = parser.parse_args()
    run = json.loads(arguments.json.read_text(encoding="utf-8"))
    print(to_markdown(run))
    if arguments.plot:
        plot(run, arguments.plot)


if __name__ == "__main__":
    main()
