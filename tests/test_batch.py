"""`bard-vl batch`: every row is answered once, as `generate` answers it, whatever kills the run, however often."""

import collections
import concurrent.futures
import contextlib
import inspect
import json
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bard_vl
import datasets
import fresh
import lmms_tasks
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from bard_vl.batch import answers as answers_module
from bard_vl.batch import files, job
from bard_vl.batch.answers import Answers, as_line
from bard_vl.batch.requests import Asking, Inventory, find_pieces, open_requests, read_requests, take_stock
from bard_vl.batch.workers import Recipe, Worker
from bard_vl_cli.batch import batch as batch_command
from bard_vl_cli.main import main
from bard_vl_cli.run import run as run_command
from PIL import Image

NUM_REQUESTS = 24
ORIENTATION = 0x0112  # of EXIF; 6 is what a telephone held upright writes
WRONG = {
    "question 5": "missing.png",
    "question 8": "`images` must be a list of paths, got None",
    9: "list of turns",
}  # and what their errors say
MANUAL = (fresh.ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
PRINTED = re.findall(r"^bard-vl .*", MANUAL, flags=re.MULTILINE)
SETTINGS = ["--batch-size", "2", "--max-new-tokens", "21", "--threshold", "0.02"]
DECODING = {"max_new_tokens": 21, "confidence_threshold": 0.02}  # the same


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, pictures, and questions about none to two of them; one picture is missing."""
    room = tmp_path_factory.mktemp("room")
    fresh.convert(tiny.write_qwen3vl(room / "qwen"), room / "bard", "--block-size", 4, "--mask-token-id", 447)
    (room / "pictures").mkdir()
    for index in range(3):
        tiny.draw_scene(room / "pictures" / f"{index}.png", (96 + 32 * index, 64), seed=index)
    requests: list[dict[str, Any]] = []
    for index in range(NUM_REQUESTS):
        pictures = [f"pictures/{number % 3}.png" for number in range(index, index + index % 3)]
        requests.append(
            {"id": f"question {index}", "prompt": f"What is it?{' Why?' * (index % 5)}", "images": pictures}
        )
    requests[5]["images"] = ["pictures/missing.png"]
    tiny.draw_scene(room / "turned.jpg", (128, 64), seed=4)
    with Image.open(room / "turned.jpg") as picture:
        exif = picture.getexif()
        exif[ORIENTATION] = 6
        picture.save(room / "turned.jpg", exif=exif)
    requests[4]["images"] = ["turned.jpg"]
    requests[8]["images"] = None
    requests[9] = {"id": 9, "messages": "What is it?"}
    picture = {"type": "image", "image": "pictures/1.png"}
    requests[7] = {"id": 7, "messages": [{"role": "user", "content": [picture, "A line\u2028separator?"]}]}
    (room / "questions.jsonl").write_text(
        "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)
    )
    return room


@pytest.fixture(scope="module")
def alone(room: Path) -> Callable[..., dict[str, Any]]:
    """A function that answers a chat by itself, by transformers' own calls."""
    model = bard_vl.BardVLForConditionalGeneration.from_pretrained(room / "bard", dtype=torch.float32)
    processor = bard_vl.BardVLProcessor.from_pretrained(room / "bard")

    def answer(messages: Any, **settings: Any) -> dict[str, Any]:
        inputs = processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, **settings, return_dict_in_generate=True)
        response = output.sequences[0, inputs["input_ids"].shape[1] :]
        is_end = response[-1].item() == processor.tokenizer.eos_token_id
        return {
            "text": processor.decode(response, skip_special_tokens=True),
            "finish_reason": "eos" if is_end else "length",
            "tokens": len(response),
            "forwards": sum(output.num_forwards.values()),
        }

    return answer


@pytest.fixture(scope="module")
def expected(room: Path, alone: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to the questions, each generated alone."""
    found = []
    for line in (room / "questions.jsonl").read_bytes().splitlines():
        body = json.loads(line)
        if body["id"] in WRONG:
            found.append({"id": body["id"], "error": WRONG[body["id"]]})
            continue
        pictures = [{"type": "image", "image": str(room / path)} for path in body.get("images", [])]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": body.get("prompt", "")}]}]
        if "messages" in body:
            picture, text = body["messages"][0]["content"]
            chat = [{"role": "user", "content": [{**picture, "image": str(room / picture["image"])}, text]}]
        found.append({"id": body["id"], **alone(chat, **DECODING)})
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster; its workers import the package once for all runs, as quickly as others may work."""
    os.environ.update(job.QUIET, RAY_worker_niceness="0")
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False}
    started = job.patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    yield started.address
    ray.shutdown()
    started.shutdown()


