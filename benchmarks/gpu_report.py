"""Tables of what gpu.py wrote."""

import json
from pathlib import Path
from typing import Any

from report import HEADER, table_row

Pieces = dict[str, dict[str, Any]]


def tables(path: Path) -> str:
    """Everything in a file of results, as Markdown; of a piece that was measured again the last result."""
    parts: dict[str, Pieces] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            result = json.loads(line)
            parts.setdefault(result["part"], {})[result["piece"]] = result["found"]
    text: list[str] = []
    for part, pieces in sorted(parts.items()):
        text += ["", f"## Part {part}", "", *_machine(pieces)]
        text += [*_decoding(pieces), *_kernels(pieces), *_training(pieces), *_troubles(pieces)]
    return "\n".join(text).strip() + "\n"


def _machine(pieces: Pieces) -> list[str]:
    found = dict(pieces.get("environment", {}))
    shape, dtype = found.pop("shape", {}).get("name"), found.pop("dtype", None)
    said = [f"{shape}, {dtype}, on: " + ", ".join(f"{name} {value}" for name, value in found.items()) + "."]
    model = pieces.get("model", {})
    if "parameters" in model:
        said.append(
            f"{model['parameters'] / 1e6:.1f} M parameters in the text stack; reading the weights of a forward once "
            f"takes {model['weight_read_ms']:.3g} ms at the measured copy bandwidth of "
            f"{model['copy_bytes_per_second'] / 1e9:.4g} GB/s."
        )
    return said


def _of(pieces: Pieces, prefix: str = "") -> Pieces:
    """Results by the rest of their names behind a prefix, without those that failed."""
    return {
        name.removeprefix(prefix): found
        for name, found in pieces.items()
        if name.startswith(prefix) and not found.get("error") and not found.get("skipped")
    }


def _decoding(pieces: Pieces) -> list[str]:
    """A table for each task: rows, and steps per block."""
    results = [found for found in _of(pieces).values() if "summary" in found and "prompt_lengths" in found]
    read, text = pieces.get("model", {}).get("weight_read_ms"), []
    for prompts, steps in dict.fromkeys((tuple(each["prompt_lengths"]), each["steps"]) for each in results):
        same = [each for each in results if (tuple(each["prompt_lengths"]), each["steps"]) == (prompts, steps)]
        tokens = f"prompt of {prompts[0]}" if len(prompts) == 1 else f"prompts of {min(prompts)} to {max(prompts)}"
        text += ["", f"### {len(prompts)} row{'s' * (len(prompts) > 1)}, {tokens} tokens, {steps} steps per block", ""]
        text += [f"{HEADER.format(base='first')} x weight read | new tokens a row |", "|---|" + "---:|" * 9]
        for each in same:
            ratio = each["summary"]["ms_per_forward"]["median"] / read if read else float("nan")
            text.append(f"{table_row(each, same[0])} {ratio:.2f} | {each['num_tokens'] // len(prompts)} |")
    if results:
        text += ["", "First calls, one for a block and a whole one in turn, in seconds:", ""]
        for name, found in _of(pieces).items():
            if name.endswith(", first calls"):
                seconds = ", ".join(f"{value:.3g}" for value in found["seconds"])
                share = (
                    "" if found["agreement"] is None else f"; tokens as the first decoder's: {found['agreement']:.1%}"
                )
                text.append(f"- {name.removesuffix(', first calls')}: {seconds}{share}")
    return text


def _kernels(pieces: Pieces) -> list[str]:
    text = _table(
        ["matrix products of a step", "weights as they are, ms", "fused, ms"],
        [[name, each["separate_ms"], each["together_ms"]] for name, each in _of(pieces, "matrix products, ").items()],
    )
    for backend, found in _of(pieces, "attention, ").items():
        text += _table([f"attention of a layer by {backend}", "ms"], [list(item) for item in found.items()])
    columns = ("relative_error", "ms", "read_ms")
    text += _table(
        ["the package's kernel", "relative error", "ms", "reading its keys and values, ms"],
        [[name, *(each[column] for column in columns)] for name, each in _of(pieces, "slot kernel, ").items()],
    )
    figures = ("kernels_per_forward", "busy_ms_per_forward")
    text += _table(
        ["this engine", "kernels per forward", "busy, ms per forward"],
        [[name, *(each[figure] for figure in figures)] for name, each in _of(pieces, "profile, ").items()],
    )
    for name, found in _of(pieces, "tests/").items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in found["outcomes"].items())
        text += ["", f"tests/{name}: {counts or 'nothing ran'}; exit code {found['exit_code']}."]
    return text


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in [head, *rows]]
    return ["", lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _training(pieces: Pieces) -> list[str]:
    from training import HEADER as TRAINING_HEADER
    from training import table_row as training_row

    results = [found for found in _of(pieces, "training, ").values() if found["summary"]]
    if not results:
        return []
    rows = [training_row(result, results[0]) for result in results]
    return [
        "",
        f"### Training, about {results[0]['length']} columns",
        "",
        TRAINING_HEADER,
        "|---|" + "---:|" * 6,
        *rows,
    ]


def _troubles(pieces: Pieces) -> list[str]:
    text = []
    for name, found in pieces.items():
        if said := found.get("error") or found.get("skipped"):
            text.append(f"- {name}: {said.strip().splitlines()[-1]}")
    return ["", "Not measured:", "", *text] if text else []
