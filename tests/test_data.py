"""Chats as training sees them: the tokens that inference would see, from any storage, and broken ones left out."""

import base64
import io
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from thorough import cases
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds no folder for tiny.py
import tiny
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.app.boxes import read_things
from bard_vl.evaluation import scenes
from bard_vl.evaluation.grounding import write_chats
from bard_vl.training import data
from bard_vl.training.chats import Broken, ChatEncoder, ChatLimits
from bard_vl.training.data import ChatSamples, Mixture, PackingCollator, limit_pixels, open_chats, stream_chats
from bard_vl.training.packing import Sample, packed_length
from datasets.distributed import split_dataset_by_node

IDS = tiny.IDS["small"]
LIMITS = ChatLimits(block_size=4, max_length=4096)
CONFIG = BardVLConfig(**{**tiny.qwen3vl_config(), "model_type": "bard_vl", "block_size": 4})
MERGED = "merged tokens"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_processor_files(tmp_path_factory.mktemp("processor"))
    return BardVLProcessor.from_pretrained(folder, mask_token_id=IDS.mask_token_id)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    """With Qwen's own vocabulary, in which line breaks merge."""
    folder = tiny.write_processor_files(tmp_path_factory.mktemp("qwen"), "qwen")
    settings = {**tiny.qwen3vl_config(tokenizer="qwen"), "model_type": "bard_vl"}
    return ChatEncoder(BardVLProcessor.from_pretrained(folder), BardVLConfig(**settings), LIMITS)


@cache
def model_of(encoder: ChatEncoder) -> Any:
    with torch.device("meta"):
        return BardVLForConditionalGeneration(encoder.config)