@pytest.fixture
def batch(room: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command in this process, on the cluster; its exit code, output and errors."""

    def run(source: Any, output: Path, *options: Any, printed: int = 0) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(command(room, source, output, "--ray-address", cluster, *options, printed=printed))
        return code, *capsys.readouterr()

    return run


def command(room: Path, source: Any, output: Path, *options: Any, printed: int = 0) -> list[str]:
    """A command of the manual, without the program's name."""
    _, *line = shlex.split(PRINTED[printed])
    line[1:3] = source, output
    line[line.index("Bard-VL-4B")] = room / "bard"
    return [*map(str, (*line, *SETTINGS, *options))]


def start(arguments: list[str], room: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    line = [sys.executable, "-m", "bard_vl_cli", *arguments]
    return subprocess.Popen(line, cwd=room, env=environment, start_new_session=True, **pipes)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def finished(folder: Path) -> list[dict[str, Any]]:
    """The whole answers in a folder of parts."""
    lines = [line for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line) for line in lines]


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [answer["id"] for answer in found] == [answer["id"] for answer in expected]
    for answer, one in zip(found, expected, strict=True):
        if "error" in one:
            assert one["error"] in answer["error"]
        else:
            assert answer == one


# Runs that are killed -------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_run_that_is_killed_goes_on_elsewhere(
    batch: Callable[..., tuple[int, str, str]], room: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """First on a Ray of its own, then on a cluster."""
    output, parts = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.parts"
    with pending(room / "turned.jpg"):
        process = start(command(room, "questions.jsonl", output), room)
        wait_for(process, lambda: len(finished(parts)) >= 3)
        own = psutil.Process(process.pid).children(recursive=True)
        assert "raylet" in [each.name() for each in own]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    earlier = len(finished(parts))
    assert 3 <= earlier < NUM_REQUESTS
    assert not output.exists()

    code, said, err = batch(room / "questions.jsonl", output)
    assert (code, said) == (
        3,
        f"{NUM_REQUESTS} answers in {output}, {earlier} from earlier runs, {len(WRONG)} errors\n",
    )
    left = NUM_REQUESTS - earlier
    assert re.search(rf"{left} of {left} answers, [\d.]+ tokens/s, \d errors, 00:00 left", err)
    check(lines_of(output), expected)
    assert not parts.exists()


@contextlib.contextmanager
def pending(picture: Path) -> Iterator[None]:
    """A reader of the picture waits for it, so that no run ends meanwhile."""
    aside = picture.rename(picture.with_name("aside"))
    os.mkfifo(picture)
    try:
        yield
    finally:
        aside.replace(picture)


def wait_for(process: subprocess.Popen[str], is_true: Callable[[], bool]) -> None:
    while not is_true():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.01)


# Answers on disk ------------------------------------------------------------------------------------------------------


def inventory(rows: list[int], ids: list[Any] | None = None) -> Inventory:
    """Of requests that are not there; ids are the numbers of the rows."""
    prints = [answers_module.fingerprint(value) for value in ids or rows]
    return Inventory([], np.array(rows, dtype=np.int64), np.array(prints, dtype=np.uint64), {}, "digest")


def record(row: int, **found: Any) -> bytes:
    return as_line({"row": row, "id": row, **found})


RUN = {"model": "bard", "max_new_tokens": 3}


def silent(message: str) -> None:
    pytest.fail(message)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers"])
def test_what_a_kill_can_leave_behind_is_gathered_once(tmp_path: Path, name: str) -> None:
    def open_answers() -> Answers:
        return Answers(str(tmp_path / name), inventory([1, 2, 3, 4]))

    answers = open_answers()
    assert answers.begin(RUN, silent).tolist() == []
    answers.append([record(2, text="two\u2028")])
    answers.append([record(line, text="more") for line in (4, 1)])
    (torn,) = map(Path, answers.parts())
    torn.write_bytes(torn.read_bytes() + '{"row": 3, "id": 3, "text": "fo\u20ac'.encode()[:-1])
    Path(answers.folder, "part-00000.jsonl.draft").write_bytes(b'{"row": 3')
    answers.close()

    for _ in range(2):  # the second begins with what the first has healed
        answers = open_answers()
        assert answers.begin(RUN, silent).tolist() == [1, 2, 4]
        assert [answer["row"] for answer in finished(Path(answers.folder))] == [2, 4, 1]
        assert torn.read_bytes().endswith(b"\n")
        answers.close()
    answers.begin(RUN, silent)
    with pytest.raises(ValueError, match=r"has lost the answers of rows \[3\]"):
        answers.finish()
    answers.append([record(3, error="no")])
    assert answers.finish() == (4, 1)
    if answers.is_single:
        assert [answer["id"] for answer in lines_of(tmp_path / name)] == [1, 2, 3, 4]
        assert lines_of(tmp_path / name)[1] == {"id": 2, "text": "two\u2028"}
        assert os.listdir(tmp_path) == [name]
    else:
        assert sorted(answer["row"] for answer in finished(tmp_path / name)) == [1, 2, 3, 4]
        answers.close()
    again = open_answers()
    with pytest.raises(ValueError, match="exists: a run that ended has written it; --retry-errors asks its errors"):
        again.begin(RUN, silent)
    assert again.begin(RUN, silent, retry_errors=True).tolist() == [1, 2, 4]
    assert not any("error" in answer for answer in finished(Path(again.folder)))
    again.append([record(3, text="three")])
    assert again.finish() == (4, 0)


