"""Files of a training run that are damaged, and a disk that is full: named in one line, and what is whole is used."""

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bard_vl.training import merge_blocks
from bard_vl.training.checkpoints import damage
from safetensors.torch import load_file
from training_cases import in_a_fork, losses, settings, write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("whole")
    assert merge_blocks.main([str(write_recipe(folder / "run.yaml", settings(folder / "run")))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted before it could write its last weights."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bard_vl.training.stages.finish", stop)
        assert merge_blocks.main([str(write_recipe(folder / "run.yaml", settings(folder / "run")))]) == 130
    return folder / "run"


DAMAGES = {
    "model.safetensors": "has {half} of {size} bytes",
    "optimizer.pt": "has {half} of {size} bytes",
    "trainer_state.json": "has {half} of {size} bytes",
    "complete.json": "complete.json is damaged: ",
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", DAMAGES)
def test_beside_a_damaged_checkpoint_an_older_one_goes_on(tmp_path, name, capsys, whole, stopped):
    """Each file cut in half, as a machine that went down may leave it."""
    output = Path(shutil.copytree(stopped, tmp_path / "run"))
    recipe = write_recipe(tmp_path / "run.yaml", settings(output))
    newest = output / "runs/block-4/checkpoint-4"
    size = (newest / name).stat().st_size
    os.truncate(newest / name, size // 2)
    assert merge_blocks.main([str(recipe)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    fault = DAMAGES[name].format(half=size // 2, size=size)
    assert said[0].startswith(f"{newest} is damaged and not used: ")
    assert fault in said[0]
    assert losses(output / "block-4") == losses(whole / "block-4")
    again = load_file(output / "block-4/model.safetensors")
    for key, value in load_file(whole / "block-4/model.safetensors").items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("config.json", b"", "config.json is damaged"),
        ("trainer_state.json", b"\0" * 99, "trainer_state.json is damaged"),
        ("model.safetensors", b"\0" * 999, "model.safetensors is damaged"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}', "names x.safetensors"),
        ("model.safetensors.index.json", b'{"weight', "model.safetensors.index.json is damaged"),
        ("tokenizer.json", b'{"version": "1.0", "trunc', "tokenizer.json is damaged"),
    ],
)
def test_a_damaged_file_of_a_stage_is_named(tmp_path, name, content, fault, capsys, whole):
    """Whether the stage is finished or the source of the next."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "block-4" / name).write_bytes(content)
    assert fault in str(damage(run / "block-4"))
    is_read = name in ("config.json", "model.safetensors", "tokenizer.json")  # by the next stage
    for shape in ({}, {"model_name_or_path": str(run / "block-4"), "output_dir": tmp_path / "next"})[: 1 + is_read]:
        recipe = write_recipe(tmp_path / "again.yaml", settings(shape.pop("output_dir", run), **shape))
        assert merge_blocks.main([str(recipe)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert str(run / "block-4") in last
        assert name.partition(".")[0] in last


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"seed": 4', b"[1]"])
def test_damaged_settings_of_a_run_are_named(tmp_path, content, capsys, stopped):
    output = Path(shutil.copytree(stopped, tmp_path / "run"))
    (output / "runs/block-4/settings.json").write_bytes(content)
    assert merge_blocks.main([str(write_recipe(tmp_path / "run.yaml", settings(output)))]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {output}/runs/block-4")
    assert "settings.json" in last


def train_with_full_disk(recipe: Path, limit: int) -> None:
    """A process in which no file can be longer than a limit, and so cannot be written to its end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(merge_blocks.main([str(recipe)]))


@pytest.mark.process
def test_a_full_disk_ends_training_in_one_line_and_keeps_what_was_whole(tmp_path, stopped, capfd):
    output = tmp_path / "run"
    recipe = write_recipe(tmp_path / "run.yaml", settings(output))
    sizes = {path.name: path.stat().st_size for path in (stopped / "runs/block-4/checkpoint-4").iterdir()}
    name = "checkpoint-2"
    for limit in (sizes["optimizer.pt"] - 999, sizes["model.safetensors"] // 2):
        code = in_a_fork(train_with_full_disk, recipe, limit)
        said = capfd.readouterr().err
        assert code == 1, said
        last = said.splitlines()[-1]
        assert last.startswith(f"error: {output}/runs/block-4/{name} cannot be written: ")
        assert last.endswith("; the same command goes on from the last checkpoint")
        assert "Traceback" not in said
        assert not (output / "runs/block-4" / name).exists()
    assert merge_blocks.main([str(recipe)]) == 0
    assert len(losses(output / "block-4")) == 4