def positions_of(encoder: ChatEncoder, sample: Sample) -> torch.Tensor:
    """By a whole model."""
    grids = [sample.visual_inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")]
    return model_of(encoder).get_position_ids(sample.input_ids[None], None, *grids)[1:, 0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def encoder(processor: Any, tmp_path: Path) -> ChatEncoder:
    return ChatEncoder(processor, CONFIG, LIMITS, tmp_path)


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


def text(string: str) -> dict[str, Any]:
    return {"type": "text", "text": string}


def user(*items: Any) -> dict[str, Any]:
    return {"role": "user", "content": [text(item) if isinstance(item, str) else item for item in items]}


def assistant(string: str) -> dict[str, Any]:
    return {"role": "assistant", "content": string}


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def mapped(chats: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(chats, on_mixed_types="use_json")


def bytes_of(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tokenize(processor: Any, messages: Any, **processor_kwargs: Any) -> Any:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, processor_kwargs=processor_kwargs, **options)


def encoded(encoder: ChatEncoder, given: dict[str, Any], sample_id: int = 0) -> Sample:
    sample = encoder.encode(given, sample_id)
    assert isinstance(sample, Sample), sample
    return sample


def assert_same(sample: Sample, other: Sample) -> None:
    assert sample.responses == other.responses
    assert sample.sample_id == other.sample_id
    assert set(sample.visual_inputs) == set(other.visual_inputs)
    for name in ("input_ids", "position_ids", "visual_index"):
        assert torch.equal(getattr(sample, name), getattr(other, name)), name
    for name, value in sample.visual_inputs.items():
        assert torch.equal(value, other.visual_inputs[name]), name


# --- what inference would see ----------------------------------------------------------------------------------------

PICTURES = [tiny.draw((96, 64), 1), tiny.draw((64, 128), 2), tiny.draw((210, 77), 3)]
STRINGS = st.text(st.sampled_from("a b\n\t.Zé你\r'1"), max_size=8) | st.sampled_from(["", "The answer is red. ", " ok"])
USERS = st.lists(STRINGS.map(text) | st.sampled_from(PICTURES).map(image), max_size=4)
SYSTEMS = st.lists(STRINGS.map(lambda string: {"role": "system", "content": string}), max_size=1)
TURNS = st.lists(st.tuples(USERS, STRINGS), min_size=1, max_size=4)


@pytest.mark.thorough
@given(system=SYSTEMS, turns=TURNS, closing=USERS)
@example(system=[], turns=[([], "")], closing=[])
@example(system=[], turns=[([image(PICTURES[0])], "a"), ([text("b"), image(PICTURES[1])], "c")], closing=[])
@example(system=[], turns=[([text("a")], "\na"), ([text("b")], "c")], closing=[])
@example(system=[], turns=[([text("a")], "a"), ([text("b")], "\n\nc")], closing=[image(PICTURES[2])])
@settings(max_examples=cases(40))
def test_every_turn_begins_where_inference_would(
    qwen: ChatEncoder, system: list[Any], turns: list[tuple[list[Any], str]], closing: list[Any]
) -> None:
    messages = list(system)
    for items, answer in turns:
        messages += [user(*items), assistant(answer)]
    processor, config = qwen.processor, qwen.config
    sample = qwen.encode(chat(*messages, user(*closing)), 7)
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [tokenize(processor, messages[:number]) for number in numbers]
    if isinstance(sample, Broken):
        assert sample.reason == MERGED
        whole = prompts[-1]["input_ids"][0].tolist()
        assert any(prompt["input_ids"][0].tolist() != whole[: prompt["input_ids"].shape[1]] for prompt in prompts)
        return
    assert len(sample.responses) == len(turns)
    assert sample.responses[-1][1] == len(sample.input_ids)
    assert sample.sample_id == 7
    for (start, end), prompt, (_, answer) in zip(sample.responses, prompts, turns, strict=True):
        assert sample.input_ids[:start].tolist() == prompt["input_ids"][0].tolist()
        response = sample.input_ids[start:end].tolist()
        assert response == [*processor.tokenizer(answer)["input_ids"], processor.tokenizer.eos_token_id]
    grids = prompts[-1].get("image_grid_thw")
    assert torch.equal(sample.position_ids, positions_of(qwen, sample))
    shown = sample.input_ids == config.image_token_id
    assert sample.visual_index[shown].tolist() == list(range(int(shown.sum())))
    assert (sample.visual_index[~shown] == -1).all()
    if grids is None:
        assert sample.visual_inputs == {}
    else:
        assert torch.equal(sample.visual_inputs["image_grid_thw"], grids)
        assert torch.equal(sample.visual_inputs["pixel_values"], prompts[-1]["pixel_values"])


@pytest.mark.thorough
def test_a_response_that_merges_with_its_prompt_is_left_out_unless_it_is_the_last(qwen: ChatEncoder) -> None:
    merging = qwen.encode(chat(user("a"), assistant("\n\nb"), user("c"), assistant("d")), 3)
    assert isinstance(merging, Broken)
    assert (merging.sample_id, merging.reason) == (3, MERGED)
    sample = encoded(qwen, chat(user("a"), assistant("\n\nb")))
    (start, end) = sample.responses[0]
    assert qwen.tokenizer.decode(sample.input_ids[start:end]) == "\n\nb<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_named(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{%- for item in message.content -%}"
        "{%- if message.role == 'assistant' and not loop.last -%}{%- else -%}"
        "{{ item.text.split('</think>')[-1] if messages[-1].role == 'user' else item.text }}{%- endif -%}"
        "{%- endfor -%}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    monkeypatch.setattr(encoder.processor, "chat_template", template)
    thinking = [user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")]
    broken = encoder.encode(chat(*thinking), 0)
    assert broken == Broken(0, "template", "it renders what leads to turn 2 in another way once more follows")
    assert isinstance(encoder.encode(chat(*thinking[:2]), 0), Sample)
    monkeypatch.setattr(encoder.processor, "chat_template", template.replace("<|im_end|>", ""))
    broken = encoder.encode(chat(*thinking[:2]), 0)
    assert broken == Broken(0, "template", "it does not end turn 1 with <|im_end|>")


def test_videos_and_images_in_one_chat(encoder: ChatEncoder, processor: Any) -> None:
    frames = tiny.draw_frames(4)
    clip = {"type": "video", "video": frames, "fps": 2.0}
    messages = [user(clip, "a", image(PICTURES[0])), assistant("b"), user(image(PICTURES[1])), assistant("c")]
    sample = encoded(encoder, chat(*messages))
    metadata = [{"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4}]
    for number, (start, _) in zip((1, 3), sample.responses, strict=True):
        prompt = tokenize(processor, messages[:number], video_metadata=metadata, do_sample_frames=False)
        assert sample.input_ids[:start].tolist() == prompt["input_ids"][0].tolist()
    names = {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"}
    assert set(sample.visual_inputs) == names
    for name in names:
        assert torch.equal(sample.visual_inputs[name], prompt[name])
    assert torch.equal(sample.position_ids, positions_of(encoder, sample))
    is_image, is_video = (sample.input_ids == token for token in (IDS.image_token_id, IDS.video_token_id))
    num_image, num_video = int(is_image.sum()), int(is_video.sum())
    assert sample.visual_index[is_image].tolist() == list(range(num_image))
    assert sample.visual_index[is_video].tolist() == list(range(num_image, num_image + num_video))
    measured = encoder.measure(chat(*messages))
    assert (measured["length"], measured["reason"]) == (len(sample.input_ids), None)


def test_every_form_of_a_picture_gives_the_same_sample(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = tiny.draw_scene(tmp_path / "scene.png")
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    forms = [path.name, path, f"file://{path}", url, tiny.draw(), path.read_bytes()]
    forms += [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": path.name}]
    items = [image(form) for form in forms]
    items += [{"image": url}, {"type": "image", "url": str(path)}, {"type": "image", "path": path.name, "text": None}]
    items += [{"type": "image_url", "image_url": {"url": url}}, {**image(str(path)), "video": None}]
    first, *others = [encoded(encoder, chat(user(item, "x"), assistant("y"))) for item in items]
    others += [
        encoded(encoder, chat(user({"type": "image"}, "x"), assistant("y"), images=[path.name])),
        encoded(encoder, chat(user({"type": "image", "text": None}, "x"), assistant("y"), images=tiny.draw())),
        encoded(encoder, chat({"role": "user", "content": "<image>x"}, assistant("y"), images=[{"bytes": forms[5]}])),
    ]
    for sample in others:
        assert_same(sample, first)
    mark = encoded(encoder, chat({"role": "user", "content": "<image>x"}, assistant("y")))
    assert mark.visual_inputs == {}, "without a column of images the mark is text"


@pytest.mark.parametrize("name", tiny.strange_pictures())
def test_a_picture_is_what_inference_sees(encoder: ChatEncoder, processor: Any, tmp_path: Path, name: str) -> None:
    picture, options = tiny.strange_pictures()[name]
    picture.save(tmp_path / name, **options)
    for stated in ({}, {"min_pixels": 8000, "max_pixels": 12_000}):
        seen = tokenize(processor, [user({**image(str(tmp_path / name)), **stated}, "x")])
        given = chat(user({**image(name), **stated}, "x"), assistant("y"))
        sample = encoded(encoder, given)
        assert torch.equal(sample.visual_inputs["pixel_values"], seen["pixel_values"])
        assert torch.equal(sample.visual_inputs["image_grid_thw"], seen["image_grid_thw"])
        assert encoder.measure(given)["length"] == len(sample.input_ids)


def test_images_of_a_column_fill_the_placeholders_in_their_order(encoder: ChatEncoder) -> None:
    column = [PICTURES[0], PICTURES[1], PICTURES[2]]
    blank = {"type": "image"}
    turns = [user(blank, "a", blank), assistant("b"), user(blank), assistant("c")]
    inline = [user(image(column[0]), "a", image(column[1])), assistant("b"), user(image(column[2])), assistant("c")]
    assert_same(encoded(encoder, chat(*turns, images=column)), encoded(encoder, chat(*inline)))


FIRST, SECOND = (user(image(PICTURES[0]), "What?"), assistant("Red.")), (user("Sure?"), assistant("Yes."))
SAID = [("human", "<image>\nWhat?"), ("gpt", "Red."), ("human", "Sure?"), ("gpt", "Yes.")]
OTHER_FORMS = {
    "LLaVA": {"image": PICTURES[0], "conversations": [{"from": who, "value": what} for who, what in SAID]},
    "FineVision": {
        "images": [PICTURES[0]],
        "texts": [{"user": "What?", "assistant": "Red."}, {"user": "Sure?", "assistant": "Yes."}],
    },
    "completion of messages": {"images": [PICTURES[0]], "prompt": [user("What?")], "completion": [FIRST[1], *SECOND]},
    "weights": chat(FIRST[0], {**FIRST[1], "weight": 1}, *SECOND),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_every_form_of_a_chat_gives_the_same_sample(encoder: ChatEncoder, name: str) -> None:
    expected = encoded(encoder, chat(*FIRST, *SECOND))
    assert len(expected.responses) == 2
    assert_same(encoded(encoder, OTHER_FORMS[name]), expected)
    assert encoder.measure(OTHER_FORMS[name]) == encoder.measure(chat(*FIRST, *SECOND))


def test_answers_of_weight_0_and_of_a_prompt_are_not_learnt(encoder: ChatEncoder) -> None:
    whole = encoded(encoder, chat(*FIRST, *SECOND))
    shown = {"images": [PICTURES[0]], "prompt": [user("What?"), FIRST[1], SECOND[0]], "completion": [SECOND[1]]}
    for form in (chat(FIRST[0], {**FIRST[1], "weight": 0}, *SECOND), shown):
        assert_same(encoded(encoder, form), replace(whole, responses=whole.responses[1:]))
    before = encoded(encoder, chat(*FIRST, SECOND[0], {**SECOND[1], "weight": 0}))
    assert_same(before, encoded(encoder, chat(*FIRST)))
    plain = encoded(encoder, {"prompt": "What?", "completion": "Red."})
    assert_same(plain, encoded(encoder, chat(user("What?"), assistant("Red."))))


def test_what_follows_the_last_answer_is_left_out(encoder: ChatEncoder) -> None:
    whole = encoded(encoder, chat(user("a", image(PICTURES[0])), assistant("b"), user(image(PICTURES[1]), "c")))
    assert_same(whole, encoded(encoder, chat(user("a", image(PICTURES[0])), assistant("b"))))


# --- broken chats ----------------------------------------------------------------------------------------------------

ANSWERED = (user("a"), assistant("b"))
BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"text": "a"}, "malformed messages", "`messages` must be a list with something in it, got None"),
    "empty": (chat(), "malformed messages", "something in it"),
    "a string": ({"messages": "hello"}, "malformed messages", "got 'hello'"),
    "no role": (chat({"content": "a"}, *ANSWERED), "malformed messages", "with a role"),
    "no mapping": (chat("a", *ANSWERED), "malformed messages", "with a role"),  # type: ignore[arg-type]
    "a number as content": (chat({"role": "user", "content": 5}, assistant("b")), "malformed messages", "got 5"),
    "a number as item": (chat({"role": "user", "content": [5]}, assistant("b")), "malformed messages", "got [5]"),
    "audio": (chat(user({"type": "audio", "audio": "x"}), assistant("b")), "malformed messages", "audio"),
    "text without text": (chat(user({"type": "text"}), assistant("b")), "malformed messages", "{'type': 'text'}"),
    "no answer": (chat(user("a")), "no assistant turn", "['user']"),
    "no answer to learn": (chat(user("a"), {**assistant("b"), "weight": 0}), "no assistant turn", "have `weight` 0"),
    "half a weight": (chat(user("a"), {**assistant("b"), "weight": 0.5}), "malformed messages", "0 or 1, got 0.5"),
    "a role of ShareGPT": (
        {"conversations": [{"from": "oracle", "value": "a"}]},
        *("malformed messages", "got {'from': 'oracle'"),
    ),
    "half a text": ({"texts": [{"user": "a"}]}, "malformed messages", "`texts` must hold user and assistant"),
    "no completion": ({"prompt": "a"}, "malformed messages", "got None"),
    "missing image": (chat(user(image("missing.png")), assistant("b")), "missing image", "missing.png"),
    "no image": (chat(user(image("notes.txt")), assistant("b")), "broken image", "notes.txt"),
    "no image in bytes": (chat(user(image(b"abc")), assistant("b")), "broken image", "abc"),
    "no image in a URI": (chat(user(image("data:image/png;base64,AAAA")), assistant("b")), "broken image", "AAAA"),
    "half an image": (chat(user(image("half.png")), assistant("b")), "broken image", "half.png"),
    "a thread": (chat(user(image(PICTURES[0].resize((900, 2)))), assistant("b")), "broken image", "ratio"),
    "a number as image": (chat(user(image(5)), assistant("b")), "broken image", "got 5"),
    "too few images": (chat(user({"type": "image"}), assistant("b")), "image count", "more images than"),
    "too many images": (chat(*ANSWERED, images=PICTURES), "image count", "show 0 of the 3"),
    "typed placeholder": (chat(user("<|image_pad|>"), assistant("b")), "image count", "shows 1 images, 0 are given"),
    "a painted answer": (
        chat(user("a"), {"role": "assistant", "content": [image(PICTURES[0])]}),
        *("malformed messages", "an assistant turn shows an image"),
    ),
    "early end": (chat(user("a"), assistant("b<|im_end|>c")), "malformed messages", "turn 1 holds <|im_end|>"),
    "missing video": (chat(user({"type": "video", "video": "x.mp4"}), assistant("b")), "missing video", "x.mp4"),
    "no video": (chat(user({"type": "video", "video": 5}), assistant("b")), "broken video", "got 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chat_is_named_by_its_fault(name: str, encoder: ChatEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "half.png").write_bytes(bytes_of(tiny.draw((96, 64)))[:-200])
    given, reason, detail = BROKEN[name]
    broken = encoder.encode(given, 5)
    assert isinstance(broken, Broken)
    assert (broken.sample_id, broken.reason) == (5, reason)
    assert detail in broken.detail
    measured = encoder.measure(given)
    seen_without_pixels = name != "half an image"
    assert measured["reason"] == (reason if seen_without_pixels else None)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4.6 and older refuse a column of texts and lists")
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_that_are_json_stay_texts_beside_lists(tmp_path: Path, streaming: bool) -> None:
    answers = ["5", "[]", "null", "true", "red", '{"a": 1.50}', '[{"bbox_2d": [1, 2, 3, 4]}]', "[1]"]
    answers.append('[{"bbox_2d": [1, 2, 3, 4], "text": "exit"}]')
    given = [chat(user("Where?"), assistant(answer)) for answer in answers]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in given))
    read = [each["messages"] for each in open_chats(tmp_path / "chats.jsonl", streaming=streaming)]
    assert [message["content"] for _, message in read] == answers
    assert [message["content"] for message, _ in read] == [[text("Where?")]] * len(answers)


# --- boxes and points ------------------------------------------------------------------------------------------------


def located(numbers: Any, size: tuple[int, int] = (96, 64), kind: str = "bbox_2d") -> dict[str, Any]:
    answer = json.dumps([{kind: numbers, "label": "a"}])
    picture = {"bytes": bytes_of(tiny.draw(size)), "path": None}
    return chat(user({"type": "image"}, "Where?"), assistant(answer), images=[picture])


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ('[{"bbox_2d": [20, 40, 1300, 90], "label": "a"}]', "`bbox_2d` [20, 40, 1300, 90] must be from 0 to 1000"),
        ('Here: {"point_2d":[-3,5]}', "`point_2d` [-3,5] must be from 0"),
        ('{"bbox_2d": [200, 300, 100, 50]}', "must be left, top, right, bottom"),
        ('{"bbox_2d": [2, 3]}', "must have 4 numbers"),
        ('{"bbox_2d": [2, , 3, 4]}', "is no list of numbers"),
        ('{"point_2d": [2, 3]}, {"point_2d": [2, 1001]}', "[2, 1001]"),
    ],
)
def test_coordinates_that_cannot_be_relative_are_named(encoder: ChatEncoder, answer: str, detail: str) -> None:
    given = chat(*ANSWERED, user("Where?"), assistant(answer))
    broken = encoder.encode(given, 5)
    assert isinstance(broken, Broken)
    assert broken.reason == "coordinates"
    assert detail in broken.detail
    samples = ChatSamples(mapped([given, chat(*ANSWERED)]), encoder)
    assert (len(samples), dict(samples.skipped.counts)) == (1, {"coordinates": 1})


def test_coordinates_that_look_like_pixels_are_told(encoder: ChatEncoder, caplog: Any) -> None:
    pixels = [located([n, n, 60 + n, 50 + n]) for n in range(8)]
    assert ChatSamples(mapped(pixels), encoder).places.are_pixels
    assert "coordinates look like pixels: none of 8 boxes and points lies beyond its picture's own size" in caplog.text
    caplog.clear()
    large = [located([n, n, 60 + n, 50 + n], (1024, 32)) for n in range(8)]
    for relative in ([*pixels, located([500, 500], kind="point_2d")], pixels[:2], large):
        assert not ChatSamples(mapped(relative), encoder).places.are_pixels
    assert "pixels" not in caplog.text
    encoder.limits = replace(LIMITS, coordinates="any")
    assert len(ChatSamples(mapped([*pixels, located([1, 2, 3000, 4])]), encoder)) == 9
    assert "pixels" not in caplog.text
    silent = chat(user("How?"), assistant('Write "bbox_2d": [x1, y1, x2, y2].'))
    assert isinstance(encoder.encode(silent), Sample), "no numbers, no place"


def test_relative_coordinates_stay_true_when_pictures_are_resized(encoder: ChatEncoder, tmp_path: Path) -> None:
    write_chats(tmp_path / "places", 3)
    rows = [json.loads(line) for line in (tmp_path / "places" / "chats.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        shown = scenes.scene(False, 0, number)
        picture = shown.draw().resize((300, 170), Image.Resampling.NEAREST)  # of no shape that the model sees
        row["messages"][0]["content"][0]["image"] = bytes_of(picture)
        told = row["messages"][1]["content"]
        answers, sizes = set(), set()
        for most in (4096, 16_384, 65_536):
            limited = ChatEncoder(limit_pixels(encoder.processor, 4096, most), CONFIG, LIMITS)
            sample = encoded(limited, row)
            ((start, end),) = sample.responses
            answers.add(limited.tokenizer.decode(sample.input_ids[start:end]))
            _, height, width = (16 * sample.visual_inputs["image_grid_thw"][0]).tolist()
            sizes.add((width, height))
            seen = picture.resize((width, height), Image.Resampling.NEAREST)
            for thing, place in zip(shown.things, read_things(told, width, height), strict=True):
                left, top, right, bottom = place.place
                middle = seen.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
                assert "#{:02x}{:02x}{:02x}".format(*middle) == scenes.COLOURS[thing.colour]
        assert len(sizes) == 3
        assert answers == {told + "<|im_end|>"}


# --- limits ----------------------------------------------------------------------------------------------------------

SIZES = [(96, 64), (33, 31), (500, 40), (31, 205), (640, 480), (64, 64)]
TWO_TURNS = chat(user("a b c", image(PICTURES[0])), assistant("d e f"), user("g"), assistant("h i j k l m n o p q r"))


@pytest.mark.parametrize("pixels", [(None, None), (16_384, 32_768), (None, 8192)])
def test_lengths_are_known_without_decoding_pixels(
    pixels: tuple[int | None, int | None], encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = ChatEncoder(limit_pixels(encoder.processor, *pixels), CONFIG, LIMITS)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [bytes_of(tiny.draw(size), "jpeg", exif=turned) for size in SIZES]
    chats = [chat(user(*map(image, pictures[: 1 + n]), "a"), assistant("b" * n), *ANSWERED) for n in range(len(SIZES))]
    samples = [encoded(limited, each) for each in chats]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
        measured = [limited.measure(each) for each in chats]
    assert [row["length"] for row in measured] == [len(sample.input_ids) for sample in samples]
    for row, sample in zip(measured, samples, strict=True):
        assert list(zip(row["starts"], row["ends"], strict=True)) == sample.responses
    assert [row["short_side"] for row in measured] == [64, 31, 31, 31, 31, 31]
    assert measured[-1]["aspect_ratio"] == 12.5
    areas = samples[-1].visual_inputs["image_grid_thw"].prod(-1) * 16**2
    smallest, largest = pixels
    assert areas[[0, 4, 5]].max() <= (largest or 65_536)  # narrow pictures keep a side of 32 pixels, and pass it
    assert areas.min() >= (smallest or 4096)
    assert encoder.processor.image_processor.size["longest_edge"] == 65_536, "the caller's processor stays as it is"


def test_pixel_limits_that_contradict_each_other_are_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="`min_pixels` 100000 is above `max_pixels` 65536"):
        limit_pixels(processor, 100_000, None)


@pytest.mark.parametrize(
    ("name", "at_limit", "beyond", "reason"),
    [
        ("min_short_side", lambda sample: 64, 65, "picture too small"),
        ("max_aspect_ratio", lambda sample: 1.5, 1.4, "picture too long"),
        ("max_total_length", lambda sample: len(sample.input_ids), -1, "too many tokens"),
        ("max_length", lambda sample: packed_length(sample.responses, 0x7FFF, 4), -1, "too long for a row"),
    ],
)
def test_filters(encoder: ChatEncoder, name: str, at_limit: Any, beyond: float, reason: str) -> None:
    limit = at_limit(encoded(encoder, TWO_TURNS))
    encoder.limits = replace(LIMITS, **{name: limit})
    assert isinstance(encoder.encode(TWO_TURNS), Sample)
    encoder.limits = replace(LIMITS, **{name: beyond if beyond > 0 else limit + beyond})
    found = encoder.encode(TWO_TURNS, 1)
    assert isinstance(found, Broken)
    assert found.reason == reason
    assert str(getattr(encoder.limits, name)) in found.detail
    samples = ChatSamples(mapped([chat(*ANSWERED)]), encoder)
    assert len(samples) == 1, "short chats without pictures pass"


def test_truncation_fits_chats_into_a_row(encoder: ChatEncoder) -> None:
    whole = encoded(encoder, TWO_TURNS)
    measured = encoder.measure(TWO_TURNS)
    start, size = whole.responses[0][0], LIMITS.block_size
    least = packed_length([(start, start + size)], len(whole.input_ids), size)
    most = packed_length(whole.responses, len(whole.input_ids), size)
    for max_length in range(least, most + 1):
        encoder.limits = replace(LIMITS, max_length=max_length, overlong="truncate")
        found = encoded(encoder, TWO_TURNS)
        columns = packed_length(found.responses, len(found.input_ids), size)
        assert columns <= max_length
        assert torch.equal(found.input_ids, whole.input_ids[: len(found.input_ids)])
        assert PackingCollator(encoder)([found]).input_ids.shape == (1, columns)
    assert_same(found, whole)
    assert encoder.measure(TWO_TURNS) == measured, "what is cached does not depend on the limits"
    encoder.limits = replace(encoder.limits, max_length=least - 1)
    broken = encoder.encode(TWO_TURNS)
    assert isinstance(broken, Broken)
    assert broken.detail == f"its first block alone takes {least} columns, above `max_length` {least - 1}"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"overlong": "cut"}, "`overlong` must be 'drop' or 'truncate', got 'cut'"),
        ({"max_length": 0}, "`max_length` must be at least 1, got 0"),
        ({"max_aspect_ratio": 0.5}, "`max_aspect_ratio` must be at least 1, got 0.5"),
    ],
)
def test_limits_that_nothing_meets_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LIMITS, **limits)


# --- files and data sets ---------------------------------------------------------------------------------------------

NUM_CHATS = 6


def written_chats(folder: Path) -> list[dict[str, Any]]:
    """Chats with pictures beside them: every second one has a plain string where others have items."""
    chats = []
    for number in range(NUM_CHATS):
        (folder / "pictures").mkdir(exist_ok=True)
        path = tiny.draw_scene(folder / f"pictures/{number}.png", (64 + 32 * number, 64), number)
        question = user(image(str(path.relative_to(folder))), "what is it?")
        if number % 2:
            question = {"role": "user", "content": "what is it?"}
        chats.append(chat({"role": "system", "content": "see"}, question, assistant(f"it is {number}")))
    return chats


def as_jsonl(folder: Path, chats: list[dict[str, Any]]) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in chats), encoding="utf-8")
    return path


