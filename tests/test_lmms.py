"""lmms-eval itself runs tasks of generated pictures: batches answer as `generate` does alone, costs are reported."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bard_vl
import filelock
import fresh
import lmms_eval
import lmms_tasks as tasks
import pytest
import tiny
import torch
import yaml
from bard_vl.evaluation.scenes import conversations
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from qwen_vl_utils import process_vision_info
from test_readme import make_published

pytestmark = pytest.mark.process

EMBEDDED = fresh.ROOT / "examples" / "checkpoint"
SMALL = "min_pixels=4096,max_pixels=4096"  # as its processor has them
SCENES_SEED = 3  # neither the study's nor the score's
SETTINGS = {"max_new_tokens": 13, "confidence_threshold": 0.02}
ARGUMENTS = "dtype=float32,min_pixels=4096,max_pixels=65536,max_num_frames=4,confidence_threshold=0.02"
QUESTIONS = (
    "What is it?",
    "How many green triangles are there in the picture?",
    "Which colour?",
    "Why?",
    "Read the word.",
)


@pytest.fixture(scope="module", autouse=True)
def locks_that_exclude() -> Iterator[None]:
    """lmms-eval gives a process one lock per path, for good: tests that ask for it twice need it as it was."""
    kind = type(filelock.FileLock)
    call = kind.__call__
    yield
    kind.__call__ = call


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a converted checkpoint and pictures, whose sides are whole patches: nobody resizes them."""
    room = tmp_path_factory.mktemp("room")
    fresh.convert(tiny.write_qwen3vl(room / "qwen"), room / "bard", "--block-size", 4, "--mask-token-id", 447)
    for index, size in enumerate([(128, 96), (96, 64), (64, 160), (128, 96), (128, 96)]):
        tiny.draw_scene(room / f"{index}.png", size, seed=index)
    return room


@pytest.fixture(scope="module")
def parts(room: Path) -> tuple[Any, Any]:
    model = bard_vl.BardVLForConditionalGeneration.from_pretrained(room / "bard", dtype=torch.float32)
    return model, bard_vl.BardVLProcessor.from_pretrained(room / "bard")


def rows(room: Path, parts: tuple[Any, Any], kind: str = "image", **settings: Any) -> list[dict[str, Any]]:
    """Questions about 0 to 2 pictures, or a clip, each with the answer that `generate` gives it alone."""
    made = []
    for index, text in enumerate(QUESTIONS):
        paths = [str(room / f"{number}.png") for number in ((0, 3, 4) if kind == "video" else range(index % 3))]
        visuals = [Image.open(path) for path in paths]
        content = (
            [{"type": "video", "video": visuals}]
            if kind == "video"
            else [{"type": "image", "image": v} for v in visuals]
        )
        inputs = prompt([*content, {"type": "text", "text": text}], parts[1])
        output = parts[0].generate(**inputs, **{**SETTINGS, **settings}, return_dict_in_generate=True)
        response = output.sequences[0, inputs["input_ids"].shape[1] :]
        tokens, speed = len(response), output.tokens_per_forward.item()
        answer = parts[1].decode(response, skip_special_tokens=True).strip()
        made.append(
            {"question": text, "pictures": paths, "answer": answer, "tokens": tokens, "forwards": tokens / speed}
        )
    return made


def prompt(content: list[dict[str, Any]], processor: Any) -> Any:
    """Inputs the model card's way, which makes the time stamps of a clip."""
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages, image_patch_size=16, return_video_metadata=True)
    return processor(text=[text], images=images, videos=videos, do_resize=False, return_tensors="pt")


