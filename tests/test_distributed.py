"""Two processes on the CPU, by gloo, against one: data parallelism and FSDP2, by accelerate and the entry point."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bard_vl.training import merge_blocks
from bard_vl.training.arguments import parse_recipe
from distributed_cases import main_in_a_fork
from safetensors.torch import load_file
from test_self_distill import recipe_of
from training_cases import bard_folder, chats_file, history, in_forks, losses, media_file, settings, write_recipe

pytestmark = pytest.mark.process

RECIPES = Path(merge_blocks.__file__).parent / "recipes"
CASES = Path(__file__).with_name("distributed_cases.py")
STAGES = ("block-4", "block-8")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def fork(case: str, *recipes: Path) -> list[int | None]:
    """Run a case on two forks of this process, which need not import anything; their exit codes."""
    port = free_port()
    return in_forks(main_in_a_fork, *((rank, port, case, *map(str, recipes)) for rank in range(2)))


def launch(case: str, *recipes: Path, flags: tuple[Any, ...]) -> None:
    """Run a case on two processes that accelerate's launcher starts, with one thread each; its output if it fails.

    accelerate starts several processes for GPUs only (for CPUs through MPI); the recipes keep them on the CPU.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), environment.get("PYTHONPATH")]))
    command = ("accelerate.commands.launch", *flags, "--num_processes", 2, "--main_process_port", free_port())
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(CASES), case, *map(str, recipes)],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    """Two stages of three steps of four samples, with an evaluation."""
    held_out = {"eval_data": str(chats_file(5)), "eval_strategy": "steps", "eval_steps": 3, "decode_samples": 3}
    shape = {"block_sizes": [4, 8], "max_steps": 3, "max_grad_norm": 0.0, "decode_max_new_tokens": 8}
    shape["adam_epsilon"] = 1e-4  # else the rounding of a gradient near 0 decides a weight's whole step
    return write_recipe(folder / f"{name}.yaml", settings(folder / name, **{**shape, **held_out, **changes}))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert merge_blocks.main([str(recipe(folder, "one"))]) == 0
    return folder / "one"


def check_equal(run: Path, alone: Path, stages: tuple[str, ...] = STAGES) -> None:
    """A run on two processes has the losses, the weights and the evaluations of one on one process."""
    for one, two in ((alone / stage, run / stage) for stage in stages):
        assert losses(two) == pytest.approx(losses(one), abs=1e-4)
        for name, value in load_file(one / "model.safetensors").items():
            torch.testing.assert_close(load_file(two / "model.safetensors")[name], value, atol=5e-4, rtol=0)
        first, second = ([e for e in history(folder) if "eval_loss" in e][-1] for folder in (one, two))
        for name in ("eval_loss", "eval_exact_match", "eval_tokens_per_forward", "eval_samples", "eval_loss_masked"):
            assert second[name] == pytest.approx(first[name], abs=1e-4), name
        first, second = ([e for e in history(folder) if "loss" in e][-1] for folder in (one, two))
        for name in ("loss_masked", "loss_replaced", "samples"):
            assert second[name] == pytest.approx(first[name], abs=1e-4), name


def test_data_parallel_processes_train_as_one_and_go_on_after_a_kill(tmp_path, alone):
    two = {"gradient_accumulation_steps": 1}  # where one process takes two micro-batches
    full = {"fill_rows": True}  # the FSDP2 test deals samples out by number
    # Three chats in steps of four: one comes twice, to the other process.
    stream = {"streaming": True, "shuffle_buffer": 5, "block_sizes": [4], "train_data": str(chats_file(3))}
    whole, streamed, to_kill = (
        recipe(tmp_path, name, **two, **changes)
        for name, changes in (("whole", full), ("streamed", stream), ("killed", full))
    )
    assert -signal.SIGKILL in fork("killed", whole, streamed, to_kill)
    check_equal(tmp_path / "whole", alone)
    assert merge_blocks.main([str(recipe(tmp_path, "alone", **stream))]) == 0
    check_equal(tmp_path / "streamed", tmp_path / "alone", STAGES[:1])
    assert (tmp_path / "killed/runs/block-8/checkpoint-2/complete.json").exists()
    assert not (tmp_path / "killed/block-8").exists()
    assert fork("run", to_kill) == [0, 0]
    for stage in STAGES:
        before, after = tmp_path / "whole" / stage, tmp_path / "killed" / stage
        assert losses(after) == losses(before)
        for name, value in load_file(before / "model.safetensors").items():
            assert torch.equal(load_file(after / "model.safetensors")[name], value), name


