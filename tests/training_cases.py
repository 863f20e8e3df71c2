"""Shared by the tests of training: tiny checkpoints, chats about pictures, recipes and runs of them."""

import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import tiny
import yaml
from bard_vl import convert_qwen3vl_to_bard as converter

MASK = tiny.IDS["small"].mask_token_id
_session_folder = tempfile.TemporaryDirectory(prefix="bard-vl-training-")


@cache
def qwen_folder() -> Path:
    """A tiny Qwen3-VL checkpoint, one for all tests of a process."""
    return tiny.write_qwen3vl(Path(_session_folder.name) / "qwen")


@cache
def bard_folder(block_size: int = 4) -> Path:
    """The same as a Bard-VL checkpoint."""
    output = Path(_session_folder.name) / f"bard-{block_size}"
    return converter.convert(qwen_folder(), output, block_size, MASK, progress=False)


@cache
def chats_file(num_chats: int = 12) -> Path:
    """A JSONL file of short chats: with a picture, without one, with two turns."""
    folder = Path(_session_folder.name) / f"chats-{num_chats}"
    folder.mkdir()
    lines = []
    for number in range(num_chats):
        colour = tiny.COLOURS[number % len(tiny.COLOURS)]
        question: Any = f"What is the colour of circle {number}?"
        if number % 3 == 0:
            tiny.draw_scene(folder / f"{number}.png", (64, 64), number)
            question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"The colour of the circle is {colour}."},
        ]
        if number % 4 == 1:
            messages += [{"role": "user", "content": "Again?"}, {"role": "assistant", "content": colour}]
        # One type of content throughout, which the Arrow format of `datasets` needs.
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chats.jsonl"


@cache
def media_file(num_chats: int = 12) -> Path:
    """A JSONL file of chats without media, with a picture, and with a picture and a video of three frames."""
    folder = Path(_session_folder.name) / "media"
    folder.mkdir()
    pictures = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(pictures):
        tiny.draw_scene(folder / name, (64, 64), number)
    media = [{"type": "image", "image": pictures[0]}, {"type": "video", "video": pictures[1:], "fps": 1.0}]
    lines = []
    for number in range(num_chats):
        question = [*media[: number % 3], {"type": "text", "text": "What is the colour?"}]
        answer = [{"type": "text", "text": tiny.COLOURS[number % len(tiny.COLOURS)]}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chats.jsonl"


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that trains a tiny model on the CPU in seconds."""
    recipe = {
        "model_name_or_path": str(bard_folder()),
        "train_data": str(chats_file()),
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.003,
        "logging_steps": 1,
        "logging_first_step": False,
        "save_steps": 2,
        "max_length": 256,
        "use_cpu": True,
        "disable_tqdm": True,
        "show_answers": 0,
    }
    recipe.update(changes)
    return {key: value for key, value in recipe.items() if value is not None}


def in_a_fork(target: Callable[..., None], *arguments: Any) -> int | None:
    """Run in a fork of this process, which has a data cache of its own, to its end; returns its exit code."""
    return in_forks(target, arguments)[0]


def in_forks(target: Callable[..., None], *calls: tuple[Any, ...]) -> list[int | None]:
    """The same for one fork per call, side by side."""
    processes = [multiprocessing.get_context("fork").Process(target=_apart, args=(target, *call)) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)  # a machine under load
    return [process.exitcode for process in processes]


def _apart(target: Callable[..., None], *arguments: Any) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(_session_folder.name) / "data"  # locks are not inherited
    target(*arguments)


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses(stage: Path) -> list[float]:
    """The losses of a finished stage, one per step."""
    return [entry["loss"] for entry in history(stage) if "loss" in entry]


def history(stage: Path) -> list[dict[str, Any]]:
    return json.loads((stage / "trainer_state.json").read_text())["log_history"]


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))
