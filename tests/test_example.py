"""examples/describe.py: mistakes end it with one line before the weights are loaded; drafts leave nothing behind."""

import ast
import fcntl
import importlib.util
import json
import os
import pty
import random
import re
import struct
import sys
import termios
import threading
import unicodedata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bard_vl import BardVLProcessor
from bard_vl.app.boxes import Thing
from bard_vl.evaluation.experiment import locating
from bard_vl.evaluation.grounding import as_json
from bard_vl.evaluation.scenes import scene
from bard_vl.evaluation.score_checkpoint import ABOUT, CHECKPOINT, score
from bard_vl.evaluation.tiny_model import EOS_TOKEN_ID
from bard_vl.training.packing import Sample
from fresh import ROOT, convert, mark_trained
from PIL import Image, ImageChops, ImageStat
from tiny import IDS, draw_scene, write_qwen3vl

HEIGHT = 4
GREY = "\033[90m"
PICTURES_SEED = 2  # of the pictures in examples/images; the study's scenes have 0, the score's 1


@pytest.fixture(scope="module")
def describe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("describe", ROOT / "examples" / "describe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, a converted one, one that states no block size, a picture and a text."""
    folder = tmp_path_factory.mktemp("example")
    write_qwen3vl(folder / "qwen")
    mask_token_id = IDS["small"].mask_token_id
    bard = mark_trained(convert(folder / "qwen", folder / "bard", "--block-size", 4, "--mask-token-id", mask_token_id))
    unstated = folder / "unstated"
    unstated.mkdir()
    (unstated / "config.json").write_text(re.sub(r'\s*"block_size": 4,', "", (bard / "config.json").read_text()))
    draw_scene(folder / "photo.jpg")
    (folder / "text.jpg").write_text("no picture")
    return folder


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("photo.jpg --model unstated", 2, "unstated states no block size: give --block-size, the number after B"),
        ("photo.jpg --model qwen", 2, "qwen is no Bard-VL checkpoint: its model type is qwen3_vl"),
        ("photo.jpg --model bard --block-size 0", 2, "`block_size` must be an integer of at least 1, got 0"),
        ("photo.jpg --model bard --threshold 2", 2, "`confidence_threshold` must be a number in [0.0, 1.0], got 2.0"),
        ("photo.jpg --model bard --max-new-tokens 0", 2, "`max_new_tokens` must be an integer of at least 1, got 0"),
        ("photo.jpg --model ./nowhere", 1, "nowhere"),
        ("absent.jpg --model bard", 1, "absent.jpg cannot be read as a picture: "),
        ("text.jpg --model bard", 1, "text.jpg cannot be read as a picture: cannot identify image file"),
        ("http://127.0.0.1:9/a.jpg --model bard", 1, "http://127.0.0.1:9/a.jpg cannot be read as a picture: "),
        ("photo.jpg --model unstated --block-size 4", 1, "unstated"),
    ],
)
def test_mistakes_end_in_one_line(
    describe: ModuleType,
    folder: Path,
    command: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["describe.py", *command.split()])
    monkeypatch.setattr(describe, "AutoModelForImageTextToText", None)  # no weights are read before
    with pytest.raises(SystemExit) as caught:
        describe.main()
    if code == 2:
        assert caught.value.code == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("describe.py: error: ")
    else:  # a text: the interpreter prints it and exits with 1
        line = caught.value.code
        assert line.startswith("error: ")
        assert "\n" not in line
    assert message in line


