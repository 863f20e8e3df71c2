"""Two processes on the CPU, by gloo, against one: sharded parameters, and data parallelism through the entry point."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bard_vl.training import merge_blocks
from distributed_cases import build
from safetensors.torch import load_file
from training_cases import bard_folder, chats_file, history, losses, settings, write_recipe

RECIPES = Path(merge_blocks.__file__).parent / "recipes"


def launch(*command: Any) -> None:
    """Run a command with one thread a process; its output on failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_sharded_parameters_train_as_whole_ones(tmp_path):
    recipe = settings(tmp_path, max_steps=3, lr_scheduler_type="constant", max_grad_norm=0.0)
    whole = build(tmp_path / "whole", write_recipe(tmp_path / "one.yaml", recipe))
    whole.train()
    # The same samples a step: two processes take one micro-batch each where one process takes two.
    recipe["gradient_accumulation_steps"] = 1
    path = write_recipe(tmp_path / "two.yaml", recipe)
    script = Path(__file__).with_name("distributed_cases.py")
    launch("torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29631, script, tmp_path, path)
    found = yaml.safe_load((tmp_path / "sharded.json").read_text())
    assert found["all_sharded"]
    expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert found["losses"] == pytest.approx(expected, abs=2e-5)
    sharded = torch.load(tmp_path / "weights.pt")
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(sharded[name], value.data, atol=2e-4, rtol=0)
    samples = [whole.train_dataset[number] for number in range(2)]
    assert found["decoded"] == pytest.approx(whole.decoding_scores(whole.model.eval(), samples).tolist())


def test_data_parallel_processes_train_as_one(tmp_path):
    # accelerate starts several processes for GPUs only (for CPUs through MPI); the recipe keeps them on the CPU.
    held_out = {"eval_data": str(chats_file(5)), "eval_strategy": "steps", "eval_steps": 3, "decode_samples": 3}
    recipe = settings(
        tmp_path / "one", block_sizes=[4, 8], max_steps=3, max_grad_norm=0.0, decode_max_new_tokens=8, **held_out
    )
    one = write_recipe(tmp_path / "one.yaml", recipe)
    assert merge_blocks.main([str(one)]) == 0
    two = write_recipe(tmp_path / "two.yaml", {**recipe, "output_dir": str(tmp_path / "two")})
    launch(
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 29632),
        *("-m", "bard_vl.training.merge_blocks", two, "--gradient_accumulation_steps", 1),
    )
    for stage in ("block-4", "block-8"):
        alone, parallel = tmp_path / "one" / stage, tmp_path / "two" / stage
        assert losses(parallel) == pytest.approx(losses(alone), abs=1e-4)
        for name, value in load_file(alone / "model.safetensors").items():
            torch.testing.assert_close(load_file(parallel / "model.safetensors")[name], value, atol=5e-4, rtol=0)
        entries = [[e for e in history(folder) if "eval_loss" in e][-1] for folder in (alone, parallel)]
        for name in ("eval_loss", "eval_exact_match", "eval_tokens_per_forward", "eval_samples", "eval_loss_masked"):
            assert entries[1][name] == pytest.approx(entries[0][name], abs=1e-4), name
        entries = [[e for e in history(folder) if "loss" in e][-1] for folder in (alone, parallel)]
        for name in ("loss_masked", "loss_replaced", "samples"):
            assert entries[1][name] == pytest.approx(entries[0][name], abs=1e-4), name


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