def test_processes_share_out_own_answers(tmp_path):
    assert fork("own_answers", Path(recipe_of(tmp_path / "run", max_steps=1))) == [0, 0]
    files = sorted((tmp_path / "run/answers").glob("process-*.jsonl"))
    answered = [[json.loads(line)["chat"] for line in file.read_text().splitlines()] for file in files]
    assert answered == [[0, 2, 4], [1, 3]]
    assert len(losses(tmp_path / "run/block-32")) == 1


def test_sharded_parameters_train_as_whole_ones(tmp_path, alone):
    saving = {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "loss_chunk_size": 5}
    # Steps in which one process has no picture, no video, or nothing to learn, and a vision tower that is frozen.
    uneven = {"train_data": str(media_file()), "freeze": ["vision", "merger"], "block_sizes": [4]}
    half = recipe(tmp_path, "half", **saving, **uneven, bf16=True)
    flags = ("--config_file", RECIPES / "accelerate/fsdp2.yaml", "--mixed_precision", "no")
    launch("sharded", recipe(tmp_path, "full", **saving), half, flags=flags)
    check_equal(tmp_path / "full", alone)
    assert len(losses(tmp_path / "half/block-4")) == 3
    full, half = (
        [json.loads(path.read_text()) for path in (tmp_path / name / "runs/block-4").glob("sharded-*.json")]
        for name in ("full", "half")
    )
    assert [note["sums of gradients"] for note in half] == ["torch.float32"] * 2
    assert [note["loss"] for note in (*full, *half)] == ["torch.float32"] * 4
    assert sum(note["parameters"] for note in full) == sum(each.numel() for each in build_model().parameters())


def test_later_stages_are_not_given_the_deepspeed_plugin_again(tmp_path, monkeypatch):
    """accelerate refuses it for a second Accelerator: it takes its own, the first stage's."""
    given = []

    def accelerator(deepspeed_plugin: Any = None, **kwargs: Any) -> Accelerator:
        given.append(deepspeed_plugin)
        return Accelerator(**kwargs)

    monkeypatch.setattr("transformers.trainer.Accelerator", accelerator)
    path = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "run", block_sizes=[4, 8], max_steps=1))
    model, data, args, schedule = parse_recipe(merge_blocks.RECIPE, [str(path)])
    args.deepspeed_plugin = plugin = object()
    merge_blocks.merge_blocks(model, data, args, schedule)
    assert given == [plugin, None]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero3"])
def test_accelerate_reads_the_configurations(name):
    """FSDP2 and DeepSpeed run on GPUs only: here accelerate parses their settings, which needs neither."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type.value == kind
    assert config.mixed_precision == "bf16"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "bard_vl.training.merge_blocks"])
    validated, *_ = _validate_launch_command(arguments)
    assert validated.num_processes == 8
    if name == "fsdp2":
        assert str(validated.fsdp_version) == "2"
        assert validated.fsdp_state_dict_type == "SHARDED_STATE_DICT"
        classes = validated.fsdp_transformer_layer_cls_to_wrap.split(",")
        assert set(classes) <= {type(module).__name__ for module in build_model().modules()}
    if name.startswith("deepspeed"):
        assert str(validated.zero_stage) == name[-1]


def build_model() -> torch.nn.Module:
    from bard_vl import BardVLForConditionalGeneration

    return BardVLForConditionalGeneration.from_pretrained(bard_folder())
