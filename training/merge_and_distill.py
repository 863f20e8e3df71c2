"""Block merging and distillation in turn (algorithm 1 of arXiv 2604.16514), each stage from the distilled one before.

    accelerate launch -m bard_vl.training.merge_and_distill merge.yaml distill.yaml [--key value ...]

The first recipe is one of `merge_blocks`, the second one of `distill`; a flag goes to each recipe that knows it. The
anchor, the smallest block size, is merged alone. Every later stage is merged from the distilled stage before it, then
distilled from the anchor or from the teacher that the second recipe names. Merged stages are in the first recipe's
`output_dir`, distilled ones in the second's. It resumes as `merge_blocks` does.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import distill, merge_blocks
from .arguments import DistillArguments, MergeArguments, RecipeError, parse_recipe, require
from .stages import Run, Stage, check_inputs, check_teacher, find, in_one_line, is_set, run_stage


def merge_and_distill(
    merging: Run, schedule: MergeArguments, distilling: Run, settings: DistillArguments
) -> list[Path]:
    """Run both recipes in turn, or what is left of them; returns the anchor's folder and the distilled ones."""
    distilling = replace(distilling, model=replace(distilling.model, model_name_or_path=str(merging.output)))
    stages = merge_blocks.plan(merging, schedule)
    check(merging, stages, distilling, settings)
    distill.warn(distilling, settings)
    folders: list[Path] = []
    for number, stage in enumerate(stages):
        merged = run_stage(merging, replace(stage, source=folders[-1]) if folders else stage)
        if not folders:
            folders.append(merged)
            continue
        distilling.args.deepspeed_plugin = None  # accelerate keeps the first stage's
        (taught,) = distill.plan(distilling, replace(settings, block_sizes=[stage.block_size]))
        folders.append(run_stage(distilling, replace(taught, number=number - 1)))
    if merging.args.should_save:
        shutil.rmtree(merging.output / "start", ignore_errors=True)
    return folders


def check(merging: Run, stages: list[Stage], distilling: Run, settings: DistillArguments) -> None:
    """Refuse recipes that do not go together, before the first stage."""
    sizes = [stage.block_size for stage in stages]
    require(len(sizes) > 1, f"`block_sizes` {sizes} is the anchor alone: there is nothing to distil")
    require(settings.block_sizes is None, "every stage but the anchor is distilled: leave `block_sizes` to merging")
    same = merging.output.resolve() == distilling.output.resolve()
    require(not same, f"both recipes have the `output_dir` {merging.output}: give each its own")
    if is_set("ACCELERATE_USE_DEEPSPEED") or merging.args.deepspeed:  # which is set up for one shape of batches
        shapes = [
            (run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps)
            for run in (merging, distilling)
        ]
        require(
            shapes[0] == shapes[1],
            "DeepSpeed needs the same `per_device_train_batch_size` and `gradient_accumulation_steps` in both recipes, "
            f"got {shapes[0]} and {shapes[1]}; or run `merge_blocks` and `distill` stage by stage",
        )
    first = stages[0].output if stages[0].output.exists() else stages[0].source
    job = find(str(first))
    for size in sizes[1:]:
        check_inputs(distilling, job, size)
        if settings.teacher_name_or_path is not None:
            check_teacher(find(settings.teacher_name_or_path), job, size, settings)
        else:
            size_of_anchor = settings.teacher_block_size or sizes[0]
            require(size % size_of_anchor == 0, f"an anchor at {size_of_anchor} cannot teach blocks of {size}")


def parse(words: Sequence[str]) -> tuple[Run, MergeArguments, Run, DistillArguments]:
    """Read `merge.yaml distill.yaml [--key value ...]`.

    Raises:
        RecipeError: as `parse_recipe` does, or there are not two recipes.
    """
    recipes, flags = list(words[:2]), list(words[2:])
    require(
        len(recipes) == 2 and not any(word.startswith("-") for word in recipes),
        "name two recipes, one of `merge_blocks` and one of `distill`",
    )
    names = [{field.name for kind in module.RECIPE for field in fields(kind)} for module in (merge_blocks, distill)]
    names[1].discard("block_sizes")
    own: tuple[list[str], list[str]] = ([], [])
    for flag in grouped(flags):
        name = flag[0][2:].split("=")[0].replace("-", "_").removeprefix("no_")
        require(name in names[0] | names[1], f"unknown argument {flag[0]!r}")
        for known, mine in zip(names, own, strict=True):
            mine += flag if name in known else []
    model, data, args, schedule = parse_recipe(merge_blocks.RECIPE, [recipes[0], *own[0]])
    student, chats, finish, settings = parse_recipe(distill.RECIPE, [recipes[1], *own[1]])
    return Run(model, data, args), schedule, Run(student, chats, finish), settings


def grouped(flags: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise RecipeError(f"unknown argument {word!r}")
    return groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Run two recipes from the command line."""
    words: Any = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return in_one_line(lambda: merge_and_distill(*parse(words)))


if __name__ == "__main__":
    sys.exit(main())
