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

from .arguments import BlockDiffusionArguments, DataArguments, MergeArguments, ModelArguments, require
from .stages import Run, Stage, check_source, find, run_recipe, run_stage, start_folder, stated_block_size

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
    args = run.args
    job = find(str(run.model.model_name_or_path), run.model.model_revision)
    sizes = schedule.block_sizes or [stated_block_size(job) or 0]
    require(sizes[0] > 0, f"{job.name} states no block size: set `block_sizes`")
    steps = schedule.steps_per_stage or [None] * len(sizes)
    for count in steps:
        warmup = 0 if count is None else args.get_warmup_steps(count)
        require(count is None or warmup < count, f"`warmup_steps` {args.warmup_steps} leaves none of {count} steps")
    require(
        args.max_steps > 0 or schedule.steps_per_stage is not None or not run.data.streaming,
        "a stream has no epochs: `streaming` needs `max_steps` or `steps_per_stage`",
    )
    check_source(run, job, sizes[0])
    outputs = [run.output / f"block-{size}" for size in sizes]
    finished = next((number for number, output in enumerate(outputs) if not output.exists()), len(sizes))
    first = start_folder(run, job, sizes[0]) if finished == 0 else job.folder
    sources = [first, *outputs]
    return [
        Stage(source, size, output, count, number)
        for number, (source, size, output, count) in enumerate(zip(sources, sizes, outputs, steps, strict=False))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line."""
    return run_recipe(RECIPE, merge_blocks, arguments)


if __name__ == "__main__":
    sys.exit(main())
