"""Self-distillation: a model learns from its own answers, in the order in which it committed their tokens.

    accelerate launch -m bard_vl.training.self_distill recipe.yaml [--key value ...]

The model answers the training prompts (`answers/` in the run's folder), the answers that `accept` accepts are kept, and
training shows of each what stood visible before a random step of its own decoding (arXiv 2509.26488, 2601.07568). The
checkpoint is `block-N`, N the model's own block size. The same command goes on after an interruption: what is answered
is not asked again, and training resumes as in `merge_blocks`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import BlockDiffusionArguments, DataArguments, ModelArguments, SelfDistillArguments, require
from .stages import Run, Stage, check_inputs, find, run_recipe, run_stage

RECIPE = (ModelArguments, DataArguments, BlockDiffusionArguments, SelfDistillArguments)


def self_distill(
    model: ModelArguments, data: DataArguments, args: BlockDiffusionArguments, settings: SelfDistillArguments
) -> list[Path]:
    """Write the answers and train on them, or do what is left of it; returns the checkpoint's folder."""
    run = Run(model, data, args)
    return [run_stage(run, plan(run, settings))]


def plan(run: Run, settings: SelfDistillArguments) -> Stage:
    """The one stage, after everything that it names has been checked."""
    job = find(str(run.model.model_name_or_path), run.model.model_revision)
    require(job.is_bard, f"{job.name} is autoregressive, its answers have no order of commitment: name a Bard-VL")
    size = job.trained_block_size
    require(size is not None, f"{job.name} states no block size: finetune it by `merge_blocks` first")
    assert size is not None
    require(not run.data.streaming, "own answers are those to measured chats: leave `streaming` out")
    require(
        settings.states == "random" or run.args.loss_form != "inverse_time",
        "`loss_form: inverse_time` divides by a probability of noise, which `states: recorded` has not",
    )
    output = run.output / f"block-{size}"
    require(output.resolve() != job.folder.resolve(), f"the model {job.name} is in `output_dir`: choose another")
    check_inputs(run, job, size)
    return Stage(job.folder, size, output, own_answers=settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe from the command line."""
    return run_recipe(RECIPE, self_distill, arguments)


if __name__ == "__main__":
    sys.exit(main())
