"""The small-scale study: data, parent, conversion, training, decoding, tables and plots by one command.

    python -m bard_vl.evaluation.small_study [--scale pilot] [--cells plain complementary ...] [--seeds 0 1 2]

Cell by cell: every finished cell is one JSON file, which is not computed again; the trained stages that cells share are
kept in the work folder. Several processes may run beside each other, each takes the cells that are left. The report is
made from the JSON files at the end, or by `--report` alone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from ..configuration_bard_vl import BardVLConfig
from ..convert_qwen3vl_to_bard import convert
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from ..training.checkpoints import damage
from ..training.packing import Sample
from .cells import ANCHOR, FIXED_CELLS, LARGER_ANCHOR, LARGER_CELLS, PILOT_CELLS, Cell, Stage
from .experiment import (
    answer,
    encode,
    exactness,
    held_out_cross_entropy,
    measure,
    reading,
    right_context,
    train_stage,
)
from .report import read_run, write_report
from .scenes import TEXTS, WORDS_ASKED
from .tiny_model import MASK_TOKEN_ID, Shape, train_autoregressive, write_json, write_parent

RESULTS = Path(__file__).with_name("results")
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bard-vl-study"
SCENES_SEED = 0
ROLES = ["user\n", "assistant\n"] * 10  # often enough to become whole tokens
PARENT_SEED = 0  # seeds of the study vary what comes after the parent


NORMAL = Shape()


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Attributes:
        name: also of its folders.
        about: for the reader of its help.
        texts: what is said of the pictures, a name in `TEXTS`.
        cells: all of it.
        anchor: the teacher of the cells that have one, trained once, with the parent's seed.
        scenes, held_out_scenes: pictures; each has a caption, and a question too if texts are fixed.
        parent_steps: optimizer steps of the parent's autoregressive training.
        unit: optimizer steps of a unit.
        batch_size: samples of a step.
        rate: peak learning rate of the stages.
        parent_rate: that of the parent.
        shape: of the parent.
    """

    name: str
    about: str
    texts: str
    cells: tuple[Cell, ...]
    anchor: tuple[Stage, ...]
    scenes: int
    held_out_scenes: int
    parent_steps: int
    unit: int
    batch_size: int = 16
    rate: float = 3e-3
    parent_rate: float = 1e-3
    shape: Shape = NORMAL

    def sizes(self) -> dict[str, Any]:
        """What a reader of a cell's figures should know."""
        return {name: getattr(self, name) for name in ("texts", "scenes", "parent_steps", "unit", "batch_size", "rate")}


PILOT = Scale("pilot", "200 steps, and 150 to finish", "free", PILOT_CELLS, ANCHOR, 8000, 256, 6000, 50)
LARGER = Scale(
    *("larger", "1,200 steps: 5.5 hours for 4 seeds on two cores", "free", LARGER_CELLS, LARGER_ANCHOR),
    *(8000, 1024, 6000, 50),
)
FIXED = Scale("fixed", "captions of one form", "fixed", FIXED_CELLS, (), 8000, 256, 1500, 100, rate=1e-3)
SMOKE_CELLS = tuple(cell for cell in PILOT_CELLS if cell.name in ("plain", "complementary", "fair-swd", "parent"))
SMOKE = Scale(
    *("smoke", "seconds, whose numbers say nothing", "free", SMOKE_CELLS, ANCHOR, 8, 2, 2, 1, 2),
    shape=Shape(64, 1, 64, 32, 1),
)
SCALES = {scale.name: scale for scale in (PILOT, LARGER, FIXED, SMOKE)}


