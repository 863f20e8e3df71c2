"""Training runs of tiny models: what they learn, what they cost, how they go on after an interruption."""

import json
import shutil
import signal
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bard_vl
import distributed_cases
import fresh
import pytest
import test_remote_code
import torch
import transformers
from accelerate import skip_first_batches
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.attention_bard_vl import block_attention
from bard_vl.training import distill, merge_and_distill, merge_blocks
from bard_vl.training.arguments import BlockDiffusionArguments, RecipeError, parse_recipe
from bard_vl.training.checkpoints import complete_checkpoints
from bard_vl.training.cost import Cost, activation_memory, mask_memory, state_memory
from bard_vl.training.data import PackingCollator
from bard_vl.training.packing import Sample, dense_mask, packed_length
from bard_vl.training.stages import Run, Stage, build_trainer, freeze, write_checkpoint
from bard_vl.training.trainer import (
    BlockDiffusionTrainer,
    EveryEpoch,
    cosine_with_floor,
    group_of,
    model_inputs,
    padding_blocks,
)
from peft import PeftModel
from safetensors.torch import load_file
from training_cases import (
    MASK,
    bard_folder,
    chats_file,
    copy_of,
    history,
    in_a_fork,
    losses,
    qwen_folder,
    settings,
    write_recipe,
)
from transformers import TrainerCallback
from transformers.integrations import deepspeed as deepspeed_integration


def train(output: Path, name: str = "recipe", module: Any = merge_blocks, **changes: Any) -> Path:
    """Run a recipe through the entry point; returns the run's folder."""
    recipe = write_recipe(output.parent / f"{name}.yaml", settings(output, **changes))
    assert module.main([str(recipe)]) == 0
    return output


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model.safetensors")


def trainer_for(output: Path, module: Any = merge_blocks, block_size: int = 4, **changes: Any) -> BlockDiffusionTrainer:
    """A trainer as the entry points build it, not begun."""
    recipe = write_recipe(output / "recipe.yaml", settings(output, **changes))
    model, data, args, special = parse_recipe(module.RECIPE, [str(recipe)])
    run = Run(model, data, args)
    teacher = {}
    if module is distill:
        teacher = {"teacher": Path(special.teacher_name_or_path), "distillation": special}
    stage = Stage(Path(model.model_name_or_path), block_size, output / f"block-{block_size}", **teacher)
    return build_trainer(run, stage, args)


