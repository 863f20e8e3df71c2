"""Recipes: those that ship build at tiny shapes, and bad ones end in one line before any work."""

import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from bard_vl import BardVLGenerationConfig
from bard_vl.app.checkpoints import EMBEDDED
from bard_vl.app.session import Session
from bard_vl.evaluation.grounding import write_chats
from bard_vl.training import distill, merge_and_distill, merge_blocks, self_distill, what_fits
from bard_vl.training.arguments import RecipeError, parse_recipe
from bard_vl.training.stages import Run, build_trainer
from tiny import draw_scene
from training_cases import MASK, bard_folder, chats_file, copy_of, qwen_folder, settings, write_recipe

RECIPES = Path(merge_blocks.__file__).parent / "recipes"
# Flags over the recipe for all that the machines of a test lack.
TINY = {
    "train_data": str(chats_file()),
    "use_cpu": "true",
    "max_steps": "30",
    "warmup_steps": "3",
    "min_pixels": "4096",
    "max_pixels": "65536",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "measuring_processes": "1",
    "dataloader_num_workers": "0",
    "show_answers": "0",
}


def merged_run(folder: Path, *sizes: int) -> Path:
    """A folder as a block-merging run leaves it."""
    for size in sizes:
        stage = copy_of(bard_folder(), folder / f"block-{size}")
        config = json.loads((stage / "config.json").read_text())
        (stage / "config.json").write_text(json.dumps({**config, "block_size": size}))
    return folder


def parse(module: Any, name: str, **flags: Any) -> tuple[Any, ...]:
    command = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return parse_recipe(module.RECIPE, [str(RECIPES / name), *command])


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_build_and_take_a_step(tmp_path, name):
    module = {"distill": distill, "self": self_distill}.get(name.split("_")[0], merge_blocks)
    flags = {**TINY, "model_name_or_path": str(bard_folder()), "output_dir": tmp_path / "run"}
    if module is self_distill:  # needs a model whose answers end
        write_chats(tmp_path / "words", 1, about="words")
        flags |= {
            "model_name_or_path": EMBEDDED,
            "train_data": tmp_path / "words" / "chats.jsonl",
            "max_pixels": "4096",
        }
    if module is distill:
        flags["model_name_or_path"] = merged_run(tmp_path / "merged", 4, 8)
    elif name.startswith("merge"):
        flags |= {"model_name_or_path": qwen_folder(), "mask_token_id": MASK}
    recipe = yaml.safe_load((RECIPES / name).read_text())
    model, data, args, special = parse(module, name, **flags)
    run = Run(model, data, args)
    stages = module.plan(run, special)
    stage = stages if module is self_distill else stages[-1 if module is distill else 0]
    trainer = build_trainer(run, stage, args)
    trainer.args.max_steps = 1
    assert trainer.args.learning_rate == recipe["learning_rate"]
    assert trainer.args.bf16
    assert (trainer.teacher is not None) == (module is distill)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("size", ["2b", "4b", "8b"])
def test_recipes_hold_the_settings_of_the_paper(tmp_path, size):
    merge = yaml.safe_load((RECIPES / f"merge_{size}.yaml").read_text())
    _, _, args, schedule = parse(merge_blocks, f"merge_{size}.yaml", use_cpu="true")
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert schedule.block_sizes == [4, 8, 16, 32]
    assert (args.learning_rate, args.group_learning_rate("merger")) == (2e-5, 2e-5)
    assert (args.group_learning_rate("vision"), args.min_learning_rate) == (2e-6, 1e-6)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.95, 1.0)
    assert args.weight_decay == (0.01 if size == "8b" else 0.0)
    assert args.warmup_steps == 1000
    assert (merge["max_length"], merge["min_pixels"], merge["max_pixels"]) == (8192, 65_536, 4_194_304)
    _, data, args, teaching = parse(distill, f"distill_{size}.yaml", use_cpu="true")
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (6e-6, 100, 3)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.5}
    assert (teaching.kd_direction, teaching.kd_temperature) == ("forward", 1.0)
    assert (teaching.kd_positions, teaching.kd_weight, teaching.ce_weight) == ("fair", 0.5, 1.0)
    assert data.max_pixels == 1_048_576