def evaluate(checkpoint: Path, folder: Path, *names: str, arguments: str = ARGUMENTS, **options: Any) -> dict[str, Any]:
    manager = TaskManager("ERROR", include_path=str(folder), model_name="bard_vl")
    options = {"batch_size": 3, "device": "cpu", "bootstrap_iters": 0, **options}
    arguments = f"pretrained={checkpoint},{arguments}"
    return simple_evaluate("bard_vl", arguments, tasks=list(names), task_manager=manager, **options)


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_batches_answer_as_generate_does_alone(
    room: Path, parts: tuple[Any, Any], tmp_path: Path, simple: bool
) -> None:
    expected = rows(room, parts)
    tasks.write_task(tmp_path, "shapes", expected, tasks.PICTURES + tasks.GENERATION, max_new_tokens=13, num_beams=1)
    results = evaluate(room / "bard", tmp_path, "shapes", force_simple=simple)
    samples = {sample["doc_id"]: sample for sample in results["samples"]["shapes"]}
    assert [samples[index]["filtered_resps"][0].strip() for index in range(5)] == [row["answer"] for row in expected]
    assert results["results"]["shapes"]["same,none"] == 1.0
    assert [samples[index]["token_counts"][0]["output_tokens"] for index in range(5)] == [
        row["tokens"] for row in expected
    ]
    tokens, forwards = (sum(row[name] for row in expected) for name in ("tokens", "forwards"))
    throughput = results["throughput"]
    assert throughput["total_gen_tokens"] == tokens
    assert throughput["avg_tokens_per_forward"] == pytest.approx(tokens / forwards, rel=1e-5)
    assert throughput["avg_speed"] == pytest.approx(tokens / throughput["total_elapsed_time"])


def test_clips_and_stop_strings(room: Path, parts: tuple[Any, Any], tmp_path: Path) -> None:
    clips = rows(room, parts, "video")
    tasks.write_task(tmp_path, "clips", clips, tasks.CLIPS + tasks.GENERATION, max_new_tokens=13)
    cut = [{**row, "answer": row["answer"].partition("e")[0].strip()} for row in rows(room, parts)]
    assert any(row["answer"] != whole["answer"] for row, whole in zip(cut, rows(room, parts), strict=True))
    tasks.write_task(tmp_path, "cut", cut, tasks.PICTURES + tasks.GENERATION, max_new_tokens=13, until=["\n\n", "e"])
    results = evaluate(room / "bard", tmp_path, "clips", "cut")
    assert results["results"]["clips"]["same,none"] == results["results"]["cut"]["same,none"] == 1.0


def test_choices_are_scored(room: Path, parts: tuple[Any, Any], tmp_path: Path) -> None:
    choices, made = ["red", "green circle", "B", "C", "D", "E", "F"], []
    for row in rows(room, parts):
        visuals = [{"type": "image", "image": path, "min_pixels": 4096} for path in row["pictures"]]
        inputs = prompt([*visuals, {"type": "text", "text": row["question"]}], parts[1])
        ids = [torch.tensor([parts[1].tokenizer.encode(choice)]) for choice in choices]
        losses = [-parts[0].score(inputs, answer).mean().item() for answer in ids]
        made.append({**row, "choices": choices, "answer": losses.index(min(losses)), "losses": losses})
    assert len({row["answer"] for row in made}) > 1
    tasks.write_task(tmp_path, "choices", made, tasks.PICTURES + tasks.CHOICES)
    results = evaluate(room / "bard", tmp_path, "choices", force_simple=True)
    assert results["results"]["choices"]["acc,none"] == 1.0
    for sample in results["samples"]["choices"]:
        found = [pair[0] for pair in sample["filtered_resps"]]
        assert found == pytest.approx(made[sample["doc_id"]]["losses"], abs=1e-4)


def test_the_embedded_checkpoint_reads_unseen_pictures(tmp_path: Path) -> None:
    made = []
    for number, (scene, asked, answer) in enumerate(conversations(True, SCENES_SEED, 12)):
        path = tmp_path / f"{number}.png"
        scene.draw().save(path)
        made.append({"question": asked, "pictures": [str(path)], "answer": answer})
    tasks.write_task(tmp_path / "task", "scenes", made, tasks.PICTURES + tasks.GENERATION, max_new_tokens=96)
    results = evaluate(EMBEDDED, tmp_path / "task", "scenes", arguments=f"dtype=float32,{SMALL}", batch_size=8)
    assert results["results"]["scenes"]["same,none"] >= 0.8
    assert results["throughput"]["avg_tokens_per_forward"] >= 10
    model = bard_vl.BardVLForConditionalGeneration.from_pretrained(EMBEDDED)
    processor = bard_vl.BardVLProcessor.from_pretrained(EMBEDDED)
    for sample in results["samples"]["scenes"]:
        row = made[sample["doc_id"]]
        picture = {"type": "image", "image": row["pictures"][0], "min_pixels": 4096, "max_pixels": 4096}
        content = [picture, {"type": "text", "text": row["question"]}]
        response = model.generate(prompt(content, processor), max_new_tokens=96)
        assert sample["filtered_resps"][0] == processor.decode(response[0], skip_special_tokens=True)


