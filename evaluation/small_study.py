"""The small-scale study: data, parent, conversion, training, decoding, tables and plots by one command.

    python -m bard_vl.evaluation.small_study [--smoke | --quick] [--cells warm-32 direct-32 ...] [--seeds 0 1 2]

Cell by cell: every finished cell is one JSON file, which is not computed again; the trained stages that cells share are
kept in the work folder. Several processes may run beside each other, each takes the cells that are left. The report is
made from the JSON files at the end, or by `--report` alone.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from ..configuration_bard_vl import BardVLConfig
from ..convert_qwen3vl_to_bard import convert
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from ..training.checkpoints import damage
from ..training.packing import Sample
from .cells import CELLS, LONG_ANCHOR, SIZES, Cell, Stage, merging
from .experiment import answer, encode, measure, measure_autoregressive, train_stage
from .report import read_run, write_report
from .scenes import conversations
from .tiny_model import MASK_TOKEN_ID, Shape, train_autoregressive, write_json, write_parent

RESULTS = Path(__file__).with_name("results")
WORK = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bard-vl-study"
SCENES_SEED = 0
ROLES = ["user\n", "assistant\n"] * 10  # often enough to become whole tokens
PARENT_SEED = 0  # seeds of the study vary what comes after the parent

NORMAL, LARGE = Shape(), Shape(hidden=192, intermediate=576)


@dataclass(frozen=True)
class Scale:
    """The size of a study.

    Attributes:
        name: also of its folder in the work folder.
        cells: what runs unless `--cells` says otherwise, None for all.
        scenes, held_out_scenes: pictures, each with a caption and a question.
        parent_steps: optimizer steps of the parent's autoregressive training.
        unit: optimizer steps of a unit.
        batch_size: samples of a step.
        rate: peak learning rate.
        shape, large_shape: of the parent, and of the parent of the larger teacher.
    """

    name: str
    cells: tuple[str, ...] | None
    scenes: int
    held_out_scenes: int
    parent_steps: int
    unit: int
    batch_size: int = 16
    rate: float = 1e-3
    shape: Shape = NORMAL
    large_shape: Shape = LARGE


CLAIMS = ("direct-16", "warm-16", "swd-16", "parent")
FULL = Scale("full", None, 8000, 256, 1500, 100)
QUICK = Scale("quick", CLAIMS, 3000, 64, 900, 40)
SMOKE = Scale("smoke", CLAIMS, 8, 2, 2, 1, 2, 1e-3, Shape(64, 1, 64, 32, 1), Shape(64, 2, 64, 32, 1))


class Study:
    """Computes cells of one scale and seed; everything that may be used again is kept in `work`."""

    def __init__(self, scale: Scale, seed: int, work: Path):
        self.scale, self.seed, self.work = scale, seed, work / scale.name
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure a cell."""
        if cell.block_size:
            model, training = self.trained(cell.stages)
            scores = [measure(model, self.held_out, decoding) for decoding in cell.decodings]
        else:
            model, training = self.autoregressive(cell.stages)
            scores = [measure_autoregressive(model, self.held_out)]
        return {
            "cell": cell.name,
            "seed": self.seed,
            "block_size": cell.block_size,
            "steps": cell.units * self.scale.unit,
            "batch_size": self.scale.batch_size,
            "stages": [asdict(stage) | how for stage, how in zip(cell.stages, training, strict=True)],
            "answers": len(self.held_out),
            "answer_length": round(sum(len(answer(sample)) for sample in self.held_out) / len(self.held_out), 1),
            "scores": scores,
        }

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

    def random(self, large: bool = False) -> Path:
        """Folder of the untrained parent, which has the tokenizer and the processor of all models."""
        folder = self.work / ("large-random" if large else "random")
        with once(folder) as partial:
            if partial:
                chats = conversations(False, SCENES_SEED, min(self.scale.scenes, 2000))
                texts = [text for _, *said in chats for text in said]
                write_parent(partial, texts + ROLES, self.scale.large_shape if large else self.scale.shape, PARENT_SEED)
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
                chats = conversations(split == "held-out", SCENES_SEED, num_scenes)
                write_samples(encode(self.processor, config, chats), partial / "samples.safetensors")
        return read_samples(folder / "samples.safetensors")

    def parent(self, large: bool = False) -> Path:
        """Folder of the trained autoregressive parent."""
        folder, scale = self.work / ("large-parent" if large else "parent"), self.scale
        with once(folder) as partial:
            if partial:
                shutil.copytree(self.random(large), partial, dirs_exist_ok=True)
                model = Qwen3VLForConditionalGeneration.from_pretrained(partial)
                train_autoregressive(model, self.train, scale.parent_steps, scale.batch_size, scale.rate, PARENT_SEED)
                model.save_pretrained(partial)
        return folder

    def start(self, large: bool = False) -> Path:
        """The parent as a Bard-VL folder, by the package's converter."""
        folder = self.work / ("large-start" if large else "start")
        with once(folder) as partial:
            if partial:
                partial.rmdir()
                convert(self.parent(large), partial, 4, MASK_TOKEN_ID, progress=False)
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
                source = load(self.start(stage.large)) if not before else self.trained(tuple(before))[0]
                how = train_stage(
                    source,
                    stage,
                    self.train,
                    self.processor,
                    steps=stage.units * self.scale.unit,
                    batch_size=self.scale.batch_size,
                    learning_rate=self.scale.rate,
                    seed=self.seed * len(SIZES) * 2 + len(before),
                    folder=partial,
                    teacher=self.teacher(stages),
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

    def teacher(self, stages: tuple[Stage, ...]) -> BardVLForConditionalGeneration | None:
        """The frozen model that the last stage learns from."""
        name = stages[-1].teacher
        if name is None:
            return None
        if name == "autoregressive":
            return load(self.start())
        chains = {"anchor": stages[:1], "long anchor": LONG_ANCHOR, "large anchor": merging(4, large=True)}
        return self.trained(chains[name])[0]

    def autoregressive(
        self, stages: tuple[Stage, ...]
    ) -> tuple[Qwen3VLForConditionalGeneration, list[dict[str, float]]]:
        """The parent, trained further as it was before."""
        model = Qwen3VLForConditionalGeneration.from_pretrained(self.parent())
        scale, start = self.scale, time.monotonic()
        how = []
        for stage in stages:
            steps = stage.units * scale.unit
            loss = train_autoregressive(model, self.train, steps, scale.batch_size, scale.rate, self.seed + 1)
            how.append({"seconds": round(time.monotonic() - start, 1), "loss": round(loss, 4)})
        return model.eval(), how


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


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a path among processes; without waiting, `BlockingIOError` if another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def is_measured(path: Path) -> bool:
    """Whether a cell's figures are there; damaged ones are named, and do not count."""
    if not path.exists():
        return False
    try:
        read_run(path)
    except ValueError as error:
        print(f"{error}: it is measured again", file=sys.stderr, flush=True)
        return False
    return True


def run_cells(cells: list[Cell], seeds: list[int], scale: Scale, work: Path, results: Path) -> None:
    """Run what is neither finished nor being run by another process."""
    for seed in seeds:
        study = Study(scale, seed, work)
        for cell in cells:
            path = results / f"{cell.name}-seed-{seed}.json"
            with contextlib.suppress(BlockingIOError), locked(work / scale.name / path.name, wait=False):
                if not is_measured(path):
                    print(f"{cell.name}, seed {seed}", flush=True)
                    text = json.dumps(study.run(cell), indent=1)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial = path.with_suffix(".partial")
                    partial.write_text(text + "\n", encoding="utf-8")
                    partial.rename(path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="scale", action="store_const", const=QUICK, default=FULL, help="under 15 minutes")
    size.add_argument(
        "--smoke", dest="scale", action="store_const", const=SMOKE, help="seconds; the numbers say nothing"
    )
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], help="default: all of the scale's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder for what can be made again; default: %(default)s"
    )
    parser.add_argument("--results", type=Path, help="folder of the JSON files; the full study's are the package's own")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="write the checkpoint of the one cell of --cells"
    )
    parser.add_argument("--report", action="store_true", help="only write the report from the JSON files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the study and write its report."""
    given = parse_arguments(arguments)
    scale = given.scale
    if given.threads:
        torch.set_num_threads(given.threads)
    results = given.results or (RESULTS if scale is FULL else given.work / scale.name / "results")
    make_private(given.work)
    names = given.cells or scale.cells
    cells = [cell for cell in CELLS if names is None or cell.name in names]
    if given.publish is not None:
        if len(cells) != 1:
            raise SystemExit(f"error: --publish writes one cell's checkpoint, --cells names {len(cells)}")
        Study(scale, given.seeds[0], given.work).publish(cells[0], given.publish)
        return
    if not given.report:
        run_cells(cells, given.seeds, scale, given.work, results)
    output = Path(__file__).parent if results == RESULTS else results.parent
    try:
        print(write_report(results, output))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