def test_the_small_checkpoint_can_be_trained_on(tmp_path):
    recipe = RECIPES.parents[1] / "evaluation" / "checkpoint.yaml"
    model, data, args, _ = parse_recipe(merge_blocks.RECIPE, [str(recipe), f"--output_dir={tmp_path}"])
    assert (RECIPES.parents[1] / model.model_name_or_path).resolve() == EMBEDDED
    assert len(data.train_data) == len(data.train_weights) == 2
    assert args.complementary_masks


def test_the_recipe_for_own_chats_has_ten_lines():
    assert len((RECIPES / "finetune.yaml").read_text().splitlines()) <= 10


@pytest.mark.parametrize("name", ["finetune.yaml", "grounding.yaml", "lora.yaml"])
def test_published_checkpoints_keep_their_noise(name):
    model, _, args, _ = parse(merge_blocks, name, use_cpu="true")
    assert "-Mask-" in model.model_name_or_path
    assert args.noise == "mask"
    assert model.use_lora or args.group_learning_rate("vision") == 2e-6


@pytest.mark.thorough
def test_twenty_chats_are_enough_and_answers_are_shown(tmp_path, capsys):
    flags = [f"--model_name_or_path={bard_folder()}", f"--train_data={chats_file(20)}", f"--output_dir={tmp_path}"]
    flags += ["--use_cpu=true", "--lora_rank=2", "--dtype=float32", "--bf16=false", "--decode_max_new_tokens=12"]
    assert merge_blocks.main(["--recipe", "lora", *flags]) == 0
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "block-4" / "trainer_state.json").read_text())["max_steps"] == 15
    shown = re.findall(r"^ +(question|wanted|before|after): (.*)$", out, flags=re.MULTILINE)
    assert [name for name, _ in shown] == ["question", "wanted", "before", "after"] * 3
    assert shown[1][1] == "The colour of the circle is red."
    assert [shown[4 * number + 2] for number in range(3)] != [shown[4 * number + 3] for number in range(3)]
    session = Session(str(bard_folder()), BardVLGenerationConfig(max_new_tokens=12))
    chat = json.loads(chats_file(20).read_text().splitlines()[2])
    before = session.ask(chat["messages"][:1]).text
    assert shown[10][1] == textwrap.shorten(before, 100, placeholder=" ...")