# --- settings and counts ---------------------------------------------------------------------------------------------


class TaskFiles(yaml.SafeLoader):
    """Reads lmms-eval's task files, without the functions that they name."""


TaskFiles.add_multi_constructor("!", lambda *_: None)


def settings_of_all_tasks() -> list[dict[str, Any]]:
    """Every distinct `generation_kwargs` of the tasks that lmms-eval brings."""
    found = {}
    for path in (Path(lmms_eval.__file__).parent / "tasks").rglob("*yaml"):
        stated = yaml.load(path.read_text(encoding="utf-8"), TaskFiles).get("generation_kwargs")
        found[repr(stated)] = stated or {}
    return list(found.values())


@pytest.fixture(scope="module")
def model(room: Path) -> Any:
    options = {"device": "cpu", "dtype": "float32", "batch_size": 3, "min_pixels": 4096, "max_pixels": 65536}
    return get_model("bard_vl")(str(room / "bard"), confidence_threshold=0.02, **options)


def test_what_any_task_says_is_a_setting_of_generate(model: Any) -> None:
    tasks_settings = settings_of_all_tasks()
    assert len(tasks_settings) > 100
    assert any(stated.get("top_p") == 0 for stated in tasks_settings)
    for stated in tasks_settings:
        settings = model._settings(stated)
        assert bard_vl.BardVLGenerationConfig(**settings).explicit() == settings
        if stated.get("do_sample") is False or stated.get("temperature") == 0:
            assert settings["do_sample"] is False
            assert not {"temperature", "top_k", "top_p"} & set(settings)


def test_choices_of_a_task_are_the_form_of_its_answers(model: Any) -> None:
    for choices in ("A|B|C", ["A", "B", "C"]):
        assert model._settings({"choices": choices})["structured"] == {"choices": ["A", "B", "C"]}
    with pytest.raises(ValueError, match="choices"):
        model._settings({"choices": "A||C"})


def test_settings_of_a_task_come_on_top(model: Any) -> None:
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert sampling.items() <= model._settings(sampling).items()
    assert model._settings({})["confidence_threshold"] == 0.02
    for last in ({"temperature": 0}, {"top_p": 0}, {"do_sample": False}):
        assert model._settings({**sampling, **last}) == {**model._settings({}), "do_sample": False}


def test_what_is_repeated_for_other_processes_is_answered_and_not_counted(
    model: Any, room: Path, parts: tuple[Any, Any]
) -> None:
    made = rows(room, parts)

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "url": picture} for picture in tasks.pictures(doc)]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]

    def request(number: int, **mark: bool) -> Instance:
        arguments = (made[number]["question"], messages, dict(SETTINGS), number, "shapes", "test")
        metadata = {"task": "shapes", "doc_id": number, "repeats": 1, **mark}
        return Instance("generate_until", arguments, number, metadata)

    model.task_dict["shapes"] = {"test": made}
    padding = [request(4, __padding_only__=True)] * 2
    answers = model.generate_until([*map(request, range(5)), *padding])
    assert [answer.text.strip() for answer in answers] == [made[number]["answer"] for number in (0, 1, 2, 3, 4, 4, 4)]
    responses, tokens, forwards, _ = model.totals.tolist()
    assert (responses, tokens) == (5, sum(row["tokens"] for row in made))
    assert forwards == pytest.approx(sum(row["forwards"] for row in made), rel=1e-5)