def test_describes_a_picture(
    describe: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = [folder / "photo.jpg", "--model", folder / "bard", "--threshold", 0.5, "--max-new-tokens", 8]
    monkeypatch.setattr(sys, "argv", ["describe.py", *map(str, command)])
    describe.main()
    output = capsys.readouterr().out
    assert re.search(r"denoising steps of each block: \d, \d\n\d+ forwards, \d+\.\d\d tokens per forward\n$", output)
    assert "\033" not in output, "no drafts where nobody looks"


# Checkpoint and pictures beside the script ---------------------------------------------------------------------------


def test_describes_its_own_picture(
    describe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["describe.py"])
    describe.main()
    told, steps, cost = capsys.readouterr().out.splitlines()
    assert told == scene(True, PICTURES_SEED, int(describe.PICTURE.stem)).caption()
    assert re.fullmatch(r"denoising steps of each block: \d+, \d+", steps)
    num_forwards, speed = re.fullmatch(r"(\d+) forwards, (.*) tokens per forward", cost).groups()
    assert sum(map(int, re.findall(r"\d+", steps))) == int(num_forwards)
    assert float(speed) > 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_scenes_that_no_training_sees(path: Path) -> None:
    shown = scene(True, PICTURES_SEED, int(path.stem))
    assert shown.held_out
    difference = ImageChops.difference(Image.open(path).convert("RGB"), shown.draw())
    assert max(ImageStat.Stat(difference).mean) < 1  # fonts differ a little between versions of Pillow


@pytest.mark.thorough
def test_the_checkpoint_answers_unseen_scenes() -> None:
    found = score(CHECKPOINT, None, num_scenes=48, threshold=None, about=["words"])
    assert found["shortest_answer"] > 16
    assert found["checkpoint"]["exact"] >= 95  # of 96 answers; checkpoint_score.json has what all of them give
    assert found["checkpoint"]["tokens_per_forward"] >= 18


def test_boxes_are_scored_beside_words() -> None:
    words, every = (score(CHECKPOINT, None, 2, None, about=about)["checkpoint"] for about in (["words"], ABOUT))
    for found in (words, every):
        assert found.pop("seconds") >= 0
    assert every | words == every, "what boxes take changes no figure of words"
    assert set(every) - set(words) == {"boxes", "box_iou_50", "box_tokens_per_forward", "box_seconds"}


def test_boxes_are_judged_by_label_and_place() -> None:
    tokenizer = BardVLProcessor.from_pretrained(CHECKPOINT).tokenizer

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"] + [EOS_TOKEN_ID])

    true = as_json([Thing("large red star", (64, 64, 128, 128))])  # 250 to 500 of 1000
    said = {
        true: (True, True),
        true + " ": (False, True),
        true.replace("[250,", "[375,"): (False, True),  # half of it
        true.replace("[250,", "[380,"): (False, False),
        true.replace("red", "blue"): (False, False),
        true[:-1] + ", " + true[1:]: (False, False),  # two things
        true.replace("[250, 250, 500, 500]", "[500, 250, 250, 500]"): (False, False),
        '[{"point_2d": [375, 375], "label": "large red star"}]': (False, False),
        "It is at b2.": (False, False),
        "": (False, False),
    }
    ids = ids_of(true)
    sample = Sample(torch.cat([ids, ids]), torch.empty(0), [(len(ids), 2 * len(ids))], torch.empty(0))
    judge = locating(tokenizer)
    for text, right in said.items():
        response = torch.cat([ids_of(text), ids])  # what follows its end counts for nothing
        assert judge([sample], [response]) == {"boxes": 100 * right[0], "box_iou_50": 100 * right[1]}, text
    assert judge([sample] * 3, [ids, ids_of(""), ids]) == {"boxes": 66.67, "box_iou_50": 66.67}


def test_the_score_that_is_told() -> None:
    told = json.loads((ROOT / "examples" / "checkpoint_score.json").read_text())
    assert told["scenes"] >= 1000
    assert min(told["checkpoint"][name] for name in ("exact", "boxes")) >= 95


# Drafts --------------------------------------------------------------------------------------------------------------


class Screen:
    """A terminal of `HEIGHT` rows that knows what the example sends: text, CR, LF, up, right, erase below, colours."""

    def __init__(self, width: int):
        self.width, self.row, self.column = width, 0, 0
        self.scrolled: list[str] = []
        self.cells = [[" "] * width for _ in range(HEIGHT)]

    def down(self) -> None:
        self.row += 1
        if self.row == HEIGHT:
            self.scrolled.append(self.text(self.cells.pop(0)))
            self.cells.append([" "] * self.width)
            self.row -= 1

    def write(self, output: str) -> "Screen":
        for number, code, character in re.findall(r"\033\[(\d*)([A-Za-z])|(.)", output, flags=re.DOTALL):
            if code:
                self.control(int(number or 1), code)
            elif character == "\n":
                self.down()
            elif character == "\r":
                self.column = 0
            else:
                self.put(character)
        return self

    def control(self, number: int, code: str) -> None:
        assert code in "ACJm", code
        if code == "A":
            self.row = max(self.row - number, 0)
        if code == "C":
            self.column = min(self.column + number, self.width - 1)
        if code == "J":
            column = min(self.column, self.width - 1)
            self.cells[self.row][column:] = [" "] * (self.width - column)
            self.cells[self.row + 1 :] = [[" "] * self.width for _ in self.cells[self.row + 1 :]]

    def put(self, character: str) -> None:
        size = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + size > self.width:
            self.column = 0
            self.down()
        self.cells[self.row][self.column : self.column + size] = [character] + [""] * (size - 1)
        self.column += size

    @staticmethod
    def text(row: list[str]) -> str:
        return "".join(row).rstrip()

    def lines(self) -> list[str]:
        return self.scrolled + [self.text(row) for row in self.cells]


class Letters:
    """A processor whose ids are code points; 0 is the mask."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            decode=lambda ids, **_: "".join(map(chr, [ids] if isinstance(ids, int) else ids))
        )

    def decode_draft(self, ids: torch.Tensor) -> str:
        return "".join(chr(i) if i else "▒" for i in ids.tolist())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs another with standard output on a terminal so wide; what it printed."""

    def run(width: int, function: Any) -> str:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
        output = bytearray()
        reader = threading.Thread(target=lambda: drain(master, output))
        reader.start()
        with monkeypatch.context() as patch, os.fdopen(slave, "w", encoding="utf-8") as stdout:
            patch.delenv("COLUMNS", raising=False)
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "__stdout__", stdout)
            function()
        reader.join()
        os.close(master)
        return output.decode()

    return run