def as_jsonl_folder(folder: Path, chats: list[dict[str, Any]]) -> Path:
    as_jsonl(folder, chats[:4]).rename(folder / "1.jsonl")
    as_jsonl(folder, chats[4:]).rename(folder / "2.jsonl")
    return folder


def as_table(folder: Path, chats: list[dict[str, Any]]) -> datasets.Dataset:
    """With the bytes of the pictures in a column, and items that all have the same members."""
    rows = []
    for each in chats:
        pictures, messages = [], []
        for message in each["messages"]:
            items = [text(message["content"])] if isinstance(message["content"], str) else message["content"]
            pictures += [{"bytes": (folder / item["image"]).read_bytes()} for item in items if "image" in item]
            content = [{"type": item["type"], "text": item.get("text")} for item in items]
            messages.append({"role": message["role"], "content": content})
        rows.append({"messages": messages, "images": pictures})
    item = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": [item]}
    features = datasets.Features({"messages": [message], "images": datasets.Sequence(datasets.Image())})
    return datasets.Dataset.from_list(rows, features=features)


def as_parquet(folder: Path, chats: list[dict[str, Any]]) -> Path:
    table, target = as_table(folder, chats), folder / "parquet"
    target.mkdir()
    for shard in range(2):
        table.shard(2, shard, contiguous=True).to_parquet(target / f"part-{shard}.parquet")
    return target