def test_recipes_of_the_package_go_by_name(tmp_path):
    flags = ["--train_data", "chats.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    by_name = parse_recipe(merge_blocks.RECIPE, ["--recipe", "lora", *flags])
    by_path = parse_recipe(merge_blocks.RECIPE, [str(RECIPES / "lora.yaml"), *flags])
    assert by_name[0] == by_path[0]
    assert by_name[0].use_lora
    with pytest.raises(RecipeError, match=r"`--recipe` must be one of distill_2b, .*, grounding, lora, .* got 'lore'"):
        parse_recipe(merge_blocks.RECIPE, ["--recipe", "lore", *flags])


@pytest.mark.process
def test_a_warm_up_without_an_end_is_told_before_weights_are_read(tmp_path, monkeypatch):
    flags = {**TINY, "model_name_or_path": str(bard_folder()), "output_dir": tmp_path / "run", "use_lora": "false"}
    flags |= {"max_steps": "-1", "num_train_epochs": "1", "warmup_steps": "500"}
    model, data, args, special = parse(merge_blocks, "lora.yaml", **flags)
    run = Run(model, data, args)
    monkeypatch.setattr("bard_vl.training.stages.load_student", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(RecipeError, match="`warmup_steps` 500 leaves none of the "):
        build_trainer(run, merge_blocks.plan(run, special)[0], args)


def test_flags_override_the_recipe(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "run", block_sizes=[4, 8], freeze=["vision"]))
    flags = ["--learning_rate", "1e-4", "--block_sizes", "8", "16", "32", "--use_lora", "true", "--max-steps", "7"]
    model, _, args, schedule = parse_recipe(merge_blocks.RECIPE, [str(recipe), *flags])
    assert (args.learning_rate, args.max_steps, schedule.block_sizes) == (1e-4, 7, [8, 16, 32])
    assert (model.use_lora, model.freeze) == (True, ["vision"])
    with pytest.raises(RecipeError, match="`output_dir` is missing"):
        parse_recipe(merge_blocks.RECIPE, ["--model_name_or_path", "a", "--train_data", "b", "--use_cpu"])


BAD_MERGES = {
    "unknown key": ({"learning_rat": 1}, "unknown key 'learning_rat' in the recipe; did you mean 'learning_rate'?"),
    "key of the other entry point": ({"kd_weight": 1}, "unknown key 'kd_weight'"),
    "type": ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
    "choice": ({"noise": "loud"}, "'loud'"),
    "block sizes that do not ascend": ({"block_sizes": [4, 16, 8]}, "`block_sizes` must ascend, got [4, 16, 8]"),
    "block size 0": ({"block_sizes": [0, 4]}, "`block_sizes` must be positive, got [0, 4]"),
    "steps of stages": (
        {"block_sizes": [4, 8], "steps_per_stage": [5]},
        "`steps_per_stage` has 1 numbers for 2 stages",
    ),
    "full rows of a stream": ({"fill_rows": True, "streaming": True}, "`fill_rows` needs measured chats"),
    "stream without steps": ({"streaming": True, "max_steps": None}, "`streaming` needs `max_steps`"),
    "warmup": ({"warmup_steps": 50}, "`warmup_steps` 50 leaves none of the 4 steps"),
    "warmup in epochs": (
        {"warmup_steps": 50, "max_steps": None, "num_train_epochs": 2},
        "`warmup_steps` 50 leaves none of the 6 steps",
    ),
    "compilation": ({"torch_compile": True}, "`torch_compile` is not supported"),
    "model": ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
    "no model": ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
    "no data": ({"train_data": None}, "`train_data` is missing"),
    "data": ({"train_data": "/nowhere/chats.jsonl"}, "/nowhere/chats.jsonl"),
    "length": ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
    "pixels": ({"min_pixels": 500_000, "max_pixels": 100_000}, "`min_pixels` 500000 is above `max_pixels` 100000"),
    "group": ({"freeze": ["tongue"]}, "`freeze` names 'tongue'"),
    "nothing to train": ({"freeze": ["language", "merger", "vision"]}, "nothing is left to train"),
    "times": ({"time_low": 0.9, "time_high": 0.1}, "got 0.9 and 0.1"),
    "strategy": ({"save_strategy": "epoch"}, "`save_strategy` must be no or steps, got 'epoch'"),
    "evaluation without chats": ({"eval_strategy": "steps"}, "`eval_data` is missing"),
    "decoding without chats": ({"decode_samples": 3}, "`eval_data` is missing"),
    "floor": ({"min_learning_rate": 1e-6, "lr_scheduler_type": "linear"}, "got 'linear'"),
    "flex on the CPU": ({"mask_form": "flex"}, "`mask_form: flex` trains on CUDA only"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
    "optimizer": ({"optim": "adamw_tortoise"}, "adamw_tortoise"),
    "lora head": ({"use_lora": True, "lora_target_modules": ["lm_head"]}, "`lora_target_modules` names 'lm_head'"),
    "complement": ({"complementary_masks": True, "time_high": 0.9}, "must be 1, got 0.0 and 0.9"),
    "weights": ({"train_data": ["a", "b"], "train_weights": [1.0]}, "`train_weights` has 1 numbers for 2 sources"),
    "weight": ({"train_weights": [0.0]}, "`train_weights` must be positive, got 0.0"),
    "endless weight": ({"train_weights": [float("inf")]}, "`train_weights` must be positive, got inf"),
    "streams": ({"train_data": ["a", "b"], "streaming": True, "max_steps": 1}, "`streaming` reads one source"),
    "bits alone": ({"quantize": "nf4"}, "`quantize: nf4` needs `use_lora: true`"),
    "drafts": ({"draft_share": 1.5}, "`draft_share` must lie between 0 and 1, got 1.5"),
    "patience": ({"early_stopping_patience": 0}, "`early_stopping_patience` must be at least 1, got 0"),
    "patience alone": ({"early_stopping_patience": 2}, "set `load_best_model_at_end: true`"),
    "padding": ({"padding_weight": -1.0}, "`padding_weight` must be at least 0, got -1.0"),
}


def refused(module: Any, recipe: Path, output: Path, message: str, capsys: Any) -> None:
    capsys.readouterr()
    assert module.main([str(recipe)]) == 1
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not [path for path in output.glob("**/*") if path.is_file()], "something was written"


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("case", BAD_MERGES)
def test_bad_recipes_of_block_merging(tmp_path, capsys, case):
    changes, message = BAD_MERGES[case]
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "run", **changes))
    refused(merge_blocks, recipe, tmp_path / "run", message, capsys)


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
)
def test_adapters_of_split_weights_are_refused(tmp_path, monkeypatch, variables):
    model, data, args, schedule = parse(
        merge_blocks, "lora.yaml", **TINY, model_name_or_path=bard_folder(), output_dir=tmp_path / "run"
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="`use_lora` merges whole weights"):
        merge_blocks.plan(Run(model, data, args), schedule)