def test_a_kill_at_any_moment_of_the_end_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the complete file and the last of the parts."""
    for moment in range(4):
        output = tmp_path / f"{moment}.jsonl"
        answers = Answers(str(output), inventory([1, 2]))
        answers.begin(RUN, silent)
        answers.append([record(1, text="one")])
        answers.append([record(2, text="two")])
        calls = iter(range(9))

        def counted(function: Any, calls: Iterator[int] = calls, moment: int = moment) -> Any:
            def call(*arguments: Any) -> Any:
                if next(calls) == moment:
                    raise KeyboardInterrupt
                return function(*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in ("write_whole", "delete"):
                patch.setattr(answers_module.files, name, counted(getattr(answers_module.files, name)))
            if moment < 3:
                with pytest.raises(KeyboardInterrupt):
                    answers.finish()
        answers.close()
        again = Answers(str(output), inventory([1, 2]))
        assert again.begin(RUN, silent, retry_errors=True).tolist() == [1, 2]
        assert again.finish() == (2, 0)
        assert lines_of(output) == [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]


def test_damaged_lines_of_a_run_are_named_and_asked_again(tmp_path: Path) -> None:
    answers = Answers(str(tmp_path / "answers.jsonl"), inventory([*range(1, 10)]))
    answers.begin(RUN, silent)
    answers.append([record(1, text="one")])
    (part,) = map(Path, answers.parts())
    with part.open("ab") as file:
        file.write(
            b"\0" * 512 + b"\n" + b'{"row": 1, "te\n[2]\n{"row": [3], "id": 3}\n' + b"[" * 99_999 + b"\n\xff\n\n"
        )
    answers.append([record(7, text="seven")])
    answers.close()
    said: list[str] = []
    assert answers.begin(RUN, said.append).tolist() == [1, 7]
    assert said == [f"{part}, line {line} is damaged: what it answered is asked again" for line in range(2, 9)]
    answers.close()
    for damage in (b"", b"\0" * 64, b'{"model": "ba'):
        Path(answers.begun).write_bytes(damage)
        with pytest.raises(ValueError, match=r"_run.json is damaged: .*; remove the folder$"):
            answers.begin(RUN, silent)
        answers.close()
    Path(answers.begun).unlink()
    (tmp_path / "answers.jsonl").write_bytes(b'{"id": 1, "text": "one"}\n' + b"\0" * 9 + b"\n")
    with pytest.raises(ValueError, match=r"answers.jsonl, line 2 is damaged: remove the file to ask everything again"):
        answers.begin(RUN, silent, retry_errors=True)


def test_runs_that_would_mix_are_refused(tmp_path: Path) -> None:
    first, second = (Answers(str(tmp_path / "answers.jsonl"), inventory([1])) for _ in range(2))
    first.begin(RUN, silent)
    with pytest.raises(ValueError, match="another run is writing"):
        second.begin(RUN, silent)
    first.close()
    with pytest.raises(ValueError, match="begun with other settings or requests"):
        second.begin({"model": "another"}, silent)
    second.close()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    with pytest.raises(ValueError, match="photos is a folder of something else"):
        Answers(str(tmp_path / "photos"), inventory([1])).begin(RUN, silent)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"an output that ends in \.jsonl is a file"):
        Answers(str(tmp_path / "folder.jsonl"), inventory([1])).begin(RUN, silent)


@pytest.mark.parametrize("ids", [[1, 2, 3], [1], [2, 1], [1, "2"]])
def test_a_complete_file_of_other_requests_is_no_run(tmp_path: Path, ids: list[Any]) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("".join(json.dumps({"id": id, "text": ""}) + "\n" for id in ids))
    with pytest.raises(ValueError, match="answers other requests"):
        Answers(str(output), inventory([1, 2])).begin(RUN, silent, retry_errors=True)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    answers = Answers(str(tmp_path / "answers.jsonl"), inventory([1, 2, 3]))
    answers.begin(RUN, silent)
    answers.append([record(1, text="a" * 300)])
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            answers.append([record(2, text="b" * 300)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    answers.close()
    assert answers.begin(RUN, silent).tolist() == [1]
    answers.append([record(row, text="c") for row in (2, 3)])
    assert answers.finish() == (3, 0)
    assert [len(answer["text"]) for answer in lines_of(tmp_path / "answers.jsonl")] == [300, 1, 1]


def test_parts_are_rolled_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "ROWS_PER_PART", 4)
    answers = Answers(str(tmp_path / "answers"), inventory([*range(1, 11)]))
    answers.begin(RUN, silent)
    for row in range(1, 11):
        answers.append([record(row, text="a")])
    answers.finish()
    assert [len(lines_of(Path(part))) for part in answers.parts()] == [4, 4, 2]


@pytest.mark.thorough
def test_addresses_of_objects(
    room: Path, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be appended to an object; local files stand in for those of a store."""
    monkeypatch.setattr(files, "REMOTE", (*files.REMOTE, "file"))
    check(answers_of(f"file://{room}/questions.jsonl", room, Asking()), expected)

    (tmp_path / "answers.jsonl.parts").mkdir()
    stock = inventory([1, 2, 3, 4])
    killed = Answers(f"file://{tmp_path}/answers.jsonl", stock)
    killed.begin(RUN, silent)
    killed.append([record(2, text="two")])
    assert killed.parts() == []
    monkeypatch.setattr(answers_module, "SECONDS_PER_OBJECT", 0)
    killed.append([record(3, error="no")])
    killed.append([record(1, text="one")])
    assert [finished(tmp_path / "answers.jsonl.parts")[place]["row"] for place in range(3)] == [2, 3, 1]
    assert len(killed.parts()) == 2
    answers = Answers(killed.output, stock)
    assert answers.begin(RUN, silent, retry_errors=True).tolist() == [1, 2]
    answers.append([record(row, text="more") for row in (3, 4)])
    assert answers.finish() == (4, 0)
    assert [answer["text"] for answer in lines_of(tmp_path / "answers.jsonl")] == ["one", "two", "more", "more"]
    assert os.listdir(tmp_path) == ["answers.jsonl"]


