"""Stage-wise distillation (arXiv 2604.16514, section 3.2): a large-block student, a fixed small-block teacher.

    accelerate launch -m bard_vl.training.distill recipe.yaml [--key value ...]

`model_name_or_path` is a checkpoint folder, or the folder of a block-merging run: then every stage of it but the anchor
is distilled, or those that `block_sizes` names. The teacher is the run's stage of the smallest block size unless
`teacher_name_or_path` names another. It resumes as `merge_blocks` does.
"""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import BlockDiffusionArguments, DataArguments, DistillArguments, ModelArguments, require
from .stages import (
    Run,
    Stage,
    check_inputs,
    check_teacher,
    find,
    run_recipe,
    run_stage,
    start_folder,
)

RECIPE = (ModelArguments, DataArguments, BlockDiffusionArguments, DistillArguments)
BLIND = (
    "`ce_weight: 0` with `kd_positions: all` teaches students to ignore what the teacher cannot see, the tokens shown "
    "behind its smaller blocks: answers came out worse than without distillation; set `kd_positions: fair`, or a weight"
)
logger = logging.getLogger(__name__)


def distill(
    model: ModelArguments, data: DataArguments, args: BlockDiffusionArguments, settings: DistillArguments
) -> list[Path]:
    """Distil the students, or those that are left; returns their checkpoint folders."""
    run = Run(model, data, args)
    stages = plan(run, settings)
    warn(run, settings)
    folders = [run_stage(run, stage) for stage in stages]
    if args.should_save:
        shutil.rmtree(run.output / "start", ignore_errors=True)
    return folders


def warn(run: Run, settings: DistillArguments) -> None:
    """Say, on one process, that settings have made models worse."""
    if settings.ce_weight == 0 and settings.kd_positions == "all" and run.args.should_save:
        logger.warning(BLIND)


def plan(run: Run, settings: DistillArguments) -> list[Stage]:
    """A stage for each student, after everything that they name has been checked."""
    require(run.args.max_steps > 0 or not run.data.streaming, "a stream has no epochs: `streaming` needs `max_steps`")
    stages = []
    for number, (size, source) in enumerate(students(run, settings).items()):
        job = find(source, run.model.model_revision)
        output = run.output / f"block-{size}"
        require(output.resolve() != Path(source).resolve(), f"the student {source} is in `output_dir`: choose another")
        teacher = settings.teacher_name_or_path or str(anchor(Path(source), size))
        taught_by = find(teacher)
        check_teacher(taught_by, job, size, settings)
        check_inputs(run, job, size)
        start = job.folder if output.exists() else start_folder(run, job, size)
        stages.append(Stage(start, size, output, None, number, taught_by.folder, settings))
    return stages


def students(run: Run, settings: DistillArguments) -> dict[int, str]:
    """The students' sources by block size."""
    name = str(run.model.model_name_or_path)
    found = stages_in(Path(name))
    if (Path(name) / "config.json").is_file() or not found:
        job = find(name, run.model.model_revision)
        sizes = settings.block_sizes or [job.trained_block_size or 0]
        require(sizes[0] > 0, f"{job.name} states no block size: set `block_sizes`")
        require(len(sizes) == 1, f"`block_sizes` {sizes} are several, {name} is one checkpoint")
        return {sizes[0]: name}
    sizes = settings.block_sizes or sorted(found)[1:]
    require(bool(sizes), f"{name} holds only the stage of block size {min(found)}")
    for size in sizes:
        require(size in found, f"`block_sizes` has {size}, {name} holds the stages {sorted(found)}")
    return {size: str(found[size]) for size in sizes}


def stages_in(folder: Path) -> dict[int, Path]:
    """Finished stages of a block-merging run, by block size."""
    found = (path.parent for path in folder.glob("block-*/config.json"))
    return {int(path.name.removeprefix("block-")): path for path in found if path.name[6:].isdigit()}


def anchor(student: Path, block_size: int) -> Path:
    """The smallest-block stage of the run that a student comes from."""
    smaller = {size: path for size, path in stages_in(student.parent).items() if size < block_size}
    require(
        bool(smaller),
        f"no teacher: beside {student} lies no stage of a smaller block size; set `teacher_name_or_path`",
    )
    return smaller[min(smaller)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line."""
    return run_recipe(RECIPE, distill, arguments)


if __name__ == "__main__":
    sys.exit(main())
