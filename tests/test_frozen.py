"""The remote code that release 0.1.0 wrote beside a checkpoint, on every line: what holds, what does not, the cure.

`frozen/bard_vl-0.1.0.tar.xz` has that release's files. docs/compatibility.md says the same to users.
"""

import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import fresh
import pytest
import tiny

pytestmark = pytest.mark.process(group="lines")
MASK = tiny.IDS["small"].mask_token_id
ARCHIVE = fresh.TESTS / "frozen" / "bard_vl-0.1.0.tar.xz"
# 5.24 hands outputs their `past_key_values` under another name, which the output of 0.1.0 does not have.
BREAKING = (5, 24)
WITH_OUTPUTS = ("output with its cache", "second turn")
REASON = "BardVLGenerationOutput.__init__() got an unexpected keyword argument 'cache'"
PAGE = (fresh.ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


# --- what runs in a fresh process, on each line of transformers -------------------------------------------------------


def load(folder: str) -> tuple[Any, Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    text = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    return model, processor, processor(text=text, images=[tiny.draw()], return_tensors="pt")


SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "confidence_threshold": 0.3}


def use(folder: str) -> dict[str, Any]:
    """The result of each use of the model, or its error; and the place that the code came from."""
    import torch

    model, processor, inputs = load(folder)
    length = inputs["input_ids"].shape[1]
    text = torch.arange(20, 36)[None]

    def second_turn() -> list[int]:
        cache = model.generate(**inputs, **SETTINGS, return_dict_in_generate=True).past_key_values
        return model.generate(**inputs, **SETTINGS, past_key_values=cache)[0, length:].tolist()

    def save() -> list[int]:
        model.save_pretrained(f"{folder}-saved")
        processor.save_pretrained(f"{folder}-saved")
        again, _, inputs = load(f"{folder}-saved")
        return again.generate(**inputs, **SETTINGS)[0, length:].tolist()

    uses = {
        "generate": lambda: model.generate(**inputs, **SETTINGS)[0, length:].tolist(),
        "the model card's call": lambda: model.generate(inputs, **SETTINGS, return_step_stats=True)[0][0].tolist(),
        "forward": lambda: model(**inputs).logits.shape[1] == length,
        "loss": lambda: model(text, labels=text, use_cache=False).loss.item() > 0,
        "score": lambda: model.score(inputs, torch.tensor([[20, 21]])).sum().item() < 0,
        "save and load": save,
        WITH_OUTPUTS[0]: lambda: (
            model.generate(**inputs, **SETTINGS, return_dict_in_generate=True).sequences[0, length:].tolist()
        ),
        WITH_OUTPUTS[1]: second_turn,
    }
    found = {name: tried(function) for name, function in uses.items()}
    return {"module": type(model).__module__, "processor": type(processor).__name__, **found}


def tried(function: Any) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def use_with_package(folder: str) -> dict[str, Any]:
    import bard_vl  # noqa: F401

    return use(folder)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A converted checkpoint with today's code, and the same with that of 0.1.0."""
    room = tmp_path_factory.mktemp("frozen")
    source = tiny.write_qwen3vl(room / "qwen")
    today = fresh.convert(source, room / "today", "--block-size", 4, "--mask-token-id", MASK)
    old = Path(shutil.copytree(today, room / "old", ignore=shutil.ignore_patterns("*_bard_vl.py")))
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(old, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    return today, old


@pytest.fixture(scope="module", params=fresh.LINES, ids=fresh.line_name)
def line(request: pytest.FixtureRequest) -> str:
    return request.param


def run(function: str, folder: Path, line: str, room: Path) -> dict[str, Any]:
    """Call a function of this file on a copy of the folder, on a line."""
    copy = shutil.copytree(folder, room / folder.name)
    package = function == "use_with_package"
    return fresh.call(f"test_frozen.{function}", copy, home=room / "home", line=line, package=package)


def version_of(line: str) -> tuple[int, ...]:
    if line:
        return tuple(map(int, Path(line).name.split(".")))
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:3]))


def test_code_of_0_1_0_works_beside_its_weights(folders: tuple[Path, Path], line: str, tmp_path: Path) -> None:
    today, old = (run("use", folder, line, tmp_path / folder.name) for folder in folders)
    assert old.pop("module").startswith("transformers_modules.old.")
    assert today.pop("module").startswith("transformers_modules.today.")
    assert all("Error" not in str(found) for found in today.values())
    broken = WITH_OUTPUTS if version_of(line) >= BREAKING else ()
    assert old == {**today, **dict.fromkeys(broken, f"TypeError: {REASON}")}
    assert REASON in " ".join(PAGE.split())


def test_the_installed_package_takes_the_place_of_old_code(folders: tuple[Path, Path], tmp_path: Path) -> None:
    if version_of("") < BREAKING:
        pytest.skip(
            "nothing is broken on this line, and older ones run the code beside the weights where it is trusted"
        )
    found = run("use_with_package", folders[1], "", tmp_path)
    assert found.pop("module") == "bard_vl.modeling_bard_vl"
    assert all("Error" not in str(each) for each in found.values())
    assert found["second turn"] == found["generate"]


def test_the_converter_writes_new_code_over_old(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, old = folders
    renewed = fresh.convert(old, tmp_path / "renewed")
    assert {path.name for path in renewed.glob("*_bard_vl.py")} == {p.name for p in fresh.ROOT.glob("*_bard_vl.py")}
    for path in renewed.glob("*_bard_vl.py"):
        assert path.read_bytes() == (fresh.ROOT / path.name).read_bytes()
    found = run("use", renewed, "", tmp_path / "room")
    assert found["second turn"] == found["generate"]
