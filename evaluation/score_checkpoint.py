"""Score a checkpoint of the small-scale study on scenes that it has never seen.

    python -m bard_vl.evaluation.score_checkpoint [FOLDER] [--parent FOLDER] [--about words box] [--set NAME=VALUE]
        [--json FILE]

Every scene is asked for its caption, for one thing more (`words`), and for the box of one shape (`box`). An answer is
exact if all its tokens are right; `box_iou_50` counts boxes of the right label whose IoU with the true one is at least
0.5. `exact` and `tokens_per_forward` are those of words, boxes have figures of their own. With --parent the
autoregressive model that the checkpoint comes from answers the same questions.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from ..app.session import build_settings
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from ..training.packing import Sample
from .cells import Decoding
from .experiment import answer, encode, exactness, locating, measure
from .grounding import answered
from .scenes import WORDS_ASKED

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
SCENES_SEED = 1  # the study's is 0
ABOUT = ("words", "box")  # of `grounding.KINDS`


def score(
    folder: Path,
    parent: Path | None,
    num_scenes: int,
    threshold: float | None,
    settings: dict[str, Any] | None = None,
    about: Sequence[str] = ABOUT,
) -> dict[str, Any]:
    """Exact answers and tokens per forward of a checkpoint at a threshold, or its own; the parent's exact answers.

    `settings` of `generate` take the place of the checkpoint's; `about` names the answers, of `ABOUT`.
    """
    processor = BardVLProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    model.generation_config.update(**(settings or {}))
    threshold = model.generation_config.confidence_threshold if threshold is None else threshold
    asked = {
        kind: encode(processor, model.config, answered(kind, num_scenes, held_out=True, seed=SCENES_SEED))
        for kind in ABOUT
        if kind in about
    }
    found: dict[str, Any] = {
        "scenes": num_scenes,
        **lengths(asked.get("words", [])),
        "block_size": model.config.block_size,
        **({"settings": settings} if settings else {}),
        "checkpoint": figures(model, asked, Decoding(threshold), processor.tokenizer),
    }
    if parent is not None:
        model = Qwen3VLForConditionalGeneration.from_pretrained(parent).eval()
        found["parent"] = figures(model, asked, Decoding(), processor.tokenizer)
    return found


def lengths(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many answers there are and how long they are, in tokens; nothing of none."""
    if not samples:
        return {}
    found = [len(answer(sample)) for sample in samples]
    return {
        "answers": len(found),
        "shortest_answer": min(found),
        "mean_answer": round(sum(found) / len(found), 1),
        "longest_answer": max(found),
    }


def figures(
    model: Qwen3VLForConditionalGeneration | BardVLForConditionalGeneration,
    asked: Mapping[str, Sequence[Sample]],
    decoding: Decoding,
    tokenizer: Any,
) -> dict[str, Any]:
    """The scores of a model; those of boxes, which are decoded apart, have names of their own."""
    found: dict[str, Any] = {}
    if "words" in asked:
        found |= measure(model, asked["words"], decoding, exactness(*WORDS_ASKED))
    if "box" in asked:
        boxes = measure(model, asked["box"], decoding, locating(tokenizer))
        own = {f"box_{name}": boxes.pop(name) for name in ("tokens_per_forward", "seconds")}
        found |= {**boxes, **own}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the scores, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT, help="checkpoint, default: %(default)s")
    parser.add_argument("--parent", type=Path, help="Qwen3-VL folder that it comes from")
    parser.add_argument("--scenes", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--about", nargs="+", choices=ABOUT, default=ABOUT, help="default: all")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="another setting of `generate`; repeatable"
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    given = parser.parse_args(arguments)
    settings = build_settings({}, given.set).explicit()
    found = score(given.folder, given.parent, given.scenes, given.threshold, settings, given.about)
    text = json.dumps(found, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
