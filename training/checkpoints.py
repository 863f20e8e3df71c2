"""Checkpoints on disk: which of them are whole, what is damaged in the others, and what happens on a full disk."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .arguments import RecipeError

COMPLETE = "complete.json"  # in a checkpoint folder: every process has written its part, of these sizes
# torch writes archives by code of its own, whose errors have no class of theirs.
ARCHIVES = ("inline_container", "PytorchStreamWriter", "iostream")
GOES_ON = "the same command goes on from the last checkpoint"


def sync() -> None:
    """Bring what was written to the disk; Windows has no call for that."""
    if hasattr(os, "sync"):
        os.sync()


def mark_complete(folder: Path, step: int) -> None:
    """Say in a checkpoint folder that all of it is on disk: without the mark it counts as half-written."""
    sync()
    (folder / COMPLETE).write_text(json.dumps({"global_step": step, "sizes": sizes_of(folder)}) + "\n", "utf-8")


def complete_checkpoints(folder: Path, says: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Checkpoints of a stage under way that are whole, by step.

    `says` is told of each that was whole once and is damaged.
    """
    found = sorted((path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")), key=step_of)
    whole = []
    for checkpoint in found:
        fault = damage(checkpoint)
        if fault is None:
            whole.append(checkpoint)
        else:
            says(f"{checkpoint} is damaged and not used: {fault}")
    return whole


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def damage(folder: Path) -> str | None:
    """The fault of the files of a folder: a size that is not the mark's, unreadable JSON or weights; or None."""
    try:
        mark = folder / COMPLETE
        stated = read_json(mark)["sizes"] if mark.exists() else sizes_of(folder)
        found = sizes_of(folder)
        for name, size in stated.items():
            if found.get(name) != size:
                return f"{name} has {found.get(name, 'no')} of {size} bytes"
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        for path in sorted(folder.glob("*.safetensors")):
            check_weights(path)
        check_index(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder but the mark, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def read_json(path: Path) -> Any:
    """The content of a JSON file; `ValueError` names the file if it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def check_weights(path: Path) -> None:
    """Raise `ValueError` unless a file of weights is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def check_index(folder: Path) -> None:
    """Raise `ValueError` if an index names files of weights that are not there."""
    for index in folder.glob("*.index.json"):
        missing = {name for name in read_json(index)["weight_map"].values() if not (folder / name).is_file()}
        if missing:
            raise ValueError(f"{index.name} names {min(missing)}, which is not there")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Remove a folder that cannot be written, on a full disk for instance, and say so in a `RecipeError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(part in str(error) for part in ARCHIVES):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"{folder} cannot be written: {reason}; {GOES_ON}") from error


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what any reader raises about the files of a folder into a `RecipeError` of one line that names it."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # a tokenizer's has no class of its own
        fault = damage(folder) if folder.is_dir() else None
        raise RecipeError(f"{folder} cannot be read: {fault or ' '.join(str(error).split())}") from error
