"""Batch inference: every request is answered once, as `generate` answers it, whatever kills the run, however often."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import bard_vl
import fresh
import pytest
import tiny
import torch
from PIL import Image

pytestmark = pytest.mark.process

SCRIPT = fresh.ROOT / "examples" / "batch_inference.py"
MANUAL = (fresh.ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PRINTED = (
    "accelerate launch examples/batch_inference.py --model Bard-VL-4B --input questions.jsonl --output answers.jsonl"
)
NUM_REQUESTS = 24
ORIENTATION = 0x0112  # of EXIF; 6 is what a telephone held upright writes
WRONG = {
    "question 5": "missing.png",
    "question 8": "`images` must be a list of paths, got None",
    9: "list of turns",
}  # and what their errors say


@pytest.fixture(scope="module")
def batch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_inference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    tiny.draw_scene(room / "pictures" / "turned.jpg", (128, 64), seed=4)
    with Image.open(room / "pictures" / "turned.jpg") as picture:
        exif = picture.getexif()
        exif[ORIENTATION] = 6
        picture.save(room / "pictures" / "turned.jpg", exif=exif)
    requests[4]["images"] = ["pictures/turned.jpg"]
    requests[8]["images"] = None
    requests[9] = {"id": 9, "messages": "What is it?"}
    requests[7] = {"id": 7, "messages": [{"role": "user", "content": "A line\u2028separator?"}]}
    (room / "questions.jsonl").write_text(
        "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)
    )
    return room


@pytest.fixture(scope="module")
def expected(room: Path, batch: ModuleType) -> list[dict[str, Any]]:
    """The answers, each generated alone."""
    model = bard_vl.BardVLForConditionalGeneration.from_pretrained(room / "bard", dtype=torch.float32)
    processor = bard_vl.BardVLProcessor.from_pretrained(room / "bard")
    answers = []
    for request in batch.read_requests(room / "questions.jsonl"):
        if request.id in WRONG:
            answers.append({"id": request.id, "error": WRONG[request.id]})
            continue
        pictures = [{"type": "image", "image": str(room / path)} for path in request.body.get("images", [])]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": request.body.get("prompt", "")}]}]
        inputs = processor.apply_chat_template(
            request.body.get("messages", chat),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=21, confidence_threshold=0.02, return_dict_in_generate=True)
        response = output.sequences[0, inputs["input_ids"].shape[1] :]
        text, speed = processor.decode(response, skip_special_tokens=True), output.tokens_per_forward.item()
        answers.append({"id": request.id, "text": text, "tokens": len(response), "tokens_per_forward": round(speed, 3)})
    return answers


def command(room: Path, output: Path, processes: int = 1) -> list[str]:
    """The manual's command, for one process without its launcher."""
    assert f"\n{PRINTED}\n" in MANUAL
    launch = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes {processes}"
    line = PRINTED.replace("accelerate launch", launch if processes > 1 else sys.executable)
    settings = "--batch-size 2 --max-new-tokens 21 --threshold 0.02"
    files = {"examples/batch_inference.py": SCRIPT, "Bard-VL-4B": room / "bard", "answers.jsonl": output}
    for printed, here in files.items():
        line = line.replace(printed, str(here))
    return shlex.split(f"{line} {settings}")


def start(arguments: list[str], room: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=room, env=environment, start_new_session=True, **pipes)


def check(output: Path, expected: list[dict[str, Any]], batch: ModuleType) -> None:
    answers = list(batch.whole_lines(output))
    assert [answer["id"] for answer in answers] == [answer["id"] for answer in expected]
    for answer, alone in zip(answers, expected, strict=True):
        if "error" in alone:
            assert alone["error"] in answer["error"]
        else:
            assert answer == alone
    assert not output.with_name(f"{output.name}.parts").exists()


