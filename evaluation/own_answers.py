"""A trial of self-distillation: does the small checkpoint decode more tokens per forward for as many right answers?

    python -m bard_vl.evaluation.own_answers FOLDER [--scenes 640] [--steps 80] [--rate 3e-4] [--json FILE]

Every arm trains the embedded checkpoint on the same scenes for as many steps: by cross entropy on the answers in the
data, or on its own ones that are exact, in the recorded states, with and without certainty. All are scored on held-out
scenes at several thresholds. The same command goes on after an interruption.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from ..app.checkpoints import EMBEDDED
from ..processing_bard_vl import BardVLProcessor
from ..training import merge_blocks, self_distill
from .cells import Decoding
from .experiment import encode, exactness, measure
from .grounding import write_chats
from .scenes import WORDS_ASKED, conversations
from .score_checkpoint import SCENES_SEED
from .tiny_model import write_json

TRAINING_SEED = 2  # of scenes that the checkpoint was not trained on
THRESHOLDS = (0.5, 0.7, 0.9)
FIGURES = ("threshold", "exact", "captions", "questions", "tokens_per_forward")
OWN = {"accept": "exact", "answer_max_new_tokens": 96, "answer_batch_size": 64}
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cross entropy": (merge_blocks, {}),
    "own answers": (self_distill, OWN),
    "own answers, certainty 0.5": (self_distill, {**OWN, "certainty_weight": 0.5}),
}
RECIPE = {
    "model_name_or_path": str(EMBEDDED),
    "noise": "mask",
    "time_sampling": "stratified",
    "padding_weight": 0.5,
    "max_length": 320,
    "per_device_train_batch_size": 16,
    "logging_steps": 20,
    "show_answers": 0,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


def train(arm: str, folder: Path, steps: int, rate: float) -> Path:
    """Train an arm, or find it trained; its checkpoint."""
    module, settings = ARMS[arm]
    name = arm.replace(",", "").replace(" ", "-")
    given = {**RECIPE, **settings, "train_data": str(folder / "words" / "chats.jsonl")}
    given |= {"max_steps": steps, "warmup_steps": min(8, steps - 1), "learning_rate": rate}
    if module is self_distill:
        given["answers"] = str(folder / "answers")  # all arms learn the same ones
    flags = [f"--{key}={value}" for key, value in {**given, "output_dir": folder / name}.items()]
    if module.main(flags):
        raise SystemExit(1)
    return folder / name / "block-32"


def score(checkpoint: Path, num_scenes: int) -> list[dict[str, Any]]:
    """Exact answers and tokens per forward at every threshold."""
    processor = BardVLProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    samples = encode(processor, model.config, conversations(True, SCENES_SEED, num_scenes))
    found = (measure(model, samples, Decoding(threshold), exactness(*WORDS_ASKED)) for threshold in THRESHOLDS)
    return [{name: scores[name] for name in FIGURES} for scores in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score what is left; write the scores as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--scenes", type=int, default=640, help="to train on, two chats each, default: %(default)s")
    parser.add_argument("--held-out", type=int, default=256, help="scenes to score on, default: %(default)s")
    parser.add_argument("--steps", type=int, default=80, help="of 16 chats, default: %(default)s")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate, default: %(default)s")
    parser.add_argument("--json", type=Path, help="the scores; those that are there already are kept")
    given = parser.parse_args(arguments)
    if not (given.folder / "words").exists():
        write_chats(given.folder / "words", given.scenes, seed=TRAINING_SEED, about="words")
    path = given.json or given.folder / "scores.json"
    asked = {"scenes": given.scenes, "steps": given.steps, "rate": given.rate, "answers": 2 * given.held_out}
    known = json.loads(path.read_text("utf-8")) if path.exists() else {**asked, "scores": {}}
    if asked != {name: known[name] for name in asked}:
        parser.error(f"{path} has the scores of another trial")
    for arm in ("before", *ARMS):
        if arm not in known["scores"]:
            checkpoint = EMBEDDED if arm == "before" else train(arm, given.folder, given.steps, given.rate)
            known["scores"][arm] = score(checkpoint, given.held_out)
            write_json(path, known)
        print(arm, *known["scores"][arm], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
