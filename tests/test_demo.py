"""The demo page answers questions about a picture as `generate` does, shows drafts on the way, and stops when told."""

import html
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from bard_vl.app.checkpoints import PICTURES, QUESTIONS
from bard_vl.app.session import Session, build_settings
from bard_vl.viewer.demo import answer_in_steps, build_page, files_of, serve
from browser import chromium
from fresh import convert
from PIL import Image
from tiny import IDS, draw_scene, write_qwen3vl

pytestmark = pytest.mark.process

LONG, PATIENCE = 60, 180_000  # tokens; milliseconds, for machines that have other things to do
BUTTONS = ("ask", "stop", "restart", "download-page", "download-gif")
WINDOW = {"width": 1200, "height": 800}  # pixels
CUT = "\N{REPLACEMENT CHARACTER}"  # stands for a character whose last bytes are to come


class Paced(Session):
    """Rests `pace` seconds at every undecided position, so that there is time to look at drafts."""

    pace = 0.0

    def ask(self, *messages: Any, **arguments: Any) -> Any:
        def rest(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            time.sleep(self.pace)
            return scores

        return super().ask(*messages, logits_processor=[rest], **arguments)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Paced:
    folder = tmp_path_factory.mktemp("demo")
    write_qwen3vl(folder / "qwen")
    bard = convert(folder / "qwen", folder / "bard", "--block-size", 4, "--mask-token-id", IDS["small"].mask_token_id)
    return Paced(str(bard), build_settings({"max_new_tokens": LONG}, ["eos_token_id=[]"]))


@pytest.fixture(scope="module")
def page(session: Session) -> Iterator[Any]:
    demo = build_page(session)
    address = serve(demo, "127.0.0.1", 0, wait=False)
    with chromium() as browser:
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#ask").wait_for()
        yield page
    demo.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scene(tmp_path_factory.mktemp("photo") / "photo.png")


def text_of_generate(
    session: Session, photo: Path | None, prompt: str, earlier: tuple[tuple[str, str], ...] = (), **settings: Any
) -> str:
    content: list[dict[str, Any]] = [] if photo is None else [{"type": "image", "image": str(photo)}]
    said = [(role, text) for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in (*said, ("user", prompt))
    ]
    messages[0]["content"][:0] = content
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = session.processor.apply_chat_template(messages, **options)
    ids = session.model.generate(**inputs, eos_token_id=[], **{"max_new_tokens": LONG, **settings})
    return session.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def upload(page: Any, photo: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.locator("#picture img").wait_for()


def last_turn(states: Any) -> tuple[str, Any]:
    """The reply and the player that an answer ends with, as HTML."""
    *_, (_, chat, _, player) = states
    return chat[-1]["content"].value, player


def test_an_uploaded_picture_is_answered_as_by_generate(page: Any, session: Paced, photo: Path) -> None:
    upload(page, photo)
    page.locator("#prompt textarea").fill("What is it?")
    session.pace = 0.05
    page.locator("#ask").click()
    page.locator("#chat .draft").wait_for()  # on the way
    session.pace = 0.0
    page.locator("#chat .took").wait_for()
    assert page.locator("#chat .draft").count() == 0
    text = page.locator("#chat .answer .text").text_content()
    assert text == text_of_generate(session, photo, "What is it?")
    assert page.locator("#chat .took").text_content().startswith(f"{LONG} tokens in ")
    # The player below plays the steps.
    player = page.frame_locator("#player iframe")
    player.locator("#scrubber").wait_for()
    assert player.locator("#num-tokens").text_content() == str(LONG)
    last = player.locator("#scrubber").get_attribute("max")
    player.locator("#scrubber").fill(last)
    assert player.locator("#status").text_content().startswith(f"Step {last} of {last} · ")
    assert player.locator("#answer .token").count() == LONG
    # Its frame is as high as it is itself, or as the window.
    height = min(player.locator("body").evaluate("body => body.offsetHeight"), WINDOW["height"])
    page.wait_for_function("height => document.querySelector('#player iframe').offsetHeight === height", arg=height)
    # On a telephone no button is of two lines.
    page.set_viewport_size({"width": 390, "height": 844})
    heights = {page.locator(f"#{name}").evaluate("button => button.offsetHeight") for name in BUTTONS}
    assert len(heights) == 1
    page.set_viewport_size(WINDOW)
    # Both can be downloaded.
    for name, start in (("page", b"<!doctype html>"), ("gif", b"GIF89a")):
        with page.expect_download() as download:
            page.locator(f"#download-{name}").click()
        assert download.value.path().read_bytes()[: len(start)].lower() == start.lower()
    # Enter sends the next question, about the same picture.
    page.locator("#prompt textarea").fill("What else?")
    page.locator("#prompt textarea").press("Enter")
    page.locator("#chat .took").nth(1).wait_for()
    assert page.locator("#prompt textarea").input_value() == ""
    followed = text_of_generate(session, photo, "What else?", earlier=(("What is it?", text),))
    assert page.locator("#chat .answer .text").all_text_contents() == [text, followed]
    assert page.locator("#chat .took").nth(1).text_content().endswith(" of them encoded")
    # One of the pictures to try begins another conversation.
    before = page.locator("#picture img").get_attribute("src")
    page.locator("#gallery img").last.click()
    page.wait_for_function("before => document.querySelector('#picture img')?.src !== before", arg=before)
    page.locator("#prompt textarea").fill("What is it?")
    page.locator("#prompt textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat .answer').length === 1")
    page.locator("#chat .took").wait_for()
    shown = sorted(PICTURES.glob("*.png"))[-1]
    assert page.locator("#chat .answer .text").text_content() == text_of_generate(session, shown, "What is it?")
    page.locator("#restart").click()
    page.locator("#chat .answer").wait_for(state="detached")


def test_the_stop_button_keeps_what_was_written(page: Any, session: Paced, photo: Path) -> None:
    page.locator("#prompt textarea").fill("What is there?")
    shown = sorted(PICTURES.glob("*.png"))[-1] if page.locator("#picture img").count() else None
    session.pace = 0.2
    page.locator("#ask").click()
    page.locator("#chat .draft").wait_for()
    page.locator("#chat .answer .text", has_text=re.compile(rf"[^\s{CUT}]")).wait_for()
    running = [thread for thread in threading.enumerate() if thread.name == "bard-vl answer"]
    page.locator("#stop").click()
    written = page.locator("#chat .answer .text").text_content()
    deadline = time.monotonic() + PATIENCE / 1000
    while any(thread.is_alive() for thread in running):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    session.pace = 0.0
    assert len(running) == 1
    page.wait_for_timeout(500)  # for whatever the page might still be told
    kept = page.locator("#chat .answer .text").text_content().rstrip(CUT)
    assert kept.startswith(written.rstrip(CUT))
    whole = text_of_generate(session, shown, "What is there?")
    assert whole.startswith(kept)
    assert 0 < len(kept) < len(whole)
    assert page.locator("#chat .took").count() == 0


def test_settings_are_used(session: Session, photo: Path) -> None:
    with Image.open(photo) as picture:
        answer, player = last_turn(answer_in_steps(session, None, picture, "What?", "margin", 0.2, 3, 20, 0.0))
    wanted = {"remasking_strategy": "margin", "confidence_threshold": 0.2, "denoising_steps": 3, "max_new_tokens": 20}
    assert html.escape(text_of_generate(session, photo, "What?", **wanted)) in answer
    assert "iframe" in player


@pytest.mark.parametrize(
    "stated",
    [
        {"block_size": 1},
        {"max_new_tokens": 2048},
        {"max_new_tokens": 2, "denoising_steps": 1},
        {"temperature": 0.7},
        {"temperature": 3.0},
    ],
)
def test_stated_settings_are_within_the_controls(session: Session, stated: dict[str, Any]) -> None:
    page = build_page(Session(session.name, build_settings(stated)))
    sliders = [block for block in page.blocks.values() if isinstance(block, gr.Slider)]
    assert len(sliders) == 4
    for slider in sliders:
        assert slider.minimum < slider.maximum
        assert slider.preprocess(slider.value) == slider.value
    assert set(stated.values()) - {1} <= {slider.value for slider in sliders}


@pytest.mark.parametrize(("stated", "shown"), [("do_sample=true", 1.0), ("do_sample=false", 0.0)])
def test_the_temperature_shown_is_the_one_used(session: Session, stated: str, shown: float) -> None:
    own = Session(session.name, build_settings({}, [stated, "seed=3", "eos_token_id=[]"]))
    (control,) = [
        block for block in build_page(own).blocks.values() if str(getattr(block, "label", "")).startswith("Temperature")
    ]
    assert control.value == shown
    for temperature in (0.0, 2.0):
        answer, _ = last_turn(answer_in_steps(own, None, None, "What?", "margin", 0.2, 3, 20, temperature))
        wanted = {"remasking_strategy": "margin", "confidence_threshold": 0.2, "denoising_steps": 3}
        sampling = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
        assert html.escape(text_of_generate(session, None, "What?", **wanted, **sampling)) in answer


def test_what_goes_wrong_is_said(page: Any, session: Session) -> None:
    page.locator("#prompt textarea").fill(" ")
    page.locator("#ask").click()
    page.locator("#chat .error").wait_for()
    assert page.locator("#chat .error").text_content() == "Ask something."
    states = list(answer_in_steps(session, None, None, "What?", "margin", 2.0, 3, 20, 0.0))
    assert "`confidence_threshold` must be a number in [0.0, 1.0], got 2.0" in last_turn(states)[0]
    talk, _, _, player = states[0]
    assert player == ""
    assert not talk.conversation.messages
    assert [button.visible for button in next(files_of(talk))] == [False, False]


def test_nobody_waiting_stops_the_work(session: Session) -> None:
    before = threading.active_count()
    states = answer_in_steps(session, None, None, "What?", "low_confidence_static", 0.9, 4, LONG, 0.0)
    for _ in range(2):
        next(states)
    states.close()
    assert threading.active_count() == before


def test_texts_are_text(session: Session) -> None:
    *_, (_, chat, _, player) = answer_in_steps(session, None, None, '"><b id=injected>', "margin", 0.2, 3, 8, 0.0)
    assert "<b id=injected>" not in "".join([turn["content"].value for turn in chat] + [player])


def test_the_small_example_says_what_it_knows_and_answers_each_question_alone() -> None:
    example = Session(None)
    page = build_page(example)
    texts = [str(block.value) for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    assert any("It knows pictures like those to try, and the four questions" in text for text in texts)
    samples = [
        sample[0] for block in page.blocks.values() if isinstance(block, gr.Dataset) for sample in block.raw_samples
    ]
    assert samples == [*map(str, sorted(PICTURES.glob("*.png"))), *QUESTIONS]
    talk, answers = None, []
    with Image.open(samples[0]) as picture:
        for question in QUESTIONS[:2]:
            *_, (_, chat, _, _) = states = list(
                answer_in_steps(example, talk, picture, question, "low_confidence_dynamic", 0.9, 32, 64, 0.0)
            )
            talk = states[0][0]
            answers.append(chat[-1]["content"].value)
    assert len(talk.turns) == 4
    assert "at b4 a small black circle" in answers[0]
    assert "The cell b4 of the picture holds a small black circle" in answers[1]