class StopAt(TrainerCallback):
    """Interrupts a run after a step, as an exception would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_training_lowers_the_loss(tmp_path):
    run = train(tmp_path / "run", max_steps=40, learning_rate=0.005, save_steps=40)
    found = losses(run / "block-4")
    assert sum(found[-8:]) < 0.6 * sum(found[:8])


@pytest.mark.thorough
def test_packed_samples_train_as_separate_ones(tmp_path):
    shape = {"max_steps": 3, "max_grad_norm": 0.0}
    packed = train(tmp_path / "packed", "a", per_device_train_batch_size=4, gradient_accumulation_steps=1, **shape)
    alone = train(tmp_path / "alone", "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **shape)
    assert losses(packed / "block-4") == pytest.approx(losses(alone / "block-4"), abs=1e-5)
    many = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    full = train(tmp_path / "full", "c", **many, **shape, fill_rows=True)
    assert losses(full / "block-4") == pytest.approx(losses(alone / "block-4"), abs=1e-5)
    for name, value in weights(alone / "block-4").items():
        for other in (packed, full):
            torch.testing.assert_close(value, weights(other / "block-4")[name], atol=2e-4, rtol=0)
    assert {entry["busy_share"] for entry in history(full / "block-4") if "loss" in entry} == {1.0}
    columns = [sum(e.get("packed_tokens", 0) for e in history(run / "block-4")) for run in (packed, alone)]
    assert columns[0] != columns[1], "the two runs did not lay their samples out differently"


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"loss_chunk_size": 3}])
def test_savings_of_memory_change_no_loss(tmp_path, changes):
    plain = train(tmp_path / "plain", "a", max_steps=2)
    saving = train(tmp_path / "saving", "b", max_steps=2, **changes)
    assert losses(saving / "block-4") == pytest.approx(losses(plain / "block-4"), abs=1e-5)


@pytest.mark.thorough
def test_bfloat16_trains_float32_weights(tmp_path):
    full = train(tmp_path / "full", "a", max_steps=2)
    half = train(tmp_path / "half", "b", max_steps=2, bf16=True)
    assert losses(half / "block-4") == pytest.approx(losses(full / "block-4"), rel=0.05)
    assert losses(half / "block-4") != losses(full / "block-4")
    assert {value.dtype for value in weights(half / "block-4").values()} == {torch.float32}


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("form", ["sample_mean", "inverse_time"])
@pytest.mark.parametrize("noise", ["mask", "uniform", "mixed"])
def test_every_noise_and_form_of_the_loss_trains(tmp_path, noise, form):
    changes = {"max_steps": 1, "noise": noise, "loss_form": form, "time_high": 0.9, "time_sampling": "stratified"}
    entry = history(train(tmp_path / "run", **changes) / "block-4")[0]
    assert entry["loss"] > 0
    assert ("loss_masked" in entry) == (noise != "uniform")
    assert ("loss_replaced" in entry) == (noise != "mask")


def test_parts_of_the_loss_average_to_the_loss(tmp_path):
    shape = {"logging_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = trainer_for(tmp_path, loss_form="corrupted_mean", **shape)
    assert trainer.bare_model.config.trained is False  # the mark of a seed
    trainer.train()
    assert trainer.bare_model.config.trained is None
    entry = trainer.state.log_history[0]
    rows = [trainer.data_collator([trainer.train_dataset[number] for number in range(4)])]
    batches, normaliser = trainer.get_batch_samples(iter(rows), 1, torch.device("cpu"))
    trainer.tally.by_noise.zero_()
    total = trainer.loss_sum(trainer.model, batches[0], trainer.tally).item()
    by_noise = trainer.tally.by_noise
    assert by_noise[..., 1].sum() == normaliser == (batches[0].masked | batches[0].replaced).sum()
    assert by_noise[0, :, 1].sum() == batches[0].masked.sum()
    assert by_noise[..., 0].sum().item() == pytest.approx(total, rel=1e-5)
    assert entry["samples"] == 16
    parts = [value for name, value in entry.items() if name.startswith("loss_t")]
    assert min(parts) <= entry["loss"] <= max(parts)


def test_visible_tokens_are_learnt_if_asked(tmp_path):
    entry = history(train(tmp_path / "run", max_steps=1, visible_weight=0.5) / "block-4")[0]
    assert {"loss_masked", "loss_replaced", "loss_visible"} <= entry.keys()
    shape = {"loss_form": "corrupted_mean", "per_device_train_batch_size": 4}
    trainer = trainer_for(tmp_path, visible_weight=0.5, **shape)
    rows = [trainer.data_collator([trainer.train_dataset[number] for number in range(4)])]
    (batch,), normaliser = trainer.get_batch_samples(iter(rows), 1, torch.device("cpu"))
    corrupted = batch.masked | batch.replaced
    visible = batch.rows.noisy & ~corrupted
    assert normaliser == corrupted.sum() + 0.5 * visible.sum()
    assert batch.weights[visible].unique().tolist() == [0.5]


def test_complementary_masks_make_two_answers_of_each_sample(tmp_path):
    trainer = trainer_for(tmp_path, complementary_masks=True, noise="mask", per_device_train_batch_size=4)
    samples = [trainer.train_dataset[number] for number in range(4)]
    expected = [packed_length(each.responses, len(each.input_ids), 4, noisy_copies=2) for each in samples]
    assert trainer.train_dataset.lengths[:4] == expected
    rows = trainer.data_collator(samples)
    (batch,), normaliser = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    assert normaliser == 8
    masked = [batch.masked[rows.noisy & (rows.view == view)] for view in range(2)]
    assert torch.equal(masked[0], ~masked[1])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_drafts_are_what_the_model_itself_puts_in_place_of_masks(tmp_path, share):
    plain = trainer_for(tmp_path)
    trainer = trainer_for(tmp_path, draft_share=share)
    rows = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    ((before, normaliser), (marked, same)) = (each.corrupt(rows, 0, 0) for each in (plain, trainer))
    assert torch.equal(before.input_ids, marked.input_ids)
    assert normaliser == same
    shown = trainer.with_drafts(trainer.model, marked)
    logits = trainer.model(**model_inputs(rows, before.input_ids, dense_mask(rows.layout())[:, None])).logits
    logits[..., MASK] = -torch.inf
    expected = torch.where(marked.drafted, logits.argmax(-1), before.input_ids)
    assert torch.equal(shown.input_ids, expected)
    assert torch.equal(shown.masked, before.masked & ~marked.drafted)
    assert torch.equal(shown.masked | shown.replaced, before.masked | before.replaced)
    assert torch.equal(shown.weights, before.weights)
    assert bool(shown.masked.any()) == (share < 1)
    loss = trainer.compute_loss(trainer.model, marked, num_items_in_batch=torch.tensor(normaliser))
    again = trainer.loss_sum(trainer.model, shown, trainer.tally) / normaliser
    torch.testing.assert_close(loss, again)


def test_pixels_travel_in_the_dtype_of_the_vision_tower(tmp_path):
    trainer = trainer_for(tmp_path, bf16=True)
    samples = [trainer.train_dataset[number] for number in range(4)]
    rows = trainer.data_collator(samples)
    assert rows.visual_inputs["pixel_values"].dtype == torch.bfloat16
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        rows = PackingCollator(trainer.data_collator.encoder, pixel_dtype=dtype)(samples)
        batch, _ = trainer.corrupt(rows, 0, 0)
        with torch.no_grad(), trainer.accelerator.autocast():
            found.append(trainer.loss_sum(trainer.model, batch, trainer.tally))
    assert torch.equal(*found)
    assert trainer_for(tmp_path / "whole").data_collator.pixel_dtype == torch.float32


def test_a_sample_drawn_again_in_a_step_has_other_noise(tmp_path):
    trainer = trainer_for(tmp_path)
    rows = trainer.data_collator([trainer.train_dataset[number] for number in (5, 5)])
    batches, _ = trainer.get_batch_samples(iter([rows, rows]), 2, torch.device("cpu"))
    noises = [batch.input_ids[rows.noisy & (rows.sample == copy)] for batch in batches for copy in range(2)]
    assert all(not torch.equal(a, b) for a, b in combinations(noises, 2))
    once, _ = trainer.corrupt(trainer.data_collator([trainer.train_dataset[5]]), trainer.args.seed, 0)
    assert torch.equal(once.input_ids[once.rows.noisy], noises[0])


def test_batches_stay_on_the_cpu_until_their_forward(tmp_path, monkeypatch):
    def moved(batch: Any, device: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"moved to {device}")

    monkeypatch.setattr("accelerate.data_loader.send_to_device", moved)
    trainer = trainer_for(tmp_path)
    loader = trainer.get_train_dataloader()
    assert len(next(iter(loader)).sample_ids) == 2
    assert len(next(iter(skip_first_batches(loader, 1))).sample_ids) == 2


# --- Optimizer --------------------------------------------------------------------------------------------------------


def test_groups_have_their_rates_floors_and_decay(tmp_path):
    rates = {"learning_rate": 2e-5, "merger_learning_rate": 1e-5, "vision_learning_rate": 2e-6}
    trainer = trainer_for(tmp_path, weight_decay=0.01, warmup_steps=2, max_steps=10, min_learning_rate=1e-6, **rates)
    model = trainer.model
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {}
    assert names[id(optimizer.param_groups[0]["params"][0])].startswith("model.language_model"), "its rate is logged"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            kind = "vision" if "visual" in name else "language"
            kind = "merger" if "merger" in name else kind
            assert group["lr"] == {"language": 2e-5, "merger": 1e-5, "vision": 2e-6}[kind], name
            assert group["betas"] == (0.9, 0.95)
            decays[name] = group["weight_decay"]
    assert not names, "some parameters are in no group"
    for name, decay in decays.items():
        is_matrix = dict(model.named_parameters())[name].ndim > 1
        assert decay == (0.01 if is_matrix else 0.0), name
    scheduler = trainer.create_scheduler(10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen[0] == [0.0] * len(seen[0])
    assert seen[2] == pytest.approx([group["initial_lr"] for group in optimizer.param_groups])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-6] * len(seen[0]))


def test_a_floor_as_a_share_holds_for_every_group(tmp_path):
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    trainer = trainer_for(tmp_path, vision_learning_rate=1e-4, **schedule)
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 2)


def test_a_rate_below_the_floor_stays():
    assert [cosine_with_floor(step, 0, 10, 1.0) for step in range(11)] == [1.0] * 11


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("lm_head.weight", "language"),
        ("model.visual.blocks.0.attn.qkv.bias", "vision"),
        ("model.visual.merger.linear_fc1.weight", "merger"),
        ("model.visual.deepstack_merger_list.1.norm.weight", "merger"),
        ("base_model.model.model.visual.merger.linear_fc1.lora_A.default.weight", "merger"),
    ],
)
def test_group_of(name, group):
    assert group_of(name) == group


def test_frozen_groups_keep_their_weights(tmp_path):
    run = train(tmp_path / "run", max_steps=2, freeze=["vision", "merger", "*.layers.0.*q_proj.weight"])
    before = weights(bard_folder())
    for name, value in weights(run / "block-4").items():
        if name.endswith("proj.weight") or "visual" in name:
            frozen = "visual" in name or name.endswith("layers.0.self_attn.q_proj.weight")
            assert torch.equal(value, before[name]) == frozen, name


@pytest.mark.parametrize(("names", "told"), [(["*.z_norm.weight"], "'\\*.z_norm.weight'"), (["*"], "nothing to train")])
def test_names_that_freeze_nothing_or_all(names, told):
    with pytest.raises(RecipeError, match=told):
        freeze(torch.nn.Sequential(torch.nn.Linear(1, 1)), names)


# --- Interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streaming": True, "shuffle_buffer": 5},
        pytest.param({"dataloader_num_workers": 1, "complementary_masks": True}, marks=pytest.mark.process),
        {"fill_rows": True, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    ],
)
def test_an_interrupted_run_repeats_the_losses_of_a_whole_one(tmp_path, changes, monkeypatch):
    # 12 chats in batches of 4: the interruption falls into the second pass, with accumulation and shuffling.
    shape = {"max_steps": 7, **changes}
    whole = trainer_for(tmp_path / "whole", **shape)
    whole.train()
    stopped = trainer_for(tmp_path / "stopped", **shape)
    stopped.add_callback(StopAt(5))
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed = trainer_for(tmp_path / "stopped", **shape)
    (*_, checkpoint) = complete_checkpoints(tmp_path / "stopped")
    assert checkpoint.name == "checkpoint-4"
    warnings: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *_: warnings.append(message))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not [message for message in warnings if "keys" in message], "a tied weight is not missing"
    resumed._issue_warnings_after_load(resumed.model.load_state_dict({}, strict=False))
    assert "lm_head.weight" in warnings[-1]
    found = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert len(found[0]) == 7
    assert found[0] == found[1]
    after = dict(resumed.model.named_parameters())
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, after[name]), name


@pytest.mark.thorough
def test_a_stream_takes_no_step_behind_the_last_one(tmp_path):
    shape = {"streaming": True, "shuffle_buffer": 5, "min_learning_rate": 0.001}
    whole = trainer_for(tmp_path, **shape)
    whole.train()
    resumed = trainer_for(tmp_path, **shape)  # the stage was interrupted before its weights were written
    (*_, checkpoint) = complete_checkpoints(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 4
    after = dict(resumed.model.named_parameters())
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, after[name]), name


@pytest.mark.process
def test_a_killed_schedule_goes_on_and_ends_the_same(tmp_path):
    shape = {"model_name_or_path": str(qwen_folder()), "mask_token_id": MASK, "block_sizes": [4, 8], "max_steps": 4}
    whole = train(tmp_path / "whole", "whole", **shape)
    output = tmp_path / "killed"
    recipe = write_recipe(tmp_path / "killed.yaml", settings(output, **shape))
    assert in_a_fork(distributed_cases.killed, str(recipe)) == -signal.SIGKILL
    assert (output / "runs/block-8/checkpoint-2/complete.json").exists(), "not inside the second stage"
    assert not (output / "block-8").exists()
    kept = (output / "block-4/model.safetensors").stat().st_mtime_ns
    assert merge_blocks.main([str(recipe)]) == 0
    assert (output / "block-4/model.safetensors").stat().st_mtime_ns == kept
    for stage in ("block-4", "block-8"):
        assert losses(output / stage) == losses(whole / stage)
        for name, value in weights(whole / stage).items():
            assert torch.equal(value, weights(output / stage)[name]), name
    assert not (output / "start").exists()
    assert not list(output.glob("runs/*/checkpoint-*"))
    assert merge_blocks.main([str(recipe)]) == 0, "a finished schedule has nothing to do, and says so by success"


@pytest.mark.thorough
def test_each_stage_starts_from_the_one_before(tmp_path):
    run = train(tmp_path / "run", block_sizes=[4, 8], learning_rate=0.0, max_steps=1)
    assert all(torch.equal(value, weights(run / "block-4")[name]) for name, value in weights(run / "block-8").items())
    run = train(tmp_path / "steps", "steps", block_sizes=[4, 8], steps_per_stage=[1, 3])
    assert [len(losses(run / stage)) for stage in ("block-4", "block-8")] == [1, 3]


def test_half_written_checkpoints_are_never_used(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=4)
    trainer.train()
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    (found[-1] / "complete.json").unlink()
    assert complete_checkpoints(tmp_path) == found[:1]


@pytest.mark.thorough
def test_a_stage_that_was_not_finished_is_taken_up_again(tmp_path):
    output = tmp_path / "run"
    (output / ".block-4.partial").mkdir(parents=True)
    (output / ".block-4.partial/config.json").write_text('{"block_size": 4}')
    (output / "runs/block-4/checkpoint-2").mkdir(parents=True)
    (output / "runs/block-4/checkpoint-2/trainer_state.json").write_text("{")
    run = train(output)
    assert len(losses(run / "block-4")) == 4
    assert not (output / ".block-4.partial").exists()


@pytest.mark.thorough
def test_old_checkpoints_go(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=6, save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_other_settings_do_not_go_on_with_a_run(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path / "a.yaml", settings(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionTrainer, "get_batch_samples", interrupt_in_step(3))
        assert merge_blocks.main([str(recipe), "--max_steps", "500"]) == 130
    assert complete_checkpoints(tmp_path / "run/runs/block-4")
    assert merge_blocks.main([str(recipe), "--max_steps", "500", "--learning_rate", "0.1"]) == 1
    assert "begun with `learning_rate` 0.003, now it is 0.1" in capsys.readouterr().err


def interrupt_in_step(step: int) -> Any:
    """A `get_batch_samples` that a key press meets when this step begins."""
    begin = BlockDiffusionTrainer.get_batch_samples

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return begin(self, *args, **kwargs)

    return interrupted


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    return train(tmp_path_factory.mktemp("one") / "run", max_steps=1)


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "begun with `learning_rate` 0.003, now it is 0.1"),
        ({"train_data": "more"}, "begun with `train_data`"),
        ({"data_seed": 3}, "begun with `data_seed` None, now it is 3"),
        pytest.param(
            {"eval_data": "more", "measuring_processes": 2, "logging_steps": 7, "loss_chunk_size": 3},
            None,
            marks=pytest.mark.process,
        ),
    ],
)
def test_settings_that_decide_are_those_it_was_begun_with(tmp_path, capsys, changes, message, is_finished, one_step):
    run = copy_of(one_step, tmp_path / "run")
    if not is_finished:
        shutil.rmtree(run / "block-4")
    changes = {key: str(chats_file(13)) if value == "more" else value for key, value in changes.items()}
    recipe = write_recipe(tmp_path / "other.yaml", settings(run, max_steps=1, **changes))
    assert merge_blocks.main([str(recipe)]) == (0 if message is None else 1)
    assert message is None or message in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_does_not_go_on_with_other_chats(tmp_path, capsys):
    folder = shutil.copytree(chats_file().parent, tmp_path / "chats")
    data = {"train_data": str(folder / "chats.jsonl"), "max_steps": None, "num_train_epochs": 1}
    run = train(tmp_path / "run", **data)
    shutil.rmtree(run / "block-4")
    lines = (folder / "chats.jsonl").read_text().splitlines()
    (folder / "chats.jsonl").write_text("\n".join([*lines, *lines[:4]]) + "\n")
    assert merge_blocks.main([str(write_recipe(tmp_path / "again.yaml", settings(run, **data)))]) == 1
    assert "begun with `optimizer steps` 3, now it is 4" in capsys.readouterr().err
    (folder / "chats.jsonl").write_text("\n".join([*lines[:-1], lines[1]]) + "\n")
    assert merge_blocks.main([str(tmp_path / "again.yaml")]) == 1
    assert "begun with `usable chats` '12, " in capsys.readouterr().err


def test_every_pass_sees_every_sample():
    order = list(EveryEpoch(5, 17, seed=1))
    assert len(order) == len(EveryEpoch(5, 17, seed=1)) == 17
    passes = [order[first : first + 5] for first in range(0, 15, 5)]
    assert all(sorted(each) == list(range(5)) for each in passes)
    assert passes[0] != passes[1]
    assert order == list(EveryEpoch(5, 17, seed=1)) != list(EveryEpoch(5, 17, seed=2))


# --- What a stage leaves ----------------------------------------------------------------------------------------------


@pytest.mark.process(group="lines")
def test_a_finished_stage_is_a_checkpoint_with_code(tmp_path):
    run = train(tmp_path / "run", block_sizes=[8], max_steps=1)
    folder = run / "block-8"
    config = json.loads((folder / "config.json").read_text())
    source = json.loads((bard_folder() / "config.json").read_text())
    assert source.pop("trained") is False  # the mark of a seed
    assert config == {**source, "block_size": 8, "dtype": "float32"}
    assert (folder / "generation_config.json").read_bytes() == (bard_folder() / "generation_config.json").read_bytes()
    model = BardVLForConditionalGeneration.from_pretrained(folder)
    processor = BardVLProcessor.from_pretrained(folder)
    assert model.config.block_size == 8
    assert processor.mask_token_id == MASK
    code = {path.name for path in Path(bard_vl.__file__).parent.glob("*_bard_vl.py")} - {"convert_qwen3vl_to_bard.py"}
    assert code <= {path.name for path in folder.iterdir()}
    answer = fresh.call("test_remote_code.answer_as_remote_code", folder, home=tmp_path / "home")
    assert answer == test_remote_code.generate(model)


def test_a_checkpoint_is_written_by_one_process_under_zero3(tmp_path, monkeypatch):
    """transformers builds models under ZeRO-3 by all processes together: one alone would wait for ever."""
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path))
    model, data, args, _ = parse_recipe(merge_blocks.RECIPE, [str(recipe)])
    stage = Stage(bard_folder(), 4, tmp_path / "block-4")
    processor = BardVLProcessor.from_pretrained(bard_folder())
    zero3 = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    state = weights(bard_folder())
    write_checkpoint(MASK, dict(state), processor, Run(model, data, args), stage, tmp_path / "block-4")
    assert weights(tmp_path / "block-4").keys() == state.keys()


@pytest.mark.thorough
def test_a_run_without_settings_tells_its_losses_and_what_to_type_next(tmp_path, capsys):
    run = train(tmp_path / "run", max_steps=3, logging_steps=None, logging_first_step=None)
    logged = [entry for entry in history(run / "block-4") if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    told = capsys.readouterr().out.splitlines()
    first, last = (entry["loss"] for entry in logged)
    assert f"{run / 'block-4'}: loss {first:.4f} at step 1, {last:.4f} at step 3" in told
    assert told[-1].strip() == f"try it: bard-vl run photo.jpg --model {run / 'block-4'}"


@pytest.mark.thorough
def test_save_dtype(tmp_path):
    folder = train(tmp_path / "run", max_steps=1, save_dtype="bfloat16") / "block-4"
    assert {value.dtype for value in weights(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert BardVLForConditionalGeneration.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.thorough
def test_adapters_train_resume_and_merge(tmp_path):
    lora = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1, "max_steps": 6}
    whole = trainer_for(tmp_path / "whole", **lora)
    trained = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    whole.train()
    stopped = trainer_for(tmp_path / "stopped", **lora)
    stopped.add_callback(StopAt(5))
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed = trainer_for(tmp_path / "stopped", **lora)
    resumed.train(resume_from_checkpoint=str(complete_checkpoints(tmp_path / "stopped")[-1]))
    found = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert found[0] == found[1]


@pytest.mark.thorough
def test_merged_adapters_are_a_whole_checkpoint(tmp_path):
    run = train(tmp_path / "run", use_lora=True, lora_rank=4, max_steps=3, learning_rate=0.05)
    before, after = weights(bard_folder()), weights(run / "block-4")
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in after if name.split(".")[-2] in adapted}
    kept = PeftModel.from_pretrained(
        BardVLForConditionalGeneration.from_pretrained(bard_folder()), run / "block-4/adapter"
    )
    for name, value in kept.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, after.get(name, value))


@pytest.mark.thorough
def test_adapters_on_quantised_weights_end_as_a_whole_checkpoint(tmp_path):
    qlora = {"use_lora": True, "quantize": "nf4", "lora_rank": 4, "learning_rate": 0.05, "block_sizes": [4]}
    trainer = trainer_for(tmp_path / "built", **qlora)
    layer = trainer.bare_model.model.language_model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    whole, cost = trainer_for(tmp_path / "whole"), Cost.of(trainer)
    everything = sum(parameter.numel() for parameter in whole.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert sum(count for count, _ in cost.parameters.values()) == everything + trained
    assert cost.memory["weights"] < Cost.of(whole).memory["weights"]
    run = train(tmp_path / "run", max_steps=8, **qlora)
    assert losses(run / "block-4")[-1] < losses(run / "block-4")[0]
    before, after = weights(bard_folder()), weights(run / "block-4")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    model = BardVLForConditionalGeneration.from_pretrained(run / "block-4")
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert "quantization_config" not in json.loads((run / "block-4" / "config.json").read_text())


@pytest.mark.thorough
def test_sources_in_folders_of_their_own_train_together(tmp_path):
    folders = [shutil.copytree(chats_file().parent, tmp_path / name) for name in ("first", "second")]
    sources = [str(folder / "chats.jsonl") for folder in folders]
    run = train(tmp_path / "run", max_steps=7, train_data=sources, train_weights=[2, 0.5])
    counted = [entry["samples"] for entry in history(run / "block-4") if "samples" in entry]
    assert sum(counted) == 7 * 4
    assert sum(entry["broken_samples"] for entry in history(run / "block-4") if "loss" in entry) == 0


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_evaluation_repeats_and_leaves_training_alone(tmp_path):
    held_out = {"eval_data": str(chats_file(5)), "eval_strategy": "steps", "eval_steps": 1, "decode_samples": 3}
    without = trainer_for(tmp_path / "without", max_steps=3)
    without.train()
    trainer = trainer_for(tmp_path / "with", max_steps=3, decode_max_new_tokens=8, **held_out)
    trainer.train()
    found = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (without, trainer)]
    assert found[0] == found[1]
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    again = trainer.evaluate()
    for name in ("eval_loss", "eval_exact_match", "eval_tokens_per_forward", "eval_loss_masked"):
        assert again[name] == last[name]
    assert last["eval_samples"] == 5
    assert last["eval_tokens_per_forward"] > 0


@pytest.mark.thorough
def test_the_best_checkpoint_is_the_finished_stage_and_a_stage_that_gets_worse_ends(tmp_path):
    best = {"load_best_model_at_end": True, "early_stopping_patience": 2, "save_steps": 1, "save_total_limit": 1}
    held_out = {"eval_data": str(chats_file(5)), "eval_strategy": "steps", "eval_steps": 1}
    worse = {"max_steps": 12, "lr_scheduler_type": "constant", "learning_rate": 0.05}
    run = train(tmp_path / "run", **worse, **held_out, **best)
    state = json.loads((run / "block-4" / "trainer_state.json").read_text())
    found = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    number = min(range(len(found)), key=found.__getitem__) + 1
    assert number == state["best_global_step"] == len(found) - 2 < 10
    shorter = train(tmp_path / "shorter", **{**worse, "max_steps": number})
    after, expected = weights(run / "block-4"), weights(shorter / "block-4")
    assert all(torch.equal(value, expected[name]) for name, value in after.items())
    interrupted = {**worse, **held_out, **best}
    stopped = trainer_for(tmp_path / "stopped", **interrupted)
    stopped.add_callback(StopAt(len(found)))  # one evaluation after the best one was counted before
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed = trainer_for(tmp_path / "stopped", **interrupted)
    resumed.train(resume_from_checkpoint=str(complete_checkpoints(tmp_path / "stopped")[-1]))
    assert [entry["eval_loss"] for entry in resumed.state.log_history if "eval_loss" in entry] == found


@pytest.mark.thorough
def test_decoding_has_the_precision_of_training(tmp_path):
    held_out = {"eval_data": str(chats_file(5)), "decode_samples": 2, "decode_max_new_tokens": 4}
    trainer = trainer_for(tmp_path, bf16=True, max_steps=1, **held_out)
    trainer.train()
    dtypes = set()
    layer = trainer.bare_model.model.language_model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.evaluate()
    assert dtypes == {torch.bfloat16}


@torch.no_grad()
def test_decoding_counts_exact_answers(tmp_path):
    held_out = {"eval_data": str(chats_file(5)), "per_device_eval_batch_size": 4}
    trainer = trainer_for(tmp_path, decode_samples=4, decode_max_new_tokens=12, **held_out)
    samples = [trainer.train_dataset[number] for number in range(4)]
    eos = trainer.processing_class.tokenizer.eos_token_id
    known = []
    for number, sample in enumerate(samples):
        start = sample.responses[-1][0]
        output = trainer.model.generate(
            input_ids=sample.input_ids[None, :start],
            **sample.visual_inputs,
            block_size=4,
            max_new_tokens=12,
        )
        answer = output[0, start:]
        answer = answer[: (answer == eos).nonzero()[0, 0] + 1] if (answer == eos).any() else answer
        if number == 3:
            answer = answer.clone()
            answer[0] = (answer[0] + 1) % 300
        ids = torch.cat([sample.input_ids[:start], answer])
        known.append(Sample(ids, sample.position_ids, [(start, len(ids))], sample.visual_index, sample.visual_inputs))
    assert trainer.decode(known)["exact_match"] == 0.75


# --- Distillation -----------------------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    teacher = {"teacher_name_or_path": str(bard_folder())}
    trainer = trainer_for(tmp_path, distill, max_steps=1, **teacher)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(0.0, abs=1e-5)
    assert trainer.state.log_history[0]["cross_entropy"] > 1


@pytest.mark.thorough
def test_distillation_of_a_run_learns_from_its_anchor(tmp_path):
    merged = train(tmp_path / "merged", "merge", block_sizes=[4, 8, 16], max_steps=1)
    shape = {"model_name_or_path": str(merged), "max_steps": 16, "learning_rate": 0.003}
    taught = train(tmp_path / "taught", "distill", distill, **shape)
    assert sorted(path.name for path in taught.glob("block-*")) == ["block-16", "block-8"]
    for stage in ("block-8", "block-16"):
        found = losses(taught / stage)
        assert sum(found[-4:]) < 0.9 * sum(found[:4])
        assert json.loads((taught / stage / "config.json").read_text())["block_size"] == int(stage[6:])
    assert weights(merged / "block-4").keys() == weights(taught / "block-8").keys()


@pytest.mark.thorough
def test_algorithm_1_merges_each_stage_from_the_distilled_one_before(tmp_path):
    merged, taught = tmp_path / "merged", tmp_path / "taught"
    shape = {"max_steps": 2, "learning_rate": 0.01}
    recipes = [
        write_recipe(tmp_path / "merge.yaml", settings(merged, block_sizes=[4, 8, 16], **shape)),
        write_recipe(tmp_path / "distill.yaml", settings(taught, **shape, kd_positions="fair")),
    ]
    words = [*map(str, recipes), "--kd_weight", "0.3"]
    assert merge_and_distill.main(words) == 0
    assert [path.name for path in sorted(taught.glob("block-*"))] == ["block-16", "block-8"]
    for number, size in enumerate((8, 16)):
        begun = json.loads((merged / f"runs/block-{size}/settings.json").read_text())
        assert begun["source"] == str((merged / "block-4", taught / "block-8")[number])
        begun = json.loads((taught / f"runs/block-{size}/settings.json").read_text())
        assert begun["source"] == str(merged / f"block-{size}")
        assert (begun["teacher"], begun["kd_weight"]) == (str(merged / "block-4"), 0.3)
    kept = weights(taught / "block-8")
    shutil.rmtree(taught / "block-16")
    assert merge_and_distill.main(words) == 0
    assert (taught / "block-16/model.safetensors").is_file()
    assert all(torch.equal(value, kept[name]) for name, value in weights(taught / "block-8").items())
    assert merge_and_distill.main([*words, "--learning_rate=0.5"]) == 1, "another rate than it was begun with"


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(
    "changes",
    [{"kd_direction": "reverse"}, {"kd_top_k": 8, "ce_weight": 0.0}, {"kd_temperature": 2.0, "kd_positions": "fair"}],
)
def test_forms_of_distillation_train(tmp_path, changes):
    teacher = {"teacher_name_or_path": str(bard_folder())}
    trainer = trainer_for(tmp_path, distill, 8, max_steps=2, **teacher, **changes)
    before = {name: value.clone() for name, value in trainer.teacher.model.state_dict().items()}
    trainer.train()
    entry = trainer.state.log_history[0]
    assert min(entry["loss"], entry["divergence"], entry["cross_entropy"]) > 0
    assert 0 < entry["taught_share"] < 1  # blocks of padding behind an answer are learnt from the data
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("positions", ["all", "fair"])
def test_the_loss_of_distillation_position_by_position(tmp_path, positions):
    """Whole rows through both models, then each corrupted token by the text of the rules."""
    weights = {"ce_weight": 0.7, "kd_weight": 0.4, "kd_positions": positions, "loss_form": "corrupted_mean"}
    shape = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_length": 512}
    trainer = trainer_for(tmp_path, distill, 16, teacher_name_or_path=str(bard_folder()), **weights, **shape)
    rows = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    (batch,), normaliser = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    logits = []
    for model, size in ((trainer.model, 16), (trainer.teacher.model, 4)):
        mask = dense_mask(rows.layout(size))[:, None]
        logits.append(model(**model_inputs(rows, batch.input_ids, mask)).logits.log_softmax(-1))
    expected, counts = 0.0, {"taught": 0, "padding": 0, "in all": 0}
    step, last_shown = (rows.place - rows.origin) // 4, {}
    for row, column in rows.noisy.nonzero().tolist():
        block = (row, rows.sample[row, column].item(), rows.turn[row, column].item(), step[row, column].item() // 4)
        if not batch.masked[row, column]:
            last_shown[block] = max(last_shown.get(block, -1), step[row, column].item())
    behind = padding_blocks(rows, 4)
    for row, column in (batch.masked | batch.replaced).nonzero().tolist():
        block = (row, rows.sample[row, column].item(), rows.turn[row, column].item(), step[row, column].item() // 4)
        seen = positions == "all" or last_shown.get(block, -1) <= step[row, column].item()
        student, teacher = (each[row, column] for each in logits)
        entropy = -student[rows.input_ids[row, column]]
        divergence = (teacher.exp() * (teacher - student)).sum()
        taught = seen and not behind[row, column]
        expected += 0.7 * entropy + 0.4 * divergence if taught else 1.1 * entropy
        for name, is_so in (("taught", taught), ("padding", behind[row, column].item()), ("in all", True)):
            counts[name] += is_so
    assert min(counts["taught"], counts["padding"]) > 0
    assert counts["taught"] + counts["padding"] == counts["in all"] or positions == "fair"
    assert counts["in all"] == normaliser
    found = trainer.loss_sum(trainer.model, batch, trainer.tally)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert trainer.tally.totals[7] == counts["taught"]


@torch.no_grad()
def test_the_autoregressive_teacher_predicts_as_qwen3vl_does(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration

    changes = {"teacher_name_or_path": str(qwen_folder()), "teacher_kind": "ar", "per_device_train_batch_size": 4}
    trainer = trainer_for(tmp_path, distill, 8, time_high=0.3, **changes)
    qwen = Qwen3VLForConditionalGeneration.from_pretrained(qwen_folder(), dtype=torch.float32).eval()
    samples = [trainer.train_dataset[number] for number in range(4)]
    batches, _ = trainer.get_batch_samples(iter([trainer.data_collator(samples)]), 1, torch.device("cpu"))
    batch, rows = batches[0], batches[0].rows
    index = batch.weights.flatten().nonzero()[:, 0]
    mask, taught = trainer.attention_mask(rows.layout(1)), batch.taught.flatten()[index]
    logits = trainer.teacher.model.lm_head(trainer.teacher.hidden_states(batch, index, mask))
    for number, sample in enumerate(samples):
        grids = {name: value for name, value in sample.visual_inputs.items() if name.endswith("grid_thw")}
        position_ids = trainer.model.get_position_ids(sample.input_ids[None], **grids)
        expected = qwen(input_ids=sample.input_ids[None], position_ids=position_ids, **sample.visual_inputs).logits[0]
        own = (rows.sample.flatten()[index] == number) & taught
        places = rows.place.flatten()[index][own]
        assert own.any()
        torch.testing.assert_close(logits[own], expected[places - 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(taught, ~rows.is_response_padding.flatten()[index])
    assert not taught.all()


@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_teacher_is_not_asked_about_blocks_of_padding(tmp_path, size):
    trainer = trainer_for(tmp_path, block_size=16)
    rows = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    found = padding_blocks(rows, size)
    blocks: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, column in rows.noisy.nonzero().tolist():
        step = (rows.place - rows.origin)[row, column].item() // size
        blocks.setdefault((row, *(x[row, column].item() for x in (rows.sample, rows.turn)), step), []).append(
            (row, column)
        )
    expected = torch.zeros_like(rows.noisy)
    for places in blocks.values():
        if all(rows.is_response_padding[place] for place in places):
            for place in places:
                expected[place] = True
    assert expected.any()
    assert torch.equal(found, expected)


# --- Data and cost ----------------------------------------------------------------------------------------------------


def test_what_the_tokenizer_flags_as_special_replaces_nothing(tmp_path):
    """The example's tokenizer names end and padding alone; the tokens of chats and pictures have a flag."""
    processor = BardVLProcessor.from_pretrained(Path(bard_vl.__file__).parent / "examples" / "checkpoint")
    trainer = trainer_for(tmp_path)
    again = BlockDiffusionTrainer(
        model=trainer.model,
        args=trainer.args,
        block_size=4,
        processing_class=processor,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    special = {processor.image_token_id, processor.video_token_id, processor.vision_start_token_id}
    assert not special <= set(processor.tokenizer.all_special_ids)
    assert not special & set(again.replacements.tolist())


@pytest.mark.thorough
def test_broken_chats_are_counted_and_passed_over(tmp_path):
    source = chats_file()
    folder = shutil.copytree(source.parent, tmp_path / "chats")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])  # its size can be read, its pixels cannot
    trainer = trainer_for(tmp_path / "run", train_data=str(folder / "chats.jsonl"), max_steps=3, logging_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["broken_samples"] == 1
    assert trainer.state.log_history[0]["samples"] == 11


def test_the_cost_is_what_the_model_and_the_data_have(tmp_path):
    trainer = trainer_for(tmp_path)
    cost = Cost.of(trainer)
    assert sum(count for count, _ in cost.parameters.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert cost.samples == 4
    assert cost.steps == 4
    table = cost.table("a stage")
    assert f"{sum(trainer.train_dataset.lengths) / 12 * 4:,.0f}" in table
    longest = sorted(trainer.train_dataset.lengths)[-2:]
    assert cost.largest == (sum(longest) if sum(longest) <= 256 else 2 * longest[1])
    shape = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_length": 512}
    filled = trainer_for(tmp_path / "filled", fill_rows=True, **shape)
    shares = [[filled.train_dataset[number] for number in share] for share in filled.full_rows()]
    assert Cost.of(filled).largest == max(filled.data_collator(share).sample.numel() for share in shares)
    everything = sum(p.numel() for p in trainer.model.parameters())
    whole, split = (state_memory(trainer.model, kind, 2) for kind in ("none", "fsdp"))
    assert sum(whole.values()) == 16 * everything == 2 * sum(split.values())
    half = Cost.of(trainer_for(tmp_path / "half", bf16=True)).memory
    assert 0.95 < half["weights in bfloat16"] / (2 * everything) <= 1
    assert "weights in bfloat16" not in cost.memory
    zero1 = state_memory(trainer.model, "zero1", 4)
    assert sum(zero1.values()) == (2 + 2 + 12 / 4) * everything


def test_rows_of_flex_attention_are_whole_tiles(tmp_path, monkeypatch):
    """Its gradients failed on a GPU in a row that was not."""
    monkeypatch.setattr(BlockDiffusionArguments, "check", lambda args: None)  # it asks for CUDA
    for multiple, width in (1, 128), (48, 384):
        trainer = trainer_for(tmp_path / str(multiple), mask_form="flex", pad_to_multiple_of=multiple)
        shortest = min(range(12), key=trainer.train_dataset.lengths.__getitem__)
        rows = trainer.data_collator([trainer.train_dataset[shortest]])
        assert rows.input_ids.shape == (1, width)
        assert trainer.attention_mask(rows.layout()).shape == (1, 1, width, width)
        assert Cost.of(trainer).largest % width == 0
    trainer.data_collator.pad_to_multiple_of = 1  # as a collator of one's own may have it
    rows = trainer.data_collator([trainer.train_dataset[shortest]])
    with pytest.raises(ValueError, match=f"whole tiles of 128 columns, got {rows.input_ids.shape[1]}"):
        trainer.attention_mask(rows.layout())


@pytest.mark.parametrize("columns", [64, 65], ids=["repeated mask", "repeated keys"])
def test_the_estimate_counts_what_attention_makes_of_a_mask(columns):
    text = bard_vl.BardVLConfig().text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
    query, key, value = (torch.randn(1, heads, columns, 16, requires_grad=True) for heads in (4, 2, 2))
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 4 and tensor.shape[-1] == columns:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = torch.ones(1, 1, columns, columns, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = block_attention(torch.nn.Identity(), query, key, value, mask)
    dense, flex = (mask_memory(text, form, (1, columns), 4, True) for form in ("dense", "flex"))
    assert held[0].requires_grad
    assert sum(kept.values()) == dense - flex - columns**2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_near_what_is_kept(tmp_path, checkpointing):
    shape = {"per_device_train_batch_size": 12, "loss_chunk_size": 1}  # logits have a line of their own
    trainer = trainer_for(tmp_path, gradient_checkpointing=checkpointing, **shape)
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = trainer.data_collator([s for s in (trainer.train_dataset[n] for n in range(12)) if not s.visual_inputs])
    (batch,), _ = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept: dict[int, int] = {}
    masks: dict[int, int] = {}
    count, columns = rows.input_ids.shape

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            (masks if tensor.shape[-2:] == (columns, columns) else kept)[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held.append(trainer.loss_sum(trainer.model, batch, trainer.tally))
    tokens = rows.input_ids.numel()
    config = trainer.bare_model.config
    dense, flex = (
        mask_memory(config.text_config, form, (count, columns), 4, checkpointing) for form in ("dense", "flex")
    )
    copies = dense - flex - count * columns**2
    assert sum(masks.values()) == (0 if checkpointing else copies)
    (estimate,) = activation_memory(config, tokens, 4, checkpointing).values()
    if checkpointing:  # one layer at a time is made again in the backward, beside what the forward kept
        estimate -= activation_memory(config, tokens, 4, False)["activations"] / config.text_config.num_hidden_layers
    assert 0.7 < sum(kept.values()) / estimate < 1.4