def test_killed_twice_and_finished_by_two_processes(
    room: Path, expected: list[dict[str, Any]], batch: ModuleType, tmp_path: Path
) -> None:
    output, finished = tmp_path / "answers.jsonl", 0
    for _ in range(2):
        process = start(command(room, output), room)
        while finished_answers(output, batch) < finished + 3:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        finished = finished_answers(output, batch)
        assert finished < NUM_REQUESTS
        assert not output.exists()
    process = start(command(room, output, processes=2), room)
    said = process.communicate()[0]
    assert process.returncode == 1, "accelerate's launcher has no other for what did not end in 0"
    assert f"{NUM_REQUESTS} answers in {output}, {finished} from earlier runs, {len(WRONG)} errors" in said
    check(output, expected, batch)
    again = start(command(room, output), room).communicate()[0]
    assert (
        again.splitlines()[-1]
        == f"error: {output} exists: a run that ended has written it; --retry-errors asks its errors again"
    )


def finished_answers(output: Path, batch: ModuleType) -> int:
    progress = batch.Progress(output)
    return len(progress.answers()) if progress.parts.exists() else 0


def test_what_a_kill_can_leave_behind_is_gathered_once(batch: ModuleType, tmp_path: Path) -> None:
    progress = batch.Progress(tmp_path / "answers.jsonl")
    run = {"model": "bard", "max_new_tokens": 3}
    requests = [batch.Request(line, f"number {line}") for line in (2, 4, 1, 3)]
    progress.begin(run, requests)
    progress.append(0, [{"line": 1, "id": "number 1", "text": "one\u2028"}])
    progress.append(3, [{"line": line, "id": f"number {line}", "text": "more"} for line in (2, 3)])
    torn = progress.parts / "process-3.jsonl"
    torn.write_bytes(torn.read_bytes() + '{"line": 4, "id": 4, "text": "fo\u20ac'.encode()[:-1])
    progress.lock.close()

    for _ in range(2):  # the second begins where a kill left both the gathered answers and a process's file
        kept = (progress.parts / "process-0.jsonl").read_bytes()
        progress = batch.Progress(tmp_path / "answers.jsonl")
        assert progress.begin(run, requests) == 3
        assert list(progress.answers()) == [1, 2, 3]
        assert [path.name for path in sorted(progress.parts.glob("*.jsonl"))] == ["done.jsonl"]
        progress.lock.close()
        (progress.parts / "process-0.jsonl").write_bytes(kept)

    progress.begin(run, requests)
    with pytest.raises(ValueError, match=r"has lost the answers of lines \[4\]"):
        progress.finish(requests)
    progress.append(1, [{"line": 4, "id": "number 4", "text": "four"}])
    progress.finish(requests)
    answers = list(batch.whole_lines(progress.output))
    assert [answer["id"] for answer in answers] == ["number 2", "number 4", "number 1", "number 3"]
    assert answers[1] == {"id": "number 4", "text": "four"}


