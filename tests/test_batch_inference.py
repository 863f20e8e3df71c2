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

SCRIPT = fresh.ROOT / "examples" / "batch_inference.py"
MANUAL = (fresh.ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PRINTED = (
    "accelerate launch examples/batch_inference.py --model Bard-VL-4B --input questions.jsonl --output answers.jsonl"
)
NUM_REQUESTS = 24
ORIENTATION = 0x0112  # of EXIF; 6 is what a telephone held upright writes
WRONG = {"question 5": "missing.png", "question 8": "NoneType", 9: ""}  # and what their errors say


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
        if request["id"] in WRONG:
            answers.append({"id": request["id"], "error": WRONG[request["id"]]})
            continue
        pictures = [{"type": "image", "image": str(room / path)} for path in request.get("images", [])]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": request.get("prompt", "")}]}]
        inputs = processor.apply_chat_template(
            request.get("messages", chat),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=21, confidence_threshold=0.02, return_dict_in_generate=True)
        response = output.sequences[0, inputs["input_ids"].shape[1] :]
        text, speed = processor.decode(response, skip_special_tokens=True), output.tokens_per_forward.item()
        answers.append(
            {"id": request["id"], "text": text, "tokens": len(response), "tokens_per_forward": round(speed, 3)}
        )
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
    said = start(command(room, output, processes=2), room).communicate()[0]
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
    progress.begin(run)
    progress.append(0, [{"id": 1, "text": "one\u2028"}])
    progress.append(3, [{"id": 2, "text": "two"}, {"id": 3, "text": "three"}])
    torn = progress.parts / "process-3.jsonl"
    torn.write_bytes(torn.read_bytes() + '{"id": 4, "text": "fo\u20ac'.encode()[:-1])
    progress.lock.close()

    for _ in range(2):  # the second begins where a kill left both the gathered answers and a process's file
        kept = (progress.parts / "process-0.jsonl").read_bytes()
        progress = batch.Progress(tmp_path / "answers.jsonl")
        progress.begin(run)
        assert list(progress.answers()) == [1, 2, 3]
        assert [path.name for path in sorted(progress.parts.glob("*.jsonl"))] == ["done.jsonl"]
        progress.lock.close()
        (progress.parts / "process-0.jsonl").write_bytes(kept)

    progress.begin(run)
    progress.append(1, [{"id": 4, "text": "four"}])
    progress.finish([2, 4, 1, 3])
    assert [answer["id"] for answer in batch.whole_lines(progress.output)] == [2, 4, 1, 3]
    assert next(iter(batch.whole_lines(progress.output)))["text"] == "two"


def test_runs_that_would_mix_are_refused(batch: ModuleType, tmp_path: Path) -> None:
    first, second = (batch.Progress(tmp_path / "answers.jsonl") for _ in range(2))
    first.begin({"model": "bard"})
    with pytest.raises(ValueError, match="another run is writing"):
        second.begin({"model": "bard"})
    first.lock.close()
    with pytest.raises(ValueError, match="begun with other settings or requests"):
        second.begin({"model": "another"})


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
    assert list(kept) == [answer["id"] for answer in expected[:4]]
    assert not any("error" in answer for answer in kept.values())
    monkeypatch.setattr(batch.Answerer, "generate", generate)
    batch.main()
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
        if "question 10" in [request["id"] for request in requests]:
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
    assert {request["id"] for request in asked} == set(WRONG), "question 10 was answered before"
    assert f"{NUM_REQUESTS - len(WRONG)} from earlier runs, {len(WRONG)} errors" in capsys.readouterr().out
    check(output, expected, batch)

    output.write_text('{"id": 1, "text": "of other questions"}\n')
    with pytest.raises(ValueError, match="answers other requests"):
        batch.main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\nno json\n', "line 2: no JSON object"),
        ("[1]\n", "line 1: no JSON object"),
        ('{"id": [1], "prompt": "a"}\n', "line 1: `id` must be a text or a number"),
        ('{"id": 2, "prompt": "a"}\n\n{"id": 2, "prompt": "b"}\n', "`id` 2 occurs twice"),
    ],
)
def test_wrong_inputs_are_refused_by_line(batch: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        batch.read_requests(tmp_path / "questions.jsonl")


def test_lines_count_where_no_id_is_given(batch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n\n{"id": "b", "prompt": "b"}\n{"prompt": "c"}\n')
    assert [request["id"] for request in batch.read_requests(tmp_path / "questions.jsonl")] == [1, "b", 4]