class Study:
    """Computes cells of one scale and seed; everything that may be used again is kept in `work`."""

    def __init__(self, scale: Scale, seed: int, work: Path):
        self.scale, self.seed, self.root, self.work = scale, seed, work, work / scale.name
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, cell: Cell, scores: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Train and measure a cell: its figures after each way of decoding that `scores`, of the first ones, lack."""
        if cell.stages:
            model, training = self.trained(cell.stages)
        else:
            model, training = Qwen3VLForConditionalGeneration.from_pretrained(self.parent()).eval(), []
        lengths = [len(answer(sample)) for sample in self.held_out]
        figures = {
            "cell": cell.name,
            "seed": self.seed,
            "block_size": cell.block_size,
            "steps": cell.units * self.scale.unit,
            **self.scale.sizes(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "stages": [asdict(stage) | how for stage, how in zip(cell.stages, training, strict=True)],
            "answers": len(lengths),
            "answer_length": round(sum(lengths) / len(lengths), 1),
        }
        tokenizer, is_free = self.processor.tokenizer, self.scale.texts == "free"
        judge = reading(tokenizer) if is_free else exactness(*WORDS_ASKED)
        if is_free and cell.stages:
            with tempfile.TemporaryDirectory() as folder:
                entropy = held_out_cross_entropy(model, self.held_out, self.processor, Path(folder))
            figures |= {"cross_entropy": entropy, "right_context": right_context(model, self.held_out, tokenizer)}
        for decoding in cell.decodings[len(scores) :]:
            scores = [*scores, measure(model, self.held_out, decoding, judge)]
            yield {**figures, "scores": scores}

    def publish(self, cell: Cell, output: Path) -> None:
        """Write a cell's checkpoint without code, which loads wherever this package is installed."""
        self.trained(cell.stages)
        output.mkdir(parents=True)
        for folder in (self.start(), self.stage_folder(cell.stages)):
            for path in folder.glob("*.json"):
                settings = json.loads(path.read_text("utf-8"))
                settings.pop("auto_map", None)
                write_json(output / path.name, settings)
        (output / "how.json").unlink()
        shutil.copyfile(self.stage_folder(cell.stages) / "model.safetensors", output / "model.safetensors")

    # --- Data and parent ----------------------------------------------------------------------------------------------

    def random(self) -> Path:
        """Folder of the untrained parent, which has the tokenizer and the processor of all models."""
        folder = self.work / "random"
        with once(folder) as partial:
            if partial:
                chats = TEXTS[self.scale.texts](False, SCENES_SEED, min(self.scale.scenes, 2000))
                texts = [text for _, *said in chats for text in said]
                write_parent(partial, texts + ROLES, self.scale.shape, PARENT_SEED)
        return folder

    @cached_property
    def processor(self) -> BardVLProcessor:
        """Of every model of the study."""
        return BardVLProcessor.from_pretrained(self.random())

    @cached_property
    def train(self) -> list[Sample]:
        """Samples to train on."""
        return self.samples("train", self.scale.scenes)

    @cached_property
    def held_out(self) -> list[Sample]:
        """Samples of scenes that no training has seen."""
        return self.samples("held-out", self.scale.held_out_scenes)

    def samples(self, split: str, num_scenes: int) -> list[Sample]:
        """Encoded scenes, kept in a file."""
        folder = self.work / split
        with once(folder) as partial:
            if partial:
                settings = json.loads((self.random() / "config.json").read_text())
                config = BardVLConfig(**{name: value for name, value in settings.items() if name != "model_type"})
                chats = TEXTS[self.scale.texts](split == "held-out", SCENES_SEED, num_scenes)
                write_samples(encode(self.processor, config, chats), partial / "samples.safetensors")
        return read_samples(folder / "samples.safetensors")

    def parent(self) -> Path:
        """Folder of the trained autoregressive parent."""
        folder, scale = self.work / "parent", self.scale
        with once(folder) as partial:
            if partial:
                shutil.copytree(self.random(), partial, dirs_exist_ok=True)
                model = Qwen3VLForConditionalGeneration.from_pretrained(partial)
                train_autoregressive(
                    model, self.train, scale.parent_steps, scale.batch_size, scale.parent_rate, PARENT_SEED
                )
                model.save_pretrained(partial)
        return folder

    def start(self) -> Path:
        """The parent as a Bard-VL folder, by the package's converter."""
        folder = self.work / "start"
        with once(folder) as partial:
            if partial:
                partial.rmdir()
                convert(self.parent(), partial, 4, MASK_TOKEN_ID, progress=False)
        return folder

    # --- Training -----------------------------------------------------------------------------------------------------

    def trained(self, stages: tuple[Stage, ...]) -> tuple[BardVLForConditionalGeneration, list[dict[str, float]]]:
        """The parent after `stages`, and what each of them took; every stage is trained once and kept."""
        if not stages:
            return load(self.start()), []
        *before, stage = stages
        folder = self.stage_folder(stages)
        with once(folder) as partial:
            if partial:
                source = self.trained(tuple(before))[0]
                how = train_stage(
                    source,
                    stage,
                    self.train,
                    self.processor,
                    steps=stage.units * self.scale.unit,
                    batch_size=self.scale.batch_size,
                    learning_rate=self.scale.rate,
                    seed=self.seed * 8 + len(before),  # a cell has fewer stages
                    folder=partial,
                    teacher=self.teacher(stage),
                )
                source.save_pretrained(partial)
                (partial / "how.json").write_text(json.dumps(how))
        return load(folder), [self.how(stages[: number + 1]) for number in range(len(stages))]

    def how(self, stages: tuple[Stage, ...]) -> dict[str, float]:
        """The cost of the last of `stages`; one whose folder is damaged is trained again."""
        folder = self.stage_folder(stages)
        if damage(folder) is not None:
            self.trained(stages)
        return json.loads((folder / "how.json").read_text())

    def stage_folder(self, stages: tuple[Stage, ...]) -> Path:
        """The folder of the result of `stages`: one for each history."""
        digest = hashlib.sha256(repr((self.seed, stages)).encode()).hexdigest()[:12]
        return self.work / "stages" / f"block-{stages[-1].block_size}-{digest}"

    def teacher(self, stage: Stage) -> BardVLForConditionalGeneration | None:
        """The frozen model that a stage learns from."""
        if stage.teacher is None:
            return None
        if stage.teacher == "autoregressive":
            return load(self.start())
        return Study(self.scale, PARENT_SEED, self.root).trained(self.scale.anchor)[0]