def test_damaged_lines_of_a_run_are_named_and_asked_again(
    batch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, requests = batch.Progress(tmp_path / "answers.jsonl"), [batch.Request(line, line) for line in range(9)]
    progress.begin({"model": "bard"}, requests)
    progress.append(0, [{"line": 0, "id": 0, "text": "zero"}])
    progress.append(2, [{"line": 8, "id": 8, "text": "eight"}])
    with (progress.parts / "process-0.jsonl").open("ab") as file:
        file.write(
            b"\0" * 512 + b"\n" + b'{"line": 1, "te\n[2]\n{"line": [3], "id": 3}\n' + b"[" * 99_999 + b"\n\xff\n\n"
        )
    progress.append(0, [{"line": 7, "id": 7, "text": "seven"}])
    progress.lock.close()
    assert progress.begin({"model": "bard"}, requests) == 3
    said = capsys.readouterr().err.splitlines()
    part = progress.parts / "process-0.jsonl"
    assert said == [f"{part}, line {line} is damaged: what it answered is asked again" for line in range(2, 9)]
    assert list(progress.answers()) == [0, 7, 8]
    progress.lock.close()
    for damage in (b"", b"\0" * 64, b'{"model": "ba'):
        (progress.parts / "run.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"run.json is damaged: .*; remove .*answers.jsonl.parts$"):
            progress.begin({"model": "bard"}, requests)
        progress.lock.close()
    progress.output.write_bytes(b'{"id": 0, "text": "zero"}\n' + b"\0" * 9 + b"\n")
    with pytest.raises(ValueError, match=r"answers.jsonl, line 2 is damaged: remove the file to ask everything again"):
        batch.read_output(progress.output, requests[:2])


def test_a_full_disk_is_one_line_and_loses_nothing(batch: ModuleType, room: Path, tmp_path: Path) -> None:
    line = [*command(room, tmp_path / "answers.jsonl"), "--max-new-tokens", "4"]
    limit = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); {IGNORE}"
    script = f"{limit}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = start([sys.executable, "-c", script, *line[1:]], room)
    *_, last = process.communicate()[0].splitlines()
    assert (process.returncode, last) == (1, "error: [Errno 27] File too large")
    assert not (tmp_path / "answers.jsonl").exists()
    process = start(line, room)
    said = process.communicate()[0]
    assert (process.returncode, f"{NUM_REQUESTS} answers in" in said) == (3, True)
    assert ", 0 from earlier runs" not in said


IGNORE = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"


def test_runs_that_would_mix_are_refused(batch: ModuleType, tmp_path: Path) -> None:
    first, second = (batch.Progress(tmp_path / "answers.jsonl") for _ in range(2))
    first.begin({"model": "bard"}, [])
    with pytest.raises(ValueError, match="another run is writing"):
        second.begin({"model": "bard"}, [])
    first.lock.close()
    with pytest.raises(ValueError, match="begun with other settings or requests"):
        second.begin({"model": "another"}, [])


def test_other_requests_are_another_run(batch: ModuleType, room: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An id may be the number of a line, which another question may have by now."""
    questions = tmp_path / "questions.jsonl"
    line = [
        str(SCRIPT),
        "--model",
        str(room / "bard"),
        "--input",
        str(questions),
        "--output",
        str(tmp_path / "a.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", [*line, "--max-new-tokens", "4"])
    monkeypatch.setattr(batch.Progress, "finish", lambda *_: pytest.fail("the machine went down"))
    questions.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(pytest.fail.Exception):
        batch.main()
    questions.write_text('{"prompt": "b"}\n')
    with pytest.raises(ValueError, match="begun with other settings or requests"):
        batch.main()


DEAD = "CUDA error: an illegal memory access was encountered"
FAULTS = [getattr(torch, "AcceleratorError", RuntimeError), RuntimeError]  # older torch knows the second alone


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dead_device_ends_the_run_and_another_goes_on(
    batch: ModuleType, room: Path, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type
) -> None:
    output, generate = tmp_path / "answers.jsonl", batch.Answerer.generate
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "argv", command(room, output)[1:])

    def die(answerer: Any, requests: list[dict[str, Any]]) -> Any:
        if finished_answers(output, batch) >= 4:
            raise fault(DEAD)
        return generate(answerer, requests)

    monkeypatch.setattr(batch.Answerer, "generate", die)
    with pytest.raises(fault, match="an illegal memory access"):
        batch.main()
    kept = batch.Progress(output).answers()
    assert [answer["id"] for answer in kept.values()] == [answer["id"] for answer in expected[:4]]
    assert not any("error" in answer for answer in kept.values())
    monkeypatch.setattr(batch.Answerer, "generate", generate)
    assert batch.main() == 3
    check(output, expected, batch)


def test_errors_are_asked_again_on_request(
    batch: ModuleType,
    room: Path,
    expected: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, generate = tmp_path / "answers.jsonl", batch.Answerer.generate
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "argv", command(room, output)[1:])

    def full(answerer: Any, requests: list[dict[str, Any]]) -> Any:
        if "question 10" in [request.id for request in requests]:
            raise torch.OutOfMemoryError("out of memory")
        return generate(answerer, requests)

    monkeypatch.setattr(batch.Answerer, "generate", full)
    batch.main()
    monkeypatch.setattr(batch.Answerer, "generate", generate)
    with pytest.raises(ValueError, match="--retry-errors asks its errors again"):
        batch.main()
    assert f"{len(WRONG) + 1} errors" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--retry-errors"])
    with monkeypatch.context() as patch:
        patch.setattr(batch.Progress, "finish", lambda *_: pytest.fail("the machine went down"))
        with pytest.raises(pytest.fail.Exception):
            batch.main()
    asked: list[Any] = []
    monkeypatch.setattr(batch.Answerer, "generate", lambda *given: asked.extend(given[1]) or generate(*given))
    batch.main()
    assert {request.id for request in asked} == set(WRONG), "question 10 was answered before"
    assert f"{NUM_REQUESTS - len(WRONG)} from earlier runs, {len(WRONG)} errors" in capsys.readouterr().out
    check(output, expected, batch)

    output.write_text('{"id": 1, "text": "of other questions"}\n')
    with pytest.raises(ValueError, match="answers other requests"):
        batch.main()


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
def test_a_line_that_cannot_be_read_is_a_fault_of_its_own(
    batch: ModuleType, tmp_path: Path, line: bytes, fault: str
) -> None:
    (tmp_path / "questions.jsonl").write_bytes(line + b'\r\n\n\xef\xbb\xbf{"prompt": "\xf0\x9f\x98\x80"}')
    broken, good = batch.read_requests(tmp_path / "questions.jsonl")
    assert broken.fault.startswith(fault)
    assert (good.line, good.id, good.body, good.fault) == (3, 3, {"prompt": "\N{GRINNING FACE}"}, None)
    output = tmp_path / "answers.jsonl"
    batch.write_lines(output, [broken.answer(error=broken.fault)])
    assert list(batch.whole_lines(output)) == [{"line": 1, "id": broken.id, "error": broken.fault}]


def test_an_id_that_comes_again_is_a_fault_of_the_later_line(batch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"id": 3, "prompt": "a"}\n{"id": "3", "prompt": "b"}\n{"prompt": "c"}\n')
    requests = batch.read_requests(tmp_path / "questions.jsonl")
    assert [request.fault for request in requests] == [None, None, "line 3: `id` 3 is that of line 1"]


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


def test_what_is_no_question_is_an_error_and_the_others_are_answered(
    batch: ModuleType, room: Path, tmp_path: Path
) -> None:
    """By the command, in one run and in the resume of it; the exit code says that some failed."""
    lines = [json.dumps({"id": "first", "prompt": "What?"}).encode(), *(line for line, _ in FAULTY)]
    lines += [json.dumps({"id": f"request {number}", **body}).encode() for number, (body, _) in enumerate(REFUSED)]
    lines.append(b'{"id": "last", "prompt": "What?\\u0000"}')
    (tmp_path / "questions.jsonl").write_bytes(b"\n".join(lines))
    output = tmp_path / "answers.jsonl"
    line = [*command(room, output), "--max-new-tokens", "4"]
    line[line.index("questions.jsonl")] = str(tmp_path / "questions.jsonl")
    for again in ([], ["--retry-errors"]):
        process = start([*line, *again], room)
        said = process.communicate()[0]
        assert process.returncode == 3, said
        assert f"{len(lines)} answers in {output}, {2 * len(again)} from earlier runs, {len(lines) - 2} errors" in said
        first, *wrong, last = batch.whole_lines(output)
        assert (first["id"], first["tokens"], last["id"], last["tokens"]) == ("first", 4, "last", 4)
        faults = [fault.removeprefix("line 1") for _, fault in FAULTY] + [fault for _, fault in REFUSED]
        for answer, fault in zip(wrong, faults, strict=True):
            assert fault in answer["error"]


def test_lines_count_where_no_id_is_given(batch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n\n{"id": "b", "prompt": "b"}\n{"prompt": "c"}\n')
    assert [request.id for request in batch.read_requests(tmp_path / "questions.jsonl")] == [1, "b", 4]
