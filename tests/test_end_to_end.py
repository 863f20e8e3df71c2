"""The main job on real input: pictures saved as files, Qwen's vocabulary and chat template, a converted checkpoint."""

from pathlib import Path
from typing import Any

import fresh
import pytest
import tiny
from PIL import Image

pytestmark = pytest.mark.process(group="lines")

QUESTION = "What is to the left of the blue square?"
FRAMES = [f"frame{index}.png" for index in range(4)]
GREEDY = {"max_new_tokens": 21, "confidence_threshold": 0.02}
# The model card's call, argument by argument.
MODEL_CARD = {"block_size": 4, "denoising_steps": 4, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
MODEL_CARD |= {"remasking_strategy": "low_confidence_dynamic", "return_step_stats": False}


# --- what runs in a fresh process, on each line of transformers -------------------------------------------------------


class Chat:
    """A model and a processor loaded as remote code, and the ways to ask them."""

    def __init__(self, folder: str, **kwargs: Any):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **kwargs)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def inputs(self, messages: Any, **kwargs: Any) -> Any:
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(messages, **options, **kwargs)

    def texts(self, response_ids: Any) -> list[str]:
        return self.processor.batch_decode(response_ids, skip_special_tokens=True)

    def answer(self, messages: Any) -> str:
        inputs = self.inputs(messages)
        return self.texts(self.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :])[0]


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}


def picture(path: str) -> dict[str, Any]:
    return {"type": "image", "image": path}


def float32() -> dict[str, Any]:
    import torch

    return {"dtype": torch.float32}


def ask(folder: str, photo: str, drawing: str, frames: list[str]) -> dict[str, Any]:
    """Every way to ask, by name: the decoded text."""
    chat = Chat(folder, **float32())
    messages = [user(picture(drawing))]
    inputs = chat.inputs(messages)
    length = inputs["input_ids"].shape[1]
    sequences = chat.model.generate(**inputs, **GREEDY)
    assert sequences[:, :length].equal(inputs["input_ids"])
    ids, others = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
    clip = {"type": "video", "video": [Image.open(frame) for frame in frames]}
    return {
        "keywords": chat.texts(sequences[:, length:])[0],
        "first argument": chat.texts(chat.model.generate(ids, **others, **GREEDY)[:, length:])[0],
        "mapping": chat.texts(chat.model.generate(inputs, **GREEDY, **MODEL_CARD))[0],
        "qwen_vl_utils": ask_by_qwen_vl_utils(chat, messages),
        "eager": ask_with_eager_attention(folder, messages),
        "half precision": ask_in_half_precision(folder, messages),
        "photo": chat.answer([user(picture(photo))]),
        "text alone": chat.answer([user()]),
        "video": chat.answer([user(clip)]),
        "batch": ask_in_a_batch(chat, [messages, [user(picture(photo), picture(drawing))], [user()]]),
        "two pictures": chat.answer([user(picture(photo), picture(drawing))]),
        **ask_twice(chat, messages),
    }


def ask_by_qwen_vl_utils(chat: Chat, messages: Any) -> str:
    from qwen_vl_utils import process_vision_info

    text = chat.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages, image_patch_size=16, return_video_metadata=True)
    batch = chat.processor(text=[text], images=images, videos=videos, do_resize=False, return_tensors="pt")
    return chat.texts(chat.model.generate(batch, **GREEDY, **MODEL_CARD))[0]


def ask_with_eager_attention(folder: str, messages: Any) -> str:
    return Chat(folder, attn_implementation="eager", **float32()).answer(messages)


def ask_in_half_precision(folder: str, messages: Any) -> str:
    import torch

    return Chat(folder, dtype=torch.bfloat16).answer(messages)


def ask_in_a_batch(chat: Chat, conversations: list[Any]) -> list[str]:
    inputs = chat.inputs(conversations, processor_kwargs={"padding": True})
    return chat.texts(chat.model.generate(inputs, **GREEDY))


def ask_twice(chat: Chat, messages: Any) -> dict[str, Any]:
    """A second turn with the cache of the first, and the same without."""
    inputs = chat.inputs(messages)
    first = chat.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    answer = chat.texts(first.sequences[:, inputs["input_ids"].shape[1] :])[0]
    messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}, user()]
    inputs = chat.inputs(messages)
    cached = {"past_key_values": first.past_key_values, "return_dict_in_generate": True}
    second = chat.model.generate(**inputs, **GREEDY, **cached)
    length = inputs["input_ids"].shape[1]
    return {
        "first turn": answer,
        "second turn": chat.texts(second.sequences[:, length:])[0],
        "second turn without cache": chat.answer(messages),
        "first prompt reused": second.num_encoded_tokens.item() < length - 40,
    }


