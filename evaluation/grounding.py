"""Chats about where things are, made of the study's scenes: something to try the recipe for grounding on.

    python -m bard_vl.evaluation.grounding FOLDER [--scenes 512] [--held-out]

writes pictures and `chats.jsonl` to a new folder; with --held-out of scenes that training never sees.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..app.boxes import Thing
from . import scenes

QUESTION = "Locate every shape, as JSON."


def things_of(scene: scenes.Scene) -> list[Thing]:
    """The shapes of a scene, each with the box that it fills."""
    return [Thing(f"{thing.size} {thing.colour} {thing.shape}", thing.box) for thing in scene.things]


def chat_of(scene: scenes.Scene, picture: str) -> dict[str, Any]:
    """A question for all shapes of a scene, whose picture lies at a path, and the answer."""
    side = scenes.GRID * scenes.CELL
    answer = json.dumps([thing.relative(side, side) for thing in things_of(scene)])
    question = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_chats(folder: Path, num_scenes: int, held_out: bool = False, seed: int = 0) -> None:
    """Write pictures and `chats.jsonl` to a folder, which must not exist."""
    folder.mkdir(parents=True)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_scenes):
            scene = scenes.scene(held_out, seed, number)
            scene.draw().save(folder / f"{number}.png")
            file.write(json.dumps(chat_of(scene, f"{number}.png")) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the chats that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--held-out", action="store_true", help="of the split that no training sees")
    given = parser.parse_args(arguments)
    if given.folder.exists():
        parser.error(f"{given.folder} exists")
    write_chats(given.folder, given.scenes, given.held_out)


if __name__ == "__main__":
    main()