def drain(master: int, output: bytearray) -> None:
    try:
        while chunk := os.read(master, 4096):
            output += chunk
    except OSError:  # what Linux says when the other end is closed
        return


def stream(streamer: Any, text: str, block_size: int, seed: int) -> None:
    """Write `text` as `generate` does: drafts with ever fewer masks, then the block."""
    ids, rng = [ord(character) for character in text], random.Random(seed)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for start in range(0, len(ids), block_size):
        block = torch.tensor(ids[start : start + block_size])
        draft = torch.zeros_like(block)
        for position in rng.sample(range(len(block)), len(block)):
            draft[position] = block[position]
            streamer.put_draft(value=draft[None])
        streamer.put(block)
    streamer.end()


@pytest.mark.parametrize("seed", range(40))
def test_drafts_leave_only_the_text(describe: ModuleType, terminal: Any, seed: int) -> None:
    rng = random.Random(seed)
    width = rng.choice([5, 9, 20, 80])
    text = "".join(rng.choice("ab cd ef\n犬が走る한국어 ") for _ in range(rng.randint(1, 90)))
    block_size = rng.choice([1, 3, 8, 16])
    output = terminal(width, lambda: stream(describe.DraftStreamer(Letters()), text, block_size, seed))
    assert GREY in output
    expected = Screen(width).write(text.replace("\n", "\r\n") + "\r\n").lines()
    assert [line for line in Screen(width).write(output).lines() if line] == [line for line in expected if line]


def test_a_tab_is_erased_with_its_draft(describe: ModuleType, terminal: Any) -> None:
    output = terminal(20, lambda: stream(describe.DraftStreamer(Letters()), "a\tb\tc d\te f", 4, 0))
    assert "".join(Screen(20).write(output).lines()).split() == list("abcdef")
    assert "\t" not in output


def test_a_draft_shows_what_is_open(describe: ModuleType, terminal: Any) -> None:
    def draw() -> None:
        streamer = describe.DraftStreamer(Letters())
        streamer.put_draft(value=torch.tensor([[ord("a"), 0, 0, ord("b")]]))

    assert Screen(20).write(terminal(20, draw)).lines()[0] == "a▒▒b"


# The notebook --------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text("utf-8"))
    assert len(notebook["cells"]) == 10
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        assert not cell.get("outputs"), "kept without outputs"
        if cell["cell_type"] == "code":
            *lines, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(lines, []), f"cell {number}", "exec"), names)
            is_shown = isinstance(last, ast.Expr)
            last = ast.Expression(last.value) if is_shown else ast.Module([last], [])
            shown = eval(compile(last, f"cell {number}", "eval" if is_shown else "exec"), names)
            if number == 5:
                assert "<iframe" in shown._repr_html_()
                assert "There are three shapes" in shown._repr_html_()
    written = capsys.readouterr().out
    assert written.startswith("There are three shapes")
    assert written.count("forwards True") == 3