def as_saved(folder: Path, chats: list[dict[str, Any]]) -> Path:
    as_table(folder, chats).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder: Path, chats: list[dict[str, Any]]) -> Path:
    table = as_table(folder, chats)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "splits")
    return folder / "splits"


FORMS: list[Callable[[Path, list[dict[str, Any]]], Path]] = [
    as_jsonl,
    as_jsonl_folder,
    as_parquet,
    as_saved,
    as_saved_splits,
]


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", FORMS)
def test_every_source_gives_the_same_samples(
    write: Callable[..., Path], streaming: bool, encoder: ChatEncoder, tmp_path: Path
) -> None:
    folder = tmp_path / "a [b] *"  # what would mean other names in a pattern
    folder.mkdir()
    chats = written_chats(folder)
    encoder.media_folder = folder
    expected = [encoded(encoder, each, number) for number, each in enumerate(chats)]
    source = write(folder, chats)
    reader = ChatEncoder(encoder.processor, CONFIG, LIMITS, data.media_folder_of(source))
    opened = open_chats(source, streaming=streaming)
    if streaming:
        stream = stream_chats(opened, reader, buffer_size=1)
        found = [encoded(reader, each, number) for number, each in enumerate(stream)]
    else:
        samples = ChatSamples(opened, reader)
        found = [samples[number] for number in range(len(samples))]
        assert samples.lengths == [packed_length(each.responses, len(each.input_ids), 4) for each in expected]
        assert samples.indices == list(range(NUM_CHATS))
    assert len(found) == NUM_CHATS
    for sample, other in zip(found, expected, strict=True):
        assert_same(sample, other)


