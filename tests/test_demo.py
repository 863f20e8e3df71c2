"""The demo page answers an uploaded picture as `generate` does, shows drafts on the way, and stops when told."""

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
from bard_vl.app.session import Session, build_settings
from bard_vl.viewer.demo import answer_in_steps, build_page, serve
from browser import chromium
from fresh import convert
from PIL import Image
from tiny import IDS, draw_scene, write_qwen3vl

pytestmark = pytest.mark.process

LONG, PATIENCE = 60, 180_000  # tokens; milliseconds, for machines that have other things to do
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
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#ask").wait_for()
        yield page
    demo.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scene(tmp_path_factory.mktemp("photo") / "photo.png")


def text_of_generate(session: Session, photo: Path | None, prompt: str, **settings: Any) -> str:
    content: list[dict[str, Any]] = [] if photo is None else [{"type": "image", "image": str(photo)}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = session.processor.apply_chat_template(messages, **options)
    ids = session.model.generate(**inputs, eos_token_id=[], **{"max_new_tokens": LONG, **settings})
    return session.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def upload(page: Any, photo: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.locator("#picture img").wait_for()


def test_an_uploaded_picture_is_answered_as_by_generate(page: Any, session: Paced, photo: Path) -> None:
    upload(page, photo)
    page.locator("#prompt textarea").fill("What is it?")
    session.pace = 0.05
    page.locator("#ask").click()
    page.locator("#answer .draft").wait_for()  # on the way
    session.pace = 0.0
    page.locator("#answer .took").wait_for()
    assert page.locator("#answer .draft").count() == 0
    text = page.locator("#answer .text").text_content()
    assert text == text_of_generate(session, photo, "What is it?")
    assert page.locator("#answer .took").text_content().startswith(f"{LONG} tokens in ")
    # The player below plays the steps.
    player = page.frame_locator("#player iframe")
    player.locator("#scrubber").wait_for()
    assert player.locator("#num-tokens").text_content() == str(LONG)
    last = player.locator("#scrubber").get_attribute("max")
    player.locator("#scrubber").fill(last)
    assert player.locator("#status").text_content().startswith(f"Step {last} of {last} · ")
    assert player.locator("#answer .token").count() == LONG


def test_the_stop_button_keeps_what_was_written(page: Any, session: Paced, photo: Path) -> None:
    page.locator("#prompt textarea").fill("What is there?")
    shown = photo if page.locator("#picture img").count() else None
    session.pace = 0.2
    page.locator("#ask").click()
    page.locator("#answer .draft").wait_for()
    page.locator("#answer .text", has_text=re.compile(rf"[^\s{CUT}]")).wait_for()
    running = [thread for thread in threading.enumerate() if thread.name == "bard-vl answer"]
    page.locator("#stop").click()
    written = page.locator("#answer .text").text_content()
    deadline = time.monotonic() + PATIENCE / 1000
    while any(thread.is_alive() for thread in running):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    session.pace = 0.0
    assert len(running) == 1
    page.wait_for_timeout(500)  # for whatever the page might still be told
    kept = page.locator("#answer .text").text_content().rstrip(CUT)
    assert kept.startswith(written.rstrip(CUT))
    whole = text_of_generate(session, shown, "What is there?")
    assert whole.startswith(kept)
    assert 0 < len(kept) < len(whole)
    assert page.locator("#answer .took").count() == 0


def test_settings_are_used(session: Session, photo: Path) -> None:
    with Image.open(photo) as picture:
        *_, (answer, player) = answer_in_steps(session, picture, "What?", "margin", 0.2, 3, 20, 0.0)
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
        *_, (answer, _) = answer_in_steps(own, None, "What?", "margin", 0.2, 3, 20, temperature)
        wanted = {"remasking_strategy": "margin", "confidence_threshold": 0.2, "denoising_steps": 3}
        sampling = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
        assert html.escape(text_of_generate(session, None, "What?", **wanted, **sampling)) in answer


def test_what_goes_wrong_is_said(page: Any, session: Session) -> None:
    page.locator("#prompt textarea").fill(" ")
    page.locator("#ask").click()
    page.locator("#answer .error").wait_for()
    assert page.locator("#answer .error").text_content() == "Ask something."
    *_, (answer, player) = answer_in_steps(session, None, "What?", "margin", 2.0, 3, 20, 0.0)
    assert "`confidence_threshold` must be a number in [0.0, 1.0], got 2.0" in answer
    assert player == ""


def test_nobody_waiting_stops_the_work(session: Session) -> None:
    before = threading.active_count()
    states = answer_in_steps(session, None, "What?", "low_confidence_static", 0.9, 4, LONG, 0.0)
    for _ in range(2):
        next(states)
    states.close()
    assert threading.active_count() == before


def test_texts_are_text(session: Session) -> None:
    *_, (answer, player) = answer_in_steps(session, None, '"><b id=injected>', "margin", 0.2, 3, 8, 0.0)
    assert "<b id=injected>" not in answer + player
