"""Recipes run as printed, the table of compatibility is whole, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import compatibility
import fresh
import pytest
import tiny
from test_cli import write_video
from test_readme import CI, PUBLISHED, make_published

pytestmark = pytest.mark.process

DOCS = fresh.ROOT / "docs"
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")
TABLE = (DOCS / "compatibility.md").read_text(encoding="utf-8")
IN_MEMORY, ON_DISK = 'offload_folder="offload"', 'offload_folder="offload", max_memory={"cpu": 300_000}'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", RECIPES, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the recipes name, and a Hugging Face home with their checkpoint, whose answers are short."""
    room = tmp_path_factory.mktemp("recipes")
    published = make_published(tiny.write_qwen3vl(room / "qwen"), room / "published")
    for name, change in {"config": {"mask_token_id": 447}, "generation_config": {"max_new_tokens": 20}}.items():
        path = published / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    fresh.add_to_hub_cache(room, PUBLISHED, published)
    tiny.draw_scene(room / "photo.jpg", (320, 256))
    for number in (1, 2, 3):
        tiny.draw_scene(room / f"page-{number}.png", (224, 320), number)
    (room / "frames").mkdir()
    for number, frame in enumerate(tiny.draw_frames(8)):
        frame.save(room / "frames" / f"{number}.jpg")
    write_video(room / "clip.mp4", tiny.draw_frames(12))
    return room


def test_snippets_run_in_order(room: Path) -> None:
    script = "\n".join(blocks("python"))
    assert script.count(IN_MEMORY) == 1
    script = script.replace(IN_MEMORY, ON_DISK) + "\nprint({*spread.hf_device_map.values()})"
    output = fresh.python("-c", script, home=room, OMP_NUM_THREADS="1")
    encoded = re.findall(r"\((\d+) of (\d+) tokens encoded\)", output)
    assert len(encoded) == 3
    assert encoded[0][0] == encoded[0][1]
    assert all(int(some) < int(whole) / 2 for some, whole in encoded[1:]), encoded
    assert "'disk'" in output.splitlines()[-1], "nothing was offloaded"


@pytest.mark.process(group="lines")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("bard-vl run")])
def test_commands_run(room: Path, command: str) -> None:
    output = fresh.call("fresh.command_line", *shlex.split(command)[1:], home=room, package=True)
    assert len(output) > 3
    assert ("in all, at most" in output) == ("--dry-run" in command)


def test_every_command_is_run() -> None:
    assert all(command.startswith("bard-vl run") for command in COMMANDS)
    assert {*re.findall(r"^```(\w+)", RECIPES, flags=re.MULTILINE)} == {"python", "bash"}


@pytest.mark.process(group="lines")
def test_features_are_tried(tmp_path: Path) -> None:
    names = ["load_own_processor", "load_published_processor"]
    qwen = tiny.write_qwen3vl(tmp_path / "qwen")
    make_published(qwen, tmp_path / "published")
    (found,) = compatibility.run_lines([""], names, tmp_path)
    works, fails = (found["features"][name] for name in names)
    assert works is None
    assert fails == "transformers' own `Qwen3VLProcessor`, by its file; it pads on the right"
    assert found["versions"].keys() >= {"transformers", "torch"}


def test_a_dead_process_and_an_exception_are_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def die(room: Path) -> None:
        import os

        os._exit(3)

    def fail(room: Path) -> None:
        raise KeyError(f"{room}/name", "x" * 1000)

    monkeypatch.setattr(compatibility, "FEATURES", {"die": ("", die), "fail": ("", fail)})
    assert compatibility.attempt("die", tmp_path) == "its process died"
    said = compatibility.attempt("fail", tmp_path)
    assert said.startswith("KeyError: ('name', 'xxx")
    assert len(said) < 1000


def test_the_table_has_every_feature_and_every_line() -> None:
    head, _, *rows = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith("|")]
    assert head == re.findall(r'"(\d+\.\d+\.\d+) \S+ \S+"', CI)
    assert [row[0] for row in rows] == [
        *(title for title, _ in compatibility.FEATURES.values()),
        *("tried with huggingface-hub", "tried with tokenizers", "tried with datasets"),
    ]
    numbers = re.findall(r"^(\d+)\. ", TABLE, flags=re.MULTILINE)
    cells = [cell for _, *line in rows[: len(compatibility.FEATURES)] for cell in line]
    assert len(cells) == len(head) * len(compatibility.FEATURES)
    assert all(re.fullmatch(r"yes|(no|not tried) \(\d+\)", cell) for cell in cells)
    assert {*re.findall(r"\((\d+)\)", " ".join(cells))} == {*numbers}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (DOCS / page).read_text("utf-8")):
        path = DOCS / (target or page)
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