# Requests ------------------------------------------------------------------------------------------------------------


def test_other_requests_or_settings_are_another_run(tmp_path: Path) -> None:
    """An id may be the number of a line, which another question may have by now."""
    questions = tmp_path / "questions.jsonl"

    def digest(text: str, **asking: Any) -> str:
        questions.write_text(text)
        return take_stock(find_pieces(str(questions)), Asking(**asking)).digest

    found = digest('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert digest('{"prompt": "a"}\n{"prompt": "b"}\n') == found
    assert digest('{"prompt": "b"}\n') != found
    assert digest('{"prompt": "a"}\n{"prompt": "b"}\n', system="Be brief.") != found


FAULTY = [
    (b"no json", "line 1: no JSON object: Expecting value"),
    (b"[1]", "line 1: no JSON object, but [1]"),
    (b'"text"', "line 1: no JSON object, but 'text'"),
    (b"\0" * 40, "line 1: no JSON object"),
    (b'{"prompt": "a\xff"}', "line 1: no JSON object: 'utf-8' codec can't decode byte 0xff"),
    (b'{"prompt": "a"', "line 1: no JSON object: Expecting ',' delimiter"),
    (b"[" * 100_000, "line 1: no JSON object: maximum recursion depth"),
    (b'{"id": ' + b"9" * 5000 + b"}", "line 1: no JSON object: Exceeds the limit (4300 digits)"),
    (b'{"id": NaN, "prompt": "a"}', "line 1: no JSON object: NaN is no JSON"),
    (b'{"id": 1e999, "prompt": "a"}', "line 1: `id` must be a text or a number, got inf"),
    (b'{"id": null, "prompt": "a"}', "line 1: `id` must be a text or a number, got None"),
    (b'{"id": true, "prompt": "a"}', "line 1: `id` must be a text or a number, got True"),
    (b'{"id": [1], "prompt": "a"}', "line 1: `id` must be a text or a number, got [1]"),
    (b'{"id": "\\ud83d", "prompt": "a"}', "line 1: half a character (U+D800 to U+DFFF), which is no text"),
    (b'{"prompt": "a\\udc00"}', "line 1: half a character"),
    (b'{"prompt": "a", "images": ["\\ud83d.png"]}', "line 1: half a character"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}', "line 1: half a character"),
]


@pytest.mark.parametrize(("line", "fault"), FAULTY)
def test_a_line_that_cannot_be_read_is_a_fault_of_its_own(tmp_path: Path, line: bytes, fault: str) -> None:
    (tmp_path / "questions.jsonl").write_bytes(line + b'\r\n\n\xef\xbb\xbf{"prompt": "\xf0\x9f\x98\x80"}')
    pieces = find_pieces(str(tmp_path / "questions.jsonl"))
    assert take_stock(pieces, Asking()).rows.tolist() == [1, 3]
    broken, good = read_requests(pieces[0], Asking())
    assert broken.fault is not None
    assert broken.fault.startswith(fault)
    assert (good.row, good.id, good.body, good.fault) == (3, 3, {"prompt": "\N{GRINNING FACE}"}, None)
    stored = as_line(broken.answer(error=broken.fault))
    assert json.loads(stored) == {"row": 1, "id": broken.id, "error": broken.fault}


def test_an_id_that_comes_again_is_a_fault_of_the_later_row(tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text('{"id": 3, "prompt": "a"}\n{"id": "3", "prompt": "b"}\n{"prompt": "c"}\n')
    second.write_text('\n{"id": 3.0, "prompt": "d"}\n{"id": null}\n{"id": null}\n{"prompt": "e"}\n{"id": 8}')
    stock = take_stock(find_pieces(str(tmp_path)), Asking())
    assert stock.repeats == {3: 1, 5: 1, 9: 8}
    assert stock.rows.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    found = [
        request for piece in stock.pieces for request in open_requests(piece, Asking(), np.array([2]), stock.repeats)
    ]
    assert [request.row for request in found] == [1, 3, 5, 6, 7, 8, 9]
    assert [request.fault for request in found[:3]] == [
        None,
        "line 3: `id` 3 is that of line 1",
        "line 5: `id` 3.0 is that of line 1",
    ]


def test_lines_count_where_no_id_is_given(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n\n{"id": "b", "prompt": "b"}\n{"prompt": "c"}\n')
    (piece,) = find_pieces(str(tmp_path / "questions.jsonl"))
    assert [request.id for request in read_requests(piece, Asking())] == [1, "b", 4]


REFUSED = [
    ({}, "neither `prompt` nor `messages`"),
    ({"prompt": 5}, "`prompt` must be a text, got 5"),
    ({"prompt": None}, "`prompt` must be a text, got None"),
    ({"prompt": ["a"]}, "`prompt` must be a text, got ['a']"),
    ({"prompt": "a", "images": "photo.png"}, "`images` must be a list of paths, got 'photo.png'"),
    ({"prompt": "a", "images": [5]}, "`images` must be a list of paths, got [5]"),
    ({"prompt": "a", "images": ["\0.png"]}, "cannot be read as a picture"),
    ({"messages": []}, "`messages` must be a list of turns with something in it, got []"),
    ({"messages": None}, "`messages` must be a list of turns with something in it, got None"),
    ({"messages": {"role": "user", "content": "a"}}, "`messages` must be a list of turns"),
    (
        {"messages": ["a"]},
        "a turn of `messages` must have a `role` of system, developer, user, assistant, tool, got 'a'",
    ),
    ({"messages": [{"content": "a"}]}, "a turn of `messages` must have a `role`"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "a turn of `messages` must have a `role`"),
    ({"messages": [{"role": "user"}]}, "the `content` of a turn must be a text or a list of items"),
    ({"messages": [{"role": "user", "content": 5}]}, "the `content` of a turn must be a text or a list of items"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "ends with the assistant",
    ),
]


def test_what_is_no_question_is_an_error_and_the_others_are_answered(room: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"id": "first", "prompt": "What?"}).encode(), *(line for line, _ in FAULTY)]
    lines += [json.dumps({"id": f"request {number}", **body}).encode() for number, (body, _) in enumerate(REFUSED)]
    lines.append(b'{"id": "last", "prompt": "What?\\u0000"}')
    (tmp_path / "questions.jsonl").write_bytes(b"\n".join(lines))
    first, *wrong, last = answers_of(str(tmp_path / "questions.jsonl"), room, Asking())
    assert (first["id"], first["tokens"], last["id"], last["tokens"]) == ("first", 21, "last", 21)
    faults = [fault.removeprefix("line 1") for _, fault in FAULTY] + [fault for _, fault in REFUSED]
    for answer, fault in zip(wrong, faults, strict=True):
        assert fault in answer["error"]


def answers_of(source: str, room: Path, asking: Asking) -> list[dict[str, Any]]:
    """The answers of a worker to an input as it is read, all at once."""
    stock = take_stock(find_pieces(source), asking)
    done = np.array([], dtype=np.int64)
    requests = [one for piece in stock.pieces for one in open_requests(piece, asking, done, stock.repeats)]
    answers = Worker(Recipe(str(room / "bard"), DECODING, asking)).answer(requests)
    assert [answer.pop("row") for answer in answers] == stock.rows.tolist()
    return answers


# Inputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_folder_of_pictures_is_described(
    batch: Callable[..., tuple[int, str, str]], room: Path, alone: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Into a folder of parts."""
    output = tmp_path / "captions"
    code, said, _ = batch(room / "pictures", output, "--system", "Be brief.", printed=1)
    assert (code, said) == (0, f"3 answers in {output}, 0 from earlier runs, 0 errors\n")
    expected = []
    for row, name in enumerate(("0.png", "1.png", "2.png"), 1):
        picture = {"type": "image", "image": str(room / "pictures" / name)}
        question = {"role": "user", "content": [picture, {"type": "text", "text": "What is in the picture?"}]}
        chat = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, question]
        expected.append({"row": row, "id": name, **alone(chat, **DECODING)})
    assert sorted(finished(output), key=lambda answer: answer["row"]) == expected
    assert (output / "_SUCCESS").read_bytes() == b""


def test_tables_with_pictures_in_them(room: Path, alone: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Of parquet files, whose columns have other names and empty cells."""
    stored = [{"bytes": (room / "pictures" / f"{index}.png").read_bytes(), "path": None} for index in range(2)]
    rows = {"question": ["Which?", None, "Why?"], "picture": [stored[0], stored[1], None], "key": [7, 8, None]}
    pyarrow.parquet.write_table(pyarrow.table(rows).slice(0, 2), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table(rows).slice(2), tmp_path / "b.parquet")
    asking = Asking(columns={"prompt": "question", "image": "picture", "id": "key"})
    answers = answers_of(str(tmp_path), room, asking)
    assert [answer["id"] for answer in answers] == [7, 8, 3]
    assert answers[1]["error"] == "the request has neither `prompt` nor `messages`"
    for row, answer in ((0, answers[0]), (2, answers[2])):
        images = [{"type": "image", "image": str(room / "pictures" / f"{row}.png")}] if row == 0 else []
        chat = [{"role": "user", "content": [*images, {"type": "text", "text": rows["question"][row]}]}]
        assert answer == {"id": answer["id"], **alone(chat, **DECODING)}


def test_a_data_set_of_the_hub(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its cache has it; pieces are read by whoever has the same cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    lmms_tasks.write_data_sets(tmp_path, tiny.draw())
    asking = Asking(columns={"prompt": "question"})
    pieces = find_pieces("lmms-lab-encoder/RealWorldQA", split="test")
    stock = take_stock(pieces, asking)
    assert stock.rows.tolist() == [1, 2]
    (piece,) = stock.pieces
    answer = Worker(Recipe(str(room / "bard"), {"max_new_tokens": 4}, asking)).answer([*read_requests(piece, asking)])
    assert [found["tokens"] for found in answer] == [4, 4]
    assert answer[0]["text"] == answer[1]["text"]
    with pytest.raises(OSError, match="nobody/nothing is no file or folder, and cannot be had from the Hub"):
        find_pieces("nobody/nothing")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "has no JSONL file, parquet file or picture in it"),
        (["a.txt", "_b.jsonl", ".c.jsonl"], "has no JSONL file, parquet file or picture in it"),
        (["a.jsonl", "b.parquet"], "has JSONL and parquet in it"),
    ],
)
def test_a_folder_must_have_one_kind_of_file(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(bard_vl.UsageError, match=said):
        find_pieces(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("missing.jsonl out.jsonl", 1, "missing.jsonl: no such file or folder"),
        ("turned.jpg out.jsonl", 2, "turned.jpg is no .jsonl"),
        ("questions.jsonl out.jsonl --column prompt", 2, "--column takes NAME=COLUMN"),
        ("questions.jsonl out.jsonl --column text=question", 2, "--column takes NAME=COLUMN"),
        ("questions.jsonl out.jsonl --threshold 2", 2, "`confidence_threshold` must be"),
        ("questions.jsonl out.jsonl --batch-size 0", 2, "--batch-size"),
        ("questions.jsonl pictures", 1, "pictures is a folder of something else"),
        ("questions.jsonl out.jsonl --workers 2 --engine other", 2, "--engine"),
        ("questions.jsonl out.jsonl --choices a|b --engine vllm", 2, "of a given form are not for --engine vllm"),
        ("questions.jsonl out.jsonl --vllm max_model_len --engine vllm", 2, "--vllm takes NAME=VALUE"),
        ("questions.jsonl out.jsonl --vllm max_model_len=9", 2, "--vllm goes with --engine vllm"),
        ("questions.jsonl out.jsonl --quantize int8 --engine vllm", 2, "--quantize is not for --engine vllm"),
    ],
)
def test_mistakes_end_it_before_anything_is_asked(
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(room)
    monkeypatch.setattr(job, "start_ray", lambda _: pytest.fail("Ray was started"))
    assert main(["batch", *line.split(), "--model", "bard"]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (room / "out.jsonl").exists()


def test_every_setting_of_run_reaches_the_workers(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(command: Any) -> set[str]:
        return set(inspect.signature(command).parameters)

    aside = {"files", "each", "num_samples", "as_json", "dry_run", "memory", "html", "gif", "png", "draw", "compare"}
    assert options(run_command) - aside <= options(batch_command)
    given: list[Any] = []
    monkeypatch.setattr(job, "run_batch", lambda *arguments: given.extend(arguments) or 0)
    line = "--threshold 0.5 --steps 2 --max-new-tokens 9 --temperature 0.7 --seed 3 --set top_k=4 --block-size 4"
    line += " --dtype float32 --device cpu --quantize int8 --max-pixels 9000 --min-pixels 3000"
    line += " --workers 2 --ray-address auto --batch-size 5"
    line += " --choices red|blue"
    assert main(["batch", str(room / "pictures"), str(tmp_path), "--model", str(room / "bard"), *line.split()]) == 0
    _, output, recipe, plan, *_ = given
    assert output == str(tmp_path)
    settings = {"confidence_threshold": 0.5, "denoising_steps": 2, "max_new_tokens": 9, "temperature": 0.7}
    assert recipe.settings == {**settings, "top_k": 4, "block_size": 4}
    where = {"dtype": "float32", "device": "cpu", "max_pixels": 9000, "min_pixels": 3000, "revision": None}
    where |= {"quantize": "int8", "device_map": None}
    assert (recipe.seed, recipe.gpus, recipe.where) == (3, 0, where)
    assert recipe.asking.prompt == "Describe the picture."
    assert recipe.structured == {"choices": ["red", "blue"]}
    assert plan == job.Plan(batch_size=5, num_workers=2, address="auto")
    given.clear()
    line = "--engine vllm --vllm max_model_len=512 --vllm kv_cache_dtype=fp8"
    assert main(["batch", str(room / "pictures"), str(tmp_path), "--model", str(room / "bard"), *line.split()]) == 0
    assert (given[2].engine, given[2].vllm) == ("vllm", {"max_model_len": 512, "kv_cache_dtype": "fp8"})
    assert given[3].batch_size == 256


# Workers -------------------------------------------------------------------------------------------------------------


def test_a_full_memory_is_the_error_of_who_fills_it(
    room: Path, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Worker.generate

    def full(worker: Worker, chats: list[Any], rows: list[int]) -> Any:
        if len(rows) > 1 or rows == [11]:
            raise torch.OutOfMemoryError("out of memory")
        return generate(worker, chats, rows)

    monkeypatch.setattr(Worker, "generate", full)
    (piece,) = find_pieces(str(room / "questions.jsonl"))
    requests = [*read_requests(piece, Asking())][8:12]
    answers = Worker(Recipe(str(room / "bard"), DECODING, Asking())).answer(requests)
    assert answers[2] == {"row": 11, "id": "question 10", "error": "out of memory"}
    check([{name: part for name, part in answer.items() if name != "row"} for answer in answers[::3]], expected[8:12:3])


@pytest.mark.parametrize("fault", [getattr(torch, "AcceleratorError", RuntimeError), RuntimeError])
def test_a_dead_device_is_nobodys_error(room: Path, monkeypatch: pytest.MonkeyPatch, fault: type) -> None:
    def die(*_: Any) -> Any:
        raise fault("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Worker, "generate", die)
    (piece,) = find_pieces(str(room / "questions.jsonl"))
    with pytest.raises(fault, match="an illegal memory access"):
        Worker(Recipe(str(room / "bard"), {}, Asking())).answer([*read_requests(piece, Asking())][:2])


class Death(BaseException):
    """What ends a worker at once."""


def test_only_the_row_that_kills_is_blamed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was answered alone, and whose block was lost with another row's death, is asked again."""
    numbers: collections.Counter[str] = collections.Counter()

    def count(name: str, change: int) -> int:
        numbers[name] += change
        return numbers[name]

    def read(worker: Worker, request: Any) -> Any:
        if request.row == 3:
            raise Death
        return "not asked"

    monkeypatch.setattr(Worker, "read", read)
    (piece,) = find_pieces(str(room / "questions.jsonl"))
    requests = [*read_requests(piece, Asking())][:4]
    block = {"request": [pickle.dumps(request) for request in requests]}
    for _ in range(2 * Worker.attempts):  # those of the block, then those of the row
        with pytest.raises(Death):
            Worker(Recipe(None, {}, Asking()), count)(block)
    answered = Worker(Recipe(None, {}, Asking()), count)(block)
    errors = [json.loads(line)["error"] for line in answered["line"]]
    assert errors == ["not asked", "not asked", "the worker died over it, attempts: 3", "not asked"]


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_row_is_begun_alone_when_nothing_else_is_read(
    room: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """So that a picture that kills the process is not another row's fault; otherwise no block waits for a picture."""
    is_reading, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def read(worker: Worker, request: Any) -> str:
        if request.row == 1:
            is_reading.set()
            assert may_end.wait(60)
        order.append(f"read {request.row}")
        return "not asked"

    def count(name: str, change: int) -> int:
        order.append(f"{name}, {change}")
        return 1

    monkeypatch.setattr(Worker, "read", read)
    (piece,) = find_pieces(str(room / "questions.jsonl"))
    first, second = [*read_requests(piece, Asking())][:2]
    worker = Worker(Recipe(None, {}, Asking()), count)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        slow = threads.submit(worker.answer, [first])
        assert is_reading.wait(60)
        if is_alone:
            other = threads.submit(worker.answer_alone, second)
            with pytest.raises(concurrent.futures.TimeoutError):
                other.result(0.2)
        else:
            assert "error" in threads.submit(worker.answer, [second]).result(60)[0]
        may_end.set()
        assert "error" in slow.result(60)[0]
    assert order == (["read 1", "row 2, 1", "read 2", "row 2, -1"] if is_alone else ["read 2", "read 1"])


class KilledWorker(Worker):
    """It is killed whenever it decodes the eleventh row."""

    attempts = 1

    def generate(self, chats: list[Any], rows: list[int]) -> Any:
        if 11 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(chats, rows)


class DyingWorker(Worker):
    """Its device fails at the seventh row."""

    def generate(self, chats: list[Any], rows: list[int]) -> Any:
        if max(rows) >= 7:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().generate(chats, rows)


@pytest.mark.process
def test_workers_that_die(
    batch: Callable[..., tuple[int, str, str]],
    room: Path,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead device ends the run, and another goes on; of a killed worker only the row to blame gets an error."""
    from ray import cloudpickle

    output = tmp_path / "answers.jsonl"
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with monkeypatch.context() as patch:
        patch.setitem(job.ENGINES, "generate", DyingWorker)
        code, said, err = batch(room / "questions.jsonl", output, "--quiet")
        assert (code, said) == (1, "")
        assert err == "error: a worker failed: CUDA error: an illegal memory access was encountered\n"
        kept = finished(tmp_path / "answers.jsonl.parts")
        assert {answer["row"] for answer in kept} <= {*range(1, 7)}
        assert not any("CUDA" in answer.get("error", "") for answer in kept)
        patch.setitem(job.ENGINES, "generate", KilledWorker)
        code, said, err = batch(room / "questions.jsonl", output, "--quiet")
        assert (code, err) == (3, "")
        total = f"{NUM_REQUESTS} answers in {output}, {len(kept)} from earlier runs, {len(WRONG) + 1} errors"
        assert said.splitlines()[-1] == total, "behind what Ray says of workers that died"
        blamed = {"id": "question 10", "error": "the worker died over it, attempts: 1"}
        check(lines_of(output), [*expected[:10], blamed, *expected[11:]])
    code, said, _ = batch(room / "questions.jsonl", output, "--retry-errors")
    earlier = NUM_REQUESTS - len(WRONG) - 1
    total = f"{NUM_REQUESTS} answers in {output}, {earlier} from earlier runs, {len(WRONG)} errors"
    assert (code, said.splitlines()[-1]) == (3, total)
    check(lines_of(output), expected)


@pytest.mark.thorough
def test_a_seed_repeats_sampled_answers(room: Path) -> None:
    (piece,) = find_pieces(str(room / "questions.jsonl"))
    requests = [*read_requests(piece, Asking())][:3]
    sampled = {"max_new_tokens": 21, "temperature": 1.0}

    def texts(seed: int) -> list[str]:
        recipe = Recipe(str(room / "bard"), sampled, Asking(), seed=seed)
        return [answer["text"] for answer in Worker(recipe).answer(requests)]

    assert texts(1) == texts(1) != texts(2)