def test_a_bad_picture_is_a_wrong_answer_and_the_others_count(
    model: Any, room: Path, parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made = rows(room, parts)
    (room / "text.png").write_text("no picture")
    bad = [Image.new("RGB", (2000, 4)), str(room / "text.png"), str(room / "absent.png")]

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "url": picture} for picture in doc.get("bad") or tasks.pictures(doc)]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]

    documents = [made[0], *({"question": made[0]["question"], "bad": [picture]} for picture in bad), made[1]]
    model.task_dict["shapes"] = {"test": documents}
    arguments = [
        (doc["question"], messages, dict(SETTINGS), number, "shapes", "test") for number, doc in enumerate(documents)
    ]
    requests = []
    for number, doc in enumerate(documents):
        arguments = (doc["question"], messages, dict(SETTINGS), number, "shapes", "test")
        metadata = {"task": "shapes", "doc_id": number, "repeats": 1}
        requests.append(Instance("generate_until", arguments, number, metadata))
    answers = [answer.text.strip() for answer in model.generate_until(requests)]
    assert answers == [made[0]["answer"], "", "", "", made[1]["answer"]]
    for number in (1, 2, 3):
        assert f"task shapes, document {number} counts as wrong: ValueError: " in caplog.text
    assert "absent.png cannot be read as a picture: no such file" in caplog.text


def test_one_bad_choice_costs_no_other(
    model: Any, room: Path, parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A choice without a token, one that is longer than the model, and a picture that is none."""
    from bard_vl.evaluation.lmms import SimpleBardVL  # not before lmms-eval has looked for models

    question = rows(room, parts)[0]["question"]
    simple = copy.copy(model)
    simple.__class__ = SimpleBardVL
    simple.task_dict = {"shapes": {"test": [[], [str(room / "absent.png")]]}}

    def losses(*asked: tuple[str, int]) -> list[tuple[float, bool]]:
        requests = []
        for choice, number in asked:
            arguments = (question, choice, list, number, "shapes", "test")
            metadata = {"task": "shapes", "doc_id": number, "repeats": 1}
            requests.append(Instance("loglikelihood", arguments, number, metadata))
        return [pair.text for pair in simple.loglikelihood(requests)]

    (alone,) = losses(("red", 0))
    found = losses(("red", 0), ("", 0), ("a " * 5000, 0), ("red", 1))
    assert found[0] == (pytest.approx(alone[0], rel=1e-5), alone[1])
    assert found[1:] == [(float("inf"), False)] * 3
    assert caplog.text.count("document 0 counts as wrong: ValueError: ") == 2
    assert "document 1 counts as wrong: ValueError: " in caplog.text


# --- the manual ------------------------------------------------------------------------------------------------------

MANUAL = (fresh.ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", MANUAL, re.M | re.S) for line in block.splitlines()]
PUBLISHED = "fudan-generative-ai/Bard-VL-B{}-Mask-4B-Distil-Instruct"
SCORES = {
    "mmmu_val": "mmmu_acc",
    "mmmu_pro_standard": "mmmu_acc",
    "mme": "mme_perception_score",
    "realworldqa": "exact_match",
    "mmstar": "average",
    "ai2d": "exact_match",
    "chartqa": "relaxed_overall",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face home that holds the manual's checkpoints, tiny ones, and two rows of each data set."""
    home = tmp_path_factory.mktemp("home")
    published = make_published(tiny.write_qwen3vl(home / "qwen"), home / "published")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "mask_token_id": 447}))
    for size in (16, 32):
        fresh.add_to_hub_cache(home, PUBLISHED.format(size), published)
    tasks.write_data_sets(home / "datasets", tiny.draw((128, 96)))
    return home


def test_every_command_of_the_manual_is_run() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["pip", "lmms-eval", "accelerate"]


@pytest.mark.parametrize("command", COMMANDS[1:], ids=["alone", "two processes"])
def test_commands_of_the_manual(command: str, home: Path, tmp_path: Path) -> None:
    program, *arguments = command.replace("--num_processes 8", "--multi_gpu --num_processes 2").split()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        **{"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_fake", "ACCELERATE_USE_CPU": "true"},
        **{"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    }
    quickly = ["--gen_kwargs", "max_new_tokens=16"]
    done = subprocess.run(
        [program, *arguments, *quickly], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = list((tmp_path / "results").rglob("*_results.json"))
    assert len(found) == 1, done.stdout + done.stderr
    results = json.loads(found[0].read_text())
    for task, metric in SCORES.items():
        assert any(name.startswith(f"{metric},") for name in results["results"][task]), task
    throughput = results["throughput"]
    assert throughput["total_gen_tokens"] >= 2 * len(SCORES)
    assert throughput["avg_tokens_per_forward"] > 0
    assert throughput["avg_speed"] > 0
    assert throughput["avg_num_processes"] == (2 if program == "accelerate" else 1)
