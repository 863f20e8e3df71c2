"""docs/command_line.md and docs/viewer.md are executed: every command and every snippet, as printed."""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bard_vl_cli.main import main
from fresh import ROOT, convert
from PIL import Image
from test_cli import environment, write_video
from tiny import draw_frames, draw_scene, write_qwen3vl
from training_cases import chats_file

pytestmark = pytest.mark.process

PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("command_line.md", "viewer.md")}


def blocks(language: str) -> list[str]:
    pages = "\n".join(PAGES.values())
    return re.findall(rf"^```{language}\n(.*?)^```", pages, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name; folders have the Hub's names, answers are short."""
    folder = tmp_path_factory.mktemp("manual")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "docs" / "images").mkdir(parents=True)
    source = write_qwen3vl(folder / "Qwen" / "Qwen3-VL-4B-Instruct", tokenizer="qwen")
    settings = convert(source, folder / "Bard-VL-4B", "--block-size", 4) / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_new_tokens": 20}))
    for number, name in enumerate(("photo.jpg", "other.jpg")):
        draw_scene(folder / name, seed=number)
    write_video(folder / "clip.mp4", draw_frames(8))
    pages = draw_frames(4, (120, 90))
    pages[0].save(folder / "report.pdf", save_all=True, append_images=pages[1:])
    shutil.copytree(chats_file().parent, folder, dirs_exist_ok=True)
    return folder


def execute(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run a line of a shell with one `bard-vl` in it, which may be piped into and redirected; code and output."""
    given, pipe, command = line.rpartition(" | ")
    command, _, target = command.partition(" > ")
    text = subprocess.run(["bash", "-c", given], capture_output=True, text=True).stdout if pipe else ""
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with contextlib.redirect_stdout(output):
        code = main(shlex.split(command)[1:])
    if target:
        Path(target).write_text(output.getvalue())
    return code, output.getvalue()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(("bard-vl", "printf"))])
def test_commands_run(line: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    if line == "bard-vl demo":
        return serve_and_interrupt(checkout)
    code, output = execute(line, monkeypatch)
    assert code == 0, capsys.readouterr().err
    assert output.strip() or line == "bard-vl chat photo.jpg"  # whose input is empty here


def serve_and_interrupt(checkout: Path) -> None:
    command = [sys.executable, "-m", "bard_vl_cli", "demo", "--port", "0"]  # its own port may be taken
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=checkout, env=environment(), **pipes)
    for line in process.stdout:
        if line.startswith("serving on http://127.0.0.1:"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130


def test_snippets_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for name in ("html", "gif", "png"):
        (checkout / f"answer.{name}").unlink(missing_ok=True)
    (snippet,) = blocks("python")
    exec(compile(snippet, "viewer.md", "exec"), {})
    assert "Describe the picture." in (checkout / "answer.html").read_text()
    with Image.open(checkout / "answer.gif") as gif, Image.open(checkout / "answer.png") as png:
        assert gif.n_frames > 1
        assert png.format == "PNG"


def test_the_pictures_shown_are_those_of_the_command(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    names = []
    for line in (line for line in COMMANDS if "docs/images" in line):
        assert execute(line, monkeypatch)[0] == 0
        names += re.findall(r"docs/images/(\S+)", line)
    assert sorted(names) == ["answer.gif", "answer.png", "race.gif"]
    for name in names:
        assert f"](images/{name})" in "".join(PAGES.values())
        shown, made = ROOT / "docs" / "images" / name, checkout / "docs" / "images" / name
        assert shown.stat().st_size < 300_000
        with Image.open(shown) as committed, Image.open(made) as written:
            assert committed.size == written.size
            assert getattr(committed, "n_frames", 1) == getattr(written, "n_frames", 1)


def test_no_command_is_of_another_kind() -> None:
    others = [line for line in COMMANDS if not line.startswith(("bard-vl ", "printf ", "pip install --editable"))]
    assert others == []
    assert set(re.findall(r"^```(\w+)", "\n".join(PAGES.values()), flags=re.MULTILINE)) == {"bash", "python"}


def test_every_command_is_in_the_manual(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    commands = re.findall(r"^│ ([a-z]+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        assert f"| `{command}` |" in PAGES["command_line.md"]