def test_a_file_that_is_no_recipe(tmp_path, capsys):
    for text, message in (("a: [1", "is no YAML"), ("- a\n- b\n", "must hold `key: value` lines, got list")):
        (tmp_path / "recipe.yaml").write_text(text)
        refused(merge_blocks, tmp_path / "recipe.yaml", tmp_path / "run", message, capsys)
    refused(merge_blocks, tmp_path / "missing.yaml", tmp_path / "run", "No such file", capsys)


def test_a_folder_that_is_no_stage_is_left_alone(tmp_path, capsys):
    (tmp_path / "run/block-4").mkdir(parents=True)
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "run"))
    refused(merge_blocks, recipe, tmp_path / "run", "exists and is no checkpoint", capsys)


BAD_DISTILLATIONS = {
    "no anchor": ({"model_name_or_path": "{alone}"}, "no teacher: beside"),
    "teacher": ({"teacher_name_or_path": "/nowhere/teacher"}, "/nowhere/teacher"),
    "autoregressive by mistake": ({"teacher_name_or_path": "{qwen}"}, "needs `teacher_kind: ar`"),
    "no autoregressive one": ({"teacher_kind": "ar", "teacher_name_or_path": "{alone}"}, "is a Bard-VL"),
    "kind without teacher": ({"teacher_kind": "ar"}, "`teacher_kind: ar` needs `teacher_name_or_path`"),
    "blocks that do not divide": ({"teacher_block_size": 3}, "a teacher at block size 3 cannot teach a student at 8"),
    "stage that is not there": ({"block_sizes": [32]}, "`block_sizes` has 32"),
    "weights": ({"kd_weight": 0.0}, "`kd_weight` must be above 0, got 0.0"),
    "temperature": ({"kd_temperature": 0.0}, "`kd_temperature` must be above 0, got 0.0"),
    "top k": ({"kd_top_k": 10_000}, "`kd_top_k` 10000 is more than the vocabulary of 448"),
    "direction": ({"kd_direction": "sideways"}, "'sideways'"),
    "into the source": ({"output_dir": "{merged}"}, "is in `output_dir`"),
}


@pytest.mark.parametrize("case", BAD_DISTILLATIONS)
def test_bad_recipes_of_distillation(tmp_path, capsys, case):
    changes, message = BAD_DISTILLATIONS[case]
    names = {
        "alone": str(copy_of(bard_folder(), tmp_path / "alone")),
        "qwen": str(qwen_folder()),
        "merged": str(merged_run(tmp_path / "merged", 4, 8)),
    }
    changes = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    shape = {"model_name_or_path": names["merged"], **changes}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "run", **shape))
    refused(distill, recipe, tmp_path / "run", message, capsys)


