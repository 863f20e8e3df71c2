"""Progressive block merging (arXiv 2604.16514, section 3.1): train at block sizes that grow, each from the one before.

    accelerate launch -m bard_vl.training.merge_blocks recipe.yaml [--key value ...]

The run's folder gets one checkpoint folder a stage, `block-4`, `block-8` and so on. The same command goes on after an
interruption: finished stages are kept, an unfinished one continues from its last checkpoint. With one block size it is
plain fine-tuning at that size.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..app.terminal import counted
from .arguments import BlockDiffusionArguments, DataArguments, MergeArguments, ModelArguments, require
from .stages import Run, Stage, check_inputs, find, run_recipe, run_stage, start_folder

RECIPE = (ModelArguments, DataArguments, BlockDiffusionArguments, MergeArguments)


def merge_blocks(
    model: ModelArguments, data: DataArguments, args: BlockDiffusionArguments, schedule: MergeArguments
) -> list[Path]:
    """Run the schedule, or what is left of it; returns the stages' checkpoint folders."""
    run = Run(model, data, args)
    stages = plan(run, schedule)
    folders = [run_stage(run, stage) for stage in stages]
    if args.should_save:
        shutil.rmtree(run.output / "start", ignore_errors=True)
    return folders


def plan(run: Run, schedule: MergeArguments) -> list[Stage]:
    """The stages of a schedule, after everything that they name has been checked."""
    args, source = run.args, str(run.model.model_name_or_path)
    job = None
    sizes = schedule.block_sizes
    if sizes is None:
        job = find(source, run.model.model_revision)
        stated = job.trained_block_size
        require(stated is not None, f"{job.name} states no block size: set `block_sizes`")
        sizes = [stated or 0]
    steps: list[Any] = schedule.steps_per_stage or [None] * len(sizes)
    for count in filter(None, steps):
        told = f"`warmup_steps` {args.warmup_steps:g} leaves none of {counted(count, 'step')}"
        require(args.get_warmup_steps(count) < count, told)
    require(
        args.max_steps > 0 or schedule.steps_per_stage is not None or not run.data.streaming,
        "a stream has no epochs: `streaming` needs `max_steps` or `steps_per_stage`",
    )
    outputs = [run.output / f"block-{size}" for size in sizes]
    first = outputs[0]
    if not first.exists():  # the source is needed no more once its first stage is there
        job = job or find(source, run.model.model_revision)
        check_inputs(run, job, sizes[0])
        first = start_folder(run, job, sizes[0])
    return [
        Stage(source, size, output, count, number)
        for number, (source, size, output, count) in enumerate(
            zip([first, *outputs], sizes, outputs, steps, strict=False)
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line."""
    return run_recipe(RECIPE, merge_blocks, arguments)


if __name__ == "__main__":
    sys.exit(main())