def ask_by_pipeline(folder: str, drawing: str) -> dict[str, str]:
    from transformers import pipeline

    messages = [user(picture(drawing))]
    options = {"model": folder, "trust_remote_code": True, **float32()}
    describe = pipeline("image-text-to-text", **options)
    assert type(describe.model).__module__.startswith("transformers_modules.")
    assert type(describe.processor).__name__ == "BardVLProcessor"
    threshold = {"confidence_threshold": GREEDY["confidence_threshold"]}
    length = {"max_new_tokens": GREEDY["max_new_tokens"]}
    whole_chat = describe(text=messages, **length, generate_kwargs=dict(threshold))[0]["generated_text"]
    part = {"return_full_text": False}
    prompt = describe.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = describe(text=[messages, messages], generate_kwargs=dict(GREEDY), **part, batch_size=2)
    stored = pipeline("image-text-to-text", **options, **length)
    return {
        "argument": describe(text=messages, **length, generate_kwargs=dict(threshold), **part)[0]["generated_text"],
        "generate_kwargs": describe(text=messages, generate_kwargs=dict(GREEDY), **part)[0]["generated_text"],
        "whole chat": whole_chat[-1]["content"],
        "batch": batch[1][0]["generated_text"],
        "prompt": describe(images=drawing, text=prompt, generate_kwargs=dict(GREEDY), **part)[0]["generated_text"],
        "at construction": stored(text=messages, generate_kwargs=dict(threshold), **part)[0]["generated_text"],
    }


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a converted checkpoint, a photograph, a drawing and the frames of a video."""
    room = tmp_path_factory.mktemp("room")
    source = tiny.write_qwen3vl(room / "Qwen3-VL-tiny", tokenizer="qwen")
    fresh.convert(source, room / "Bard-VL-tiny", "--block-size", 4)
    tiny.draw_scene(room / "photo.jpg", (200, 150), seed=1)
    tiny.draw_scene(room / "drawing.png", (128, 96), seed=2)
    for name, frame in zip(FRAMES, tiny.draw_frames(4, (128, 96), seed=3), strict=True):
        frame.save(room / name)
    return room


@pytest.fixture(scope="module")
def answers_by_line(room: Path) -> dict[str, dict[str, Any]]:
    return {line: ask_everything(room, line) for line in fresh.LINES}


def ask_everything(room: Path, line: str) -> dict[str, Any]:
    folder, options = room / "Bard-VL-tiny", {"home": room / f"home-{fresh.line_name(line)}", "line": line}
    photo, drawing, *frames = [str(room / name) for name in ("photo.jpg", "drawing.png", *FRAMES)]
    found = fresh.call("test_end_to_end.ask", folder, photo, drawing, frames, **options)
    return {**found, "pipeline": fresh.call("test_end_to_end.ask_by_pipeline", folder, drawing, **options)}


@pytest.fixture(params=fresh.LINES, ids=fresh.line_name)
def answers(request: pytest.FixtureRequest, answers_by_line: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return answers_by_line[request.param]


def test_every_convention_gives_one_text(answers: dict[str, Any]) -> None:
    text = answers["keywords"]
    assert len(text.split()) > 1
    for name in ("first argument", "mapping", "qwen_vl_utils", "eager", "first turn"):
        assert answers[name] == text, name


def test_pipeline_gives_the_text_of_generate(answers: dict[str, Any]) -> None:
    assert answers["pipeline"] == dict.fromkeys(answers["pipeline"], answers["keywords"])


def test_what_is_shown_decides_what_is_said(answers: dict[str, Any]) -> None:
    shown = [answers[name] for name in ("keywords", "photo", "text alone", "video", "two pictures")]
    assert all(shown)
    assert len(set(shown)) == len(shown)


def test_batch_of_files_gives_the_text_of_each_alone(answers: dict[str, Any]) -> None:
    assert answers["batch"] == [answers[name] for name in ("keywords", "two pictures", "text alone")]


def test_second_turn_reuses_the_first(answers: dict[str, Any]) -> None:
    assert answers["second turn"] == answers["second turn without cache"] != answers["first turn"]
    assert answers["first prompt reused"] is True


def test_half_precision_answers(answers: dict[str, Any]) -> None:
    assert len(answers["half precision"].split()) > 1


def test_every_line_says_what_the_package_says(room: Path, answers_by_line: dict[str, dict[str, Any]]) -> None:
    import bard_vl

    chat = Chat.__new__(Chat)
    chat.model = bard_vl.BardVLForConditionalGeneration.from_pretrained(room / "Bard-VL-tiny", **float32())
    chat.processor = bard_vl.BardVLProcessor.from_pretrained(room / "Bard-VL-tiny")
    expected = {**answers_by_line[""], "photo": chat.answer([user(picture(str(room / "photo.jpg")))])}
    for line, found in answers_by_line.items():
        # The lines' layers round differently in bfloat16.
        assert {**found, "half precision": None} == {**expected, "half precision": None}, line
