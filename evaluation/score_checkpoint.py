"""Score a checkpoint of the small-scale study on scenes that it has never seen.

    python -m bard_vl.evaluation.score_checkpoint [FOLDER] [--parent FOLDER] [--set NAME=VALUE] [--json FILE]

Every scene is asked for its caption and for one thing more; an answer counts if all its tokens are right. With --parent
the autoregressive model that the checkpoint comes from answers the same questions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration

from ..app.session import build_settings
from ..processing_bard_vl import BardVLProcessor
from .cells import Decoding
from .experiment import answer, encode, measure
from .scenes import conversations

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
SCENES_SEED = 1  # the study's is 0


def score(
    folder: Path, parent: Path | None, num_scenes: int, threshold: float | None, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Exact answers and tokens per forward of a checkpoint at a threshold, or its own; the parent's exact answers.

    `settings` of `generate` take the place of the checkpoint's.
    """
    processor = BardVLProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    model.generation_config.update(**(settings or {}))
    threshold = model.generation_config.confidence_threshold if threshold is None else threshold
    samples = encode(processor, model.config, conversations(True, SCENES_SEED, num_scenes))
    lengths = [len(answer(sample)) for sample in samples]
    found = {
        "scenes": num_scenes,
        "answers": len(samples),
        "shortest_answer": min(lengths),
        "mean_answer": round(sum(lengths) / len(lengths), 1),
        "longest_answer": max(lengths),
        "block_size": model.config.block_size,
        **({"settings": settings} if settings else {}),
        "checkpoint": measure(model, samples, Decoding(threshold)),
    }
    if parent is not None:
        found["parent"] = measure(Qwen3VLForConditionalGeneration.from_pretrained(parent).eval(), samples, Decoding())
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the scores, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT, help="checkpoint, default: %(default)s")
    parser.add_argument("--parent", type=Path, help="Qwen3-VL folder that it comes from")
    parser.add_argument("--scenes", type=int, default=512, help="each with two answers, default: %(default)s")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="another setting of `generate`; repeatable"
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    given = parser.parse_args(arguments)
    settings = build_settings({}, given.set).explicit()
    text = json.dumps(score(given.folder, given.parent, given.scenes, given.threshold, settings), indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