def load(folder: Path) -> BardVLForConditionalGeneration:
    """A checkpoint in float32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return BardVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def write_samples(samples: list[Sample], path: Path) -> None:
    """Write samples as tensors whose names begin with the sample's number."""
    tensors: dict[str, torch.Tensor] = {}
    for number, sample in enumerate(samples):
        parts = {name: getattr(sample, name) for name in ("input_ids", "position_ids", "visual_index")}
        parts |= {"responses": torch.tensor(sample.responses)}
        parts |= {name: torch.tensor(getattr(sample, name)) for name in ("sample_id", "merge_size")}
        tensors |= {f"{number} {name}": part.clone() for name, part in {**parts, **sample.visual_inputs}.items()}
    save_file(tensors, path)


def read_samples(path: Path) -> list[Sample]:
    """The samples that `write_samples` wrote."""
    samples: dict[int, dict[str, Any]] = {}
    for key, part in load_file(path).items():
        number, _, name = key.partition(" ")
        samples.setdefault(int(number), {})[name] = part
    return [
        Sample(
            input_ids=parts.pop("input_ids"),
            position_ids=parts.pop("position_ids"),
            responses=[(start, end) for start, end in parts.pop("responses").tolist()],
            visual_index=parts.pop("visual_index"),
            sample_id=int(parts.pop("sample_id")),
            merge_size=int(parts.pop("merge_size")),
            visual_inputs=parts,
        )
        for _, parts in sorted(samples.items())
    ]


def make_private(folder: Path) -> None:
    """Make a folder that no other user can write to; exit where there is one that others can."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SystemExit(f"error: {folder} is another user's, or others can write to it: choose another --work")


@contextlib.contextmanager
def once(path: Path) -> Iterator[Path | None]:
    """Make a folder once, whoever comes first, and whole: yields where to write it, or None where it is there.

    One that was whole and is damaged is named, and made again.
    """
    with locked(path):
        fault = damage(path) if path.exists() else None
        if path.exists() and fault is None:
            yield None
            return
        if fault is not None:
            print(f"{path} is damaged and made again: {fault}", file=sys.stderr, flush=True)
            shutil.rmtree(path)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)


def locked(path: Path, wait: bool = True) -> FileLock:
    """The lock of a path among processes, for `with`; without waiting, `Timeout` if another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)


def known_scores(path: Path) -> list[dict[str, Any]]:
    """The scores of a cell that are there; damaged figures are named, and do not count."""
    try:
        return read_run(path)["scores"] if path.exists() else []
    except ValueError as error:
        print(f"{error}: it is measured again", file=sys.stderr, flush=True)
        return []


def run_cells(cells: list[Cell], seeds: list[int], scale: Scale, work: Path, results: Path) -> None:
    """Run what is neither finished nor being run by another process; figures are written as they come."""
    for seed in seeds:
        study = Study(scale, seed, work)
        # All seeds have one parent and one anchor.
        for cell in (each for each in cells if seed == PARENT_SEED or each.stages not in ((), scale.anchor)):
            path = results / f"{cell.name}-seed-{seed}.json"
            with contextlib.suppress(Timeout), locked(work / scale.name / path.name, wait=False):
                scores = known_scores(path)
                if len(scores) < len(cell.decodings):
                    print(f"{cell.name}, seed {seed}", flush=True)
                    for figures in study.run(cell, scores):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        partial = path.with_suffix(".partial")
                        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
                        partial.rename(path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scales = "; ".join(f"{scale.name}: {scale.about}" for scale in SCALES.values())
    parser.add_argument("--scale", choices=SCALES, default=PILOT.name, help=f"{scales}; default: %(default)s")
    parser.add_argument("--smoke", dest="scale", action="store_const", const=SMOKE.name, help="short for --scale smoke")
    parser.add_argument("--cells", nargs="+", help="default: all of the scale's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder for what can be made again; default: %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, help="folder of the JSON files; the package's own, but for the smoke scale"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="write the checkpoint of the one cell of --cells"
    )
    parser.add_argument("--report", action="store_true", help="only write the report from the JSON files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the study and write its report."""
    given = parse_arguments(arguments)
    scale = SCALES[given.scale]
    unknown = set(given.cells or ()) - {cell.name for cell in scale.cells}
    if unknown:
        raise SystemExit(f"error: the scale {scale.name} has no cell {', '.join(sorted(unknown))}")
    if given.threads:
        torch.set_num_threads(given.threads)
    results = given.results or (given.work / "results" if scale is SMOKE else RESULTS)
    make_private(given.work)
    cells = [cell for cell in scale.cells if given.cells is None or cell.name in given.cells]
    if given.publish is not None:
        if len(cells) != 1:
            raise SystemExit(f"error: --publish writes one cell's checkpoint, --cells names {len(cells)}")
        Study(scale, given.seeds[0], given.work).publish(cells[0], given.publish)
        return
    if not given.report:
        run_cells(cells, given.seeds, scale, given.work, results / scale.name)
    try:
        print(write_report(results, results.parent))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