BAD_PAIRS = {
    "one recipe": (["{merge}"], "name two recipes"),
    "unknown flag": (["{merge}", "{distill}", "--kd_wait", "1"], "unknown argument '--kd_wait'"),
    "word": (["{merge}", "{distill}", "7"], "unknown argument '7'"),
    "one folder": (["{merge}", "{distill}", "--output_dir", "{run}"], "both recipes have the `output_dir`"),
    "one stage": (["{merge}", "{distill}", "--block_sizes", "4"], "there is nothing to distil"),
    "teacher": (["{merge}", "{distill}", "--teacher_block_size", "3"], "an anchor at 3 cannot teach blocks of 8"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_of_recipes(tmp_path, capsys, case):
    words, message = BAD_PAIRS[case]
    names = {
        "merge": write_recipe(tmp_path / "merge.yaml", settings(tmp_path / "merged", block_sizes=[4, 8])),
        "distill": write_recipe(tmp_path / "distill.yaml", settings(tmp_path / "taught")),
        "run": tmp_path / "merged",
    }
    capsys.readouterr()
    assert merge_and_distill.main([word.format(**names) for word in words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not [path for name in ("merged", "taught") for path in (tmp_path / name).glob("**/*") if path.is_file()]


@pytest.mark.parametrize("positions", ["all", "fair"])
def test_divergence_alone_at_blind_positions_is_warned_of(tmp_path, caplog, monkeypatch, positions):
    monkeypatch.setattr(distill, "plan", lambda run, settings: [])
    shape = {"ce_weight": 0.0, "kd_weight": 1.0, "kd_positions": positions}
    assert distill.main([str(write_recipe(tmp_path / "a.yaml", settings(tmp_path / "run", **shape)))]) == 0
    assert ("set `kd_positions: fair`" in caplog.text) == (positions == "all")


def documented_commands() -> list[list[str]]:
    """The training commands of the manual, in words."""
    text = (RECIPES.parents[1] / "docs" / "training.md").read_text()
    lines = [line for block in text.split("```bash\n")[1:] for line in block.split("```")[0].splitlines()]
    return [shlex.split(line) for line in lines if " -m bard_vl.training." in line and "--train_data" in line]


@pytest.mark.parametrize("command", documented_commands(), ids=lambda command: command[-5])
def test_commands_of_the_manual_parse(command):
    place = command.index("-m")
    launcher, name, (recipe, *flags) = command[:place], command[place + 1], command[place + 2 :]
    if launcher[0] == "accelerate":
        assert (RECIPES.parents[1] / launcher[launcher.index("--config_file") + 1]).is_file()
    if name == "bard_vl.training.merge_and_distill":
        other, *flags = flags
        words = [*(str(RECIPES.parents[1] / each) for each in (recipe, other)), *flags, "--use_cpu", "true"]
        merging, _, distilling, _ = merge_and_distill.parse(words)
        assert merging.data.train_data == distilling.data.train_data == [flags[flags.index("--train_data") + 1]]
        return
    module = {each.__name__: each for each in (merge_blocks, distill, self_distill)}[name]
    parsed = parse_recipe(module.RECIPE, [str(RECIPES.parents[1] / recipe), *flags, "--use_cpu", "true"])
    assert parsed[1].train_data == [flags[flags.index("--train_data") + 1]]


@pytest.mark.thorough
def test_the_command_to_try_first_trains_the_small_checkpoint(tmp_path, monkeypatch):
    folder = RECIPES.parents[1]
    command = next(command for command in documented_commands() if "examples/checkpoint" in command)
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "training"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(chats_file().parent, tmp_path, dirs_exist_ok=True)
    assert merge_blocks.main(command[command.index("-m") + 2 :]) == 0
    assert json.loads((tmp_path / "tried/block-32/config.json").read_text())["block_size"] == 32
    exec((folder / "docs" / "training.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "from-python" / "block-32" / "config.json").is_file()


@pytest.mark.process
def test_the_chat_of_the_manual_is_one(tmp_path):
    chat = (RECIPES.parents[1] / "docs" / "training.md").read_text().split("```json\n")[1].split("```")[0]
    (tmp_path / "photos").mkdir()
    draw_scene(tmp_path / "photos" / "1.jpg")
    (tmp_path / "chats.jsonl").write_text(chat * 2)
    flags = {**TINY, "train_data": tmp_path / "chats.jsonl", "model_name_or_path": bard_folder()}
    model, data, args, schedule = parse(merge_blocks, "finetune.yaml", **flags, output_dir=tmp_path / "run")
    run = Run(model, data, args)
    trainer = build_trainer(run, merge_blocks.plan(run, schedule)[0], args)
    assert len(trainer.train_dataset) == 2


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as stopped:
        merge_blocks.main(["--help"])
    assert stopped.value.code == 0
    assert "--block_sizes" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_manual_says_what_fits(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        what_fits.main(["--columns", "0"])
    assert "--columns must be at least 1, got 0" in capsys.readouterr().err
    manual = (RECIPES.parents[1] / "docs" / "training.md").read_text()
    monkeypatch.setattr(what_fits, "SIZES", {"2B": what_fits.SIZES["2B"]})
    for line in what_fits.table(4096).splitlines()[2:]:
        assert line.removesuffix(" |") in manual
    assert [what_fits.card(gigabytes * 1e9) for gigabytes in (21, 22, 72, 73)] == [
        "24 GB",
        "80 GB",
        "80 GB",
        "too much for 80 GB",
    ]
