"""Chats made of the study's scenes: about where things are, or with the captions and questions of the study.

    python -m bard_vl.evaluation.grounding FOLDER [--scenes 512] [--about boxes|box|words] [--seed 0] [--held-out]

writes pictures and `chats.jsonl` to a new folder; with --held-out of scenes that training never sees.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..app.boxes import Thing
from . import scenes

QUESTION = "Locate every shape, as JSON."
KINDS = ("boxes", "box", "words")  # all boxes of a scene; one of them; its caption and the answer to one question


def things_of(scene: scenes.Scene) -> list[Thing]:
    """The shapes of a scene, each with the box that it fills."""
    return [Thing(f"{thing.size} {thing.colour} {thing.shape}", thing.box) for thing in scene.things]


def as_json(things: Iterable[Thing]) -> str:
    """The answer that says where things are."""
    side = scenes.GRID * scenes.CELL
    return json.dumps([thing.relative(side, side) for thing in things])


def one_box(scene: scenes.Scene, seed: int, number: int) -> tuple[str, str]:
    """A question for one shape of a scene, and the answer."""
    place = random.Random(f"box-{seed}-{number}").randrange(len(scene.things))
    return f"Locate the shape at {scene.things[place].cell}, as JSON.", as_json([things_of(scene)[place]])


def chat_of(question: str, answer: str, picture: str) -> dict[str, Any]:
    """A chat about a picture, which lies at a path."""
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def answered(about: str, num_scenes: int, held_out: bool, seed: int) -> Iterator[tuple[scenes.Scene, str, str]]:
    """(scene, question, answer) of one of `KINDS`; one for each scene, but two of its words."""
    if about == "words":
        yield from scenes.conversations(held_out, seed, num_scenes)
        return
    for number in range(num_scenes):
        scene = scenes.scene(held_out, seed, number)
        yield scene, *((QUESTION, as_json(things_of(scene))) if about == "boxes" else one_box(scene, seed, number))


def write_chats(folder: Path, num_scenes: int, held_out: bool = False, seed: int = 0, about: str = "boxes") -> None:
    """Write pictures and `chats.jsonl` to a folder, which must not exist."""
    folder.mkdir(parents=True)
    pictures: dict[scenes.Scene, str] = {}
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for scene, question, answer in answered(about, num_scenes, held_out, seed):
            if scene not in pictures:
                pictures[scene] = f"{len(pictures)}.png"
                scene.draw().save(folder / pictures[scene])
            file.write(json.dumps(chat_of(question, answer, pictures[scene])) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the chats that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--about", choices=KINDS, default="boxes", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, default: %(default)s")
    parser.add_argument("--held-out", action="store_true", help="of the split that no training sees")
    given = parser.parse_args(arguments)
    if given.folder.exists():
        parser.error(f"{given.folder} exists")
    write_chats(given.folder, given.scenes, given.held_out, given.seed, given.about)


if __name__ == "__main__":
    main()