def test_data_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / "mixed" / name).touch()
    (tmp_path / "nothing.jsonl").touch()
    (tmp_path / "cut.jsonl").write_text(json.dumps(chat(*ANSWERED)) + '\n{"messages": [\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    datasets.DatasetDict(test=mapped([chat(*ANSWERED)])).save_to_disk(tmp_path / "test_only")
    for name, message in (
        ("missing.jsonl", "there is no file or folder .*missing.jsonl"),
        ("missing", "there is no file or folder .*missing"),
        ("empty", "it has no files"),
        ("nothing.jsonl", "nothing.jsonl is empty"),
        ("cut.jsonl", "cut.jsonl cannot be read: .*position 13"),
        ("mixed", "it has json and parquet files"),
        ("texts.jsonl", "texts.jsonl has no column `messages`, only text"),
        ("test_only", "has no split 'train', only test"),
    ):
        with pytest.raises(ValueError, match=message):
            open_chats(tmp_path / name)


def test_broken_chats_are_counted_named_and_skipped(
    encoder: ChatEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chats = written_chats(tmp_path)
    chats[1:1] = [chat(user("a")) for _ in range(7)]
    chats.append(chat(user(image("missing.png")), assistant("a")))
    (tmp_path / "half.png").write_bytes(bytes_of(tiny.draw((96, 64)))[:-200])
    chats.append(chat(user(image("half.png")), assistant("a")))
    samples = ChatSamples(open_chats(as_jsonl(tmp_path, chats)), encoder)
    assert samples.indices == [0, *range(8, 13), 14]
    assert str(samples.skipped) == "7 no assistant turn, 1 missing image"
    lines = [record.getMessage() for record in caplog.records if record.name == data.__name__]
    why = "no assistant turn (the roles are ['user'])"
    assert lines[:2] == [f"skipped chat {index} (of 0, 1, ...): {why}" for index in (1, 2)]
    assert len(lines) == data.NUM_NAMED + 2
    assert lines[-2] == f"skipped chat 13 (of 0, 1, ...): missing image ({tmp_path / 'missing.png'})"
    assert lines[-1] == "skipped 8 of 15 chats: 7 no assistant turn, 1 missing image"
    late = samples[6]
    assert isinstance(late, Broken)
    assert (late.sample_id, late.reason) == (14, "broken image")
    assert samples[1].sample_id == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_a_usable_chat_stops_before_training(
    streaming: bool, encoder: ChatEncoder, tmp_path: Path
) -> None:
    opened = open_chats(as_jsonl(tmp_path, [chat(user("a"))] * 3), streaming=streaming)
    with pytest.raises(ValueError, match=r"none of the (first )?3 chats .*can be used: 3 no assistant turn"):
        stream_chats(opened, encoder) if streaming else ChatSamples(opened, encoder)


@pytest.mark.process
def test_measuring_is_shared_among_processes_and_kept(
    encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = as_jsonl(tmp_path, written_chats(tmp_path))
    first = ChatSamples(open_chats(source), encoder, num_proc=2)
    assert first.lengths == ChatSamples(mapped(list(open_chats(source))), encoder).lengths
    monkeypatch.setattr(ChatEncoder, "measure", lambda self, given: pytest.fail("it was measured before"))
    again = ChatSamples(open_chats(source), encoder, num_proc=2)
    assert (again.indices, again.lengths) == (first.indices, first.lengths)
    larger_blocks = ChatEncoder(encoder.processor, CONFIG, replace(LIMITS, block_size=8), tmp_path)
    expected = [packed_length(first[number].responses, 0x7FFF, 8) for number in range(NUM_CHATS)]  # type: ignore[union-attr]
    assert ChatSamples(open_chats(source), larger_blocks, num_proc=2).lengths == expected
    monkeypatch.undo()
    fewer_pixels = ChatEncoder(limit_pixels(encoder.processor, None, 4096), CONFIG, LIMITS, tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert sum(ChatSamples(open_chats(source), fewer_pixels).lengths) < sum(first.lengths)


def test_measures_that_were_cut_short_are_made_again(
    encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = as_jsonl(tmp_path, written_chats(tmp_path))
    first = ChatSamples(open_chats(source), encoder)
    kept = [Path(file["filename"]) for file in first._measured(None).cache_files]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:300])
    again = ChatSamples(open_chats(source), encoder)
    assert (again.indices, again.lengths) == (first.indices, first.lengths)
    assert "measured chats in the cache of `datasets` cannot be read" in caplog.text


def test_a_file_that_came_since_is_found(encoder: ChatEncoder, tmp_path: Path) -> None:
    chats = [*written_chats(tmp_path), chat(user(image("late.png")), assistant("b"))]
    source = as_jsonl(tmp_path, chats)
    assert ChatSamples(open_chats(source), encoder).skipped.counts == {"missing image": 1}
    PICTURES[0].save(tmp_path / "late.png")
    found = ChatSamples(open_chats(source), encoder)
    assert (len(found), found.skipped.counts) == (NUM_CHATS + 1, {})
    assert isinstance(found[NUM_CHATS], Sample)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_samples_and_names_the_broken_ones(encoder: ChatEncoder) -> None:
    broken = Broken(1, "missing image", "x.png")
    chats = [chat(user(image(PICTURES[0])), assistant("a")), TWO_TURNS]
    batch = PackingCollator(encoder, pad_to_multiple_of=16)([encoded(encoder, chats[0], 8), broken, chats[1], chats[0]])
    assert batch.broken == [broken]
    assert batch.sample_ids.tolist()[0] == 8
    assert batch.sample_ids[1] != batch.sample_ids[2], "chats of a stream are numbered by what they hold"
    assert batch.input_ids.shape[1] % 16 == 0
    assert batch.visual_inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 3
    moved = batch.to("cpu")
    assert moved.broken == [broken]
    assert moved.layout().sample.max() == 2


@pytest.mark.parametrize("batch", [[], [Broken(0, "no assistant turn", "")], [chat(user("a"))]])
def test_a_batch_without_samples_trains_nothing(encoder: ChatEncoder, batch: list[Any]) -> None:
    packed = PackingCollator(encoder)(batch)
    assert packed.input_ids.tolist() == [[IDS.pad_token_id]]
    assert packed.sample.tolist() == [[-1]]
    assert not packed.noisy.any()
    assert len(packed.broken) == len(batch)


@pytest.mark.parametrize("given", [[], [chat(*ANSWERED)]])
def test_a_batch_without_pictures_carries_a_blank_one_for_a_trained_vision_tower(
    encoder: ChatEncoder, given: list[Any]
) -> None:
    packed = PackingCollator(encoder, needs_vision=True)(given)
    assert (packed.visual_index == -1).all()
    model = BardVLForConditionalGeneration(CONFIG)
    features = model.model.get_image_features(
        packed.visual_inputs["pixel_values"], packed.visual_inputs["image_grid_thw"]
    )
    embeds = features[0] if isinstance(features, tuple) else features.pooler_output
    assert torch.cat(list(embeds)).shape == (1, CONFIG.text_config.hidden_size)
    assert PackingCollator(encoder, needs_vision=False)(given).visual_inputs == {}
    clip = chat(user({"type": "video", "video": tiny.draw_frames(2)}), assistant("a"))
    assert set(PackingCollator(encoder)([clip]).visual_inputs) == {"pixel_values_videos", "video_grid_thw"}


# --- workers and processes -------------------------------------------------------------------------------------------


def loaded(dataset: Any, encoder: ChatEncoder, **options: Any) -> list[Any]:
    return list(DataLoader(dataset, batch_size=2, collate_fn=PackingCollator(encoder), **options))


@pytest.mark.parametrize(("start_method", "num_workers"), [("fork", 2), ("spawn", 1)])
@pytest.mark.process
def test_workers_give_the_batches_of_one_process(
    encoder: ChatEncoder, tmp_path: Path, start_method: str, num_workers: int
) -> None:
    samples = ChatSamples(open_chats(as_jsonl(tmp_path, written_chats(tmp_path))), encoder)
    alone = loaded(samples, encoder)
    shared = loaded(samples, encoder, num_workers=num_workers, multiprocessing_context=start_method)
    assert [batch.sample_ids.tolist() for batch in shared] == [[0, 1], [2, 3], [4, 5]]
    for batch, other in zip(shared, alone, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids)
        assert torch.equal(batch.visual_inputs["pixel_values"], other.visual_inputs["pixel_values"])


def ids_of(stream: Any, encoder: ChatEncoder, **options: Any) -> list[int]:
    return [each for batch in loaded(stream, encoder, **options) for each in batch.sample_ids.tolist()]


@pytest.mark.process
def test_a_stream_is_split_among_processes_and_workers(encoder: ChatEncoder, tmp_path: Path) -> None:
    source = as_jsonl_folder(tmp_path, written_chats(tmp_path))
    stream = stream_chats(open_chats(source, streaming=True), encoder, seed=1)
    everything = Counter(ids_of(stream, encoder))
    assert len(everything) == NUM_CHATS, "every chat has a number of its own"
    assert Counter(ids_of(stream, encoder, num_workers=2)) == everything
    for num_processes in (2, 3):
        shares = [ids_of(split_dataset_by_node(stream, rank, num_processes), encoder) for rank in range(num_processes)]
        assert sum(map(Counter, shares), Counter()) == everything
        assert min(map(len, shares)) > 0


def test_the_order_of_a_stream_follows_seed_and_epoch(encoder: ChatEncoder, tmp_path: Path) -> None:
    source = as_jsonl(tmp_path, written_chats(tmp_path))
    orders = []
    for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1)):
        stream = stream_chats(open_chats(source, streaming=True), encoder, seed=seed)
        stream.set_epoch(epoch)
        orders.append(ids_of(stream, encoder))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(orders[3])


def test_a_stream_goes_on_past_broken_chats(encoder: ChatEncoder, tmp_path: Path) -> None:
    chats = written_chats(tmp_path)
    chats[2:2] = [chat(user("a")), chat(user(image("missing.png")), assistant("b"))]
    stream = stream_chats(open_chats(as_jsonl(tmp_path, chats), streaming=True), encoder)
    batches = loaded(stream, encoder)
    assert sum(len(batch.sample_ids) for batch in batches) == NUM_CHATS
    skipped = data.SkippedChats()
    for batch in batches:
        skipped.add(batch.broken)
    assert skipped.counts == {"no assistant turn": 1, "missing image": 1}


def test_an_encoder_that_has_been_used_can_be_pickled(encoder: ChatEncoder) -> None:
    sample = encoded(encoder, TWO_TURNS)
    assert_same(encoded(pickle.loads(pickle.dumps(encoder)), TWO_TURNS), sample)


def test_sources_are_mixed_by_their_weights(tmp_path: Path, encoder: ChatEncoder) -> None:
    sources = [ChatSamples(mapped([chat(*ANSWERED)] * size), encoder) for size in (3, 4, 8)]
    mixture = Mixture(sources, [1, 2.5, 0.25], seed=5)
    counts = Counter(mixture.indices)
    assert len(mixture) == 3 + (8 + 2) + 2
    assert [counts[0, number] for number in range(3)] == [1, 1, 1]
    assert sorted(counts[1, number] for number in range(4)) == [2, 2, 3, 3]
    assert sorted(counts[2, number] for number in range(8)) == [0] * 6 + [1] * 2
    ids = {mixture[entry].sample_id: mixture.indices[entry] for entry in range(len(mixture))}
    assert ids.keys() <= {*range(15)}
    assert len({*ids.values()}) == len(ids) == 3 + 4 + 2
    assert mixture.lengths == [mixture.sources[place].lengths[number] for place, number in mixture.indices]
    assert Mixture(sources, [1, 2.5, 0.25], seed=5).indices == mixture.indices
    with pytest.raises(ValueError, match=r"0.1 leaves nothing of the 3 chats of source 0"):
        Mixture(sources, [0.1, 1, 1], seed=5)
