"""The work of two processes in the tests of distributed training; started by accelerate."""

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from bard_vl.training import merge_blocks, self_distill
from bard_vl.training.trainer import BlockDiffusionTrainer

WAIT = timedelta(seconds=120)  # for the other process: one that never comes fails a test, instead of keeping it


def run(*recipes: str) -> None:
    """Run recipes through the entry point, one after the other."""
    for recipe in recipes:
        assert merge_blocks.main([recipe]) == 0


def own_answers(recipe: str) -> None:
    """Learn from own answers."""
    assert self_distill.main([recipe]) == 0


def killed(*recipes: str) -> None:
    """Run recipes, and the last one until a process dies, in the third step of its second stage."""
    run(*recipes[:-1])
    in_third_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(recipes[-1])


def in_third_step(act: Callable[[], None]) -> None:
    """Act once, when a stage of block size 8 begins its third step."""
    begin = BlockDiffusionTrainer.get_batch_samples

    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.block_size == 8 and self.state.global_step == 2:
            BlockDiffusionTrainer.get_batch_samples = begin
            act()
        return begin(self, *args, **kwargs)

    BlockDiffusionTrainer.get_batch_samples = acting


def interrupt() -> None:
    """The effect of a user's first signal."""
    raise KeyboardInterrupt


def sharded(*recipes: str) -> None:
    """Run recipes under accelerate's FSDP2, which it offers on GPUs only: here it takes the two processes for such.

    The first is interrupted and goes on. What a process computed in goes to `sharded-*.json` in a stage's run folder.
    """
    set_up = PartialState.__init__

    def as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        set_up(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    loss_sum = BlockDiffusionTrainer.loss_sum

    def noting(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = loss_sum(self, model, *args, **kwargs)
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
        own = [parameter.to_local() for group in self.optimizer.param_groups for parameter in group["params"]]
        found = {
            "loss": str(loss.dtype),
            "sums of gradients": policy and str(policy.reduce_dtype),
            "parameters": sum(shard.numel() for shard in own),
        }
        Path(self.args.output_dir, f"sharded-{dist.get_rank()}.json").write_text(json.dumps(found))
        return loss

    PartialState.__init__ = as_on_gpus
    BlockDiffusionTrainer.loss_sum = noting
    in_third_step(interrupt)
    assert merge_blocks.main([recipes[0]]) == 130
    run(*recipes)


def main(case: str, *recipes: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=WAIT)
    {"run": run, "own_answers": own_answers, "killed": killed, "sharded": sharded}[case](*recipes)
    dist.destroy_process_group()


def main_in_a_fork(rank: int, port: int, case: str, *recipes: str) -> None:
    """The same as one of two processes, with what accelerate's launcher tells it, in a fork of one that has trained."""
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    main(case, *recipes)


if __name__ == "__main__":
    main(*sys.argv[1:])
