"""Denoising made visible: recordings say what happened, the page plays it in a browser, pictures show it."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.app.boxes import COLOURS, Thing
from bard_vl.viewer import RecordedStep, Recording, html_of, write_gif, write_html, write_png
from bard_vl.viewer.picture import EARLY, LATE, MARGIN, OPEN, RING, SOFT, WIDTH, Drawing, load_font, mixed, words
from bard_vl.viewer.recording import spell
from browser import chromium
from PIL import Image, ImageChops, ImageColor, ImageFont, ImageStat
from tiny import IDS, draw, fill_weights, qwen3vl_config, write_processor_files

SIZE, MASK = 6, IDS["small"].mask_token_id


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    processor = BardVLProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("processor")))
    processor.mask_token_id = MASK
    return processor


@pytest.fixture(scope="module")
def output() -> Any:
    """Three rows of a model that masks its tokens again, one of them ended by an EOS."""
    config = qwen3vl_config() | {"model_type": "bard_vl", "mask_token_id": MASK, "block_size": SIZE}
    model = BardVLForConditionalGeneration(BardVLConfig(**config)).eval()
    fill_weights(model, seed=5)
    ids = torch.tensor([[65, 66, 67, 68], [70, 71, 72, 73], [300, 301, 302, 303]])
    settings = {"revision": "remask", "revision_threshold": 0.6, "confidence_threshold": 0.5, "max_new_tokens": 20}
    free = model.generate(ids, eos_token_id=[], **settings)
    return model.generate(
        ids, eos_token_id=int(free[1, 4 + 8]), output_history=True, return_dict_in_generate=True, **settings
    )


# Recordings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(3))
def test_a_recording_is_what_generate_reports(output: Any, processor: Any, row: int) -> None:
    recording = Recording.of(output, processor, row)
    history = output.history[row]
    response = output.sequences[row, 4:].tolist()
    assert (recording.block_size, len(recording.steps)) == (SIZE, len(history))
    assert recording.num_forwards == len(history), "without chunks every forward is a step"
    assert recording.tokens_per_forward == pytest.approx(recording.num_tokens / len(history))
    assert response[recording.num_tokens :] == [response[-1]] * (len(response) - recording.num_tokens)
    assert recording.text == processor.decode(response[: recording.num_tokens], skip_special_tokens=True)
    for step, reported in zip(recording.steps, history, strict=True):
        assert [text is None for text in step.texts] == (reported.ids == MASK).tolist()
        assert step.committed == reported.committed.nonzero()[:, 0].tolist()
        assert step.revised == reported.revised.nonzero()[:, 0].tolist()
        assert step.confidence == pytest.approx(reported.confidence.tolist(), abs=1e-4)
    assert any(step.revised for step in recording.steps)


def test_the_rows_of_a_batch_end_apart(output: Any, processor: Any) -> None:
    lengths = [Recording.of(output, processor, row).num_tokens for row in range(3)]
    assert lengths[1] <= 9 < lengths[0] == 20


def test_what_each_position_holds_and_since_when(output: Any, processor: Any) -> None:
    recording = Recording.of(output, processor, 0)
    confidences = output.confidences[0].tolist()
    for block, index in recording.last_steps().items():
        steps = [step for step in recording.steps if step.block == block]
        for offset, (position, number, sure) in enumerate(recording.decided(index)):
            assert position == block * SIZE + offset
            changed = [n for n, step in enumerate(steps, 1) if offset in {*step.committed, *step.revised}]
            assert number == changed[-1]
            if position < len(confidences):
                assert sure == pytest.approx(confidences[position], abs=1e-4)
    first = recording.decided(0)
    assert [number for _, number, _ in first] == [int(text is not None) for text in recording.steps[0].texts]


def test_characters_of_several_tokens_are_whole(processor: Any) -> None:
    ids = processor.tokenizer("a 🙂é", add_special_tokens=False)["input_ids"]
    texts = spell(ids, MASK, processor.tokenizer.decode)
    assert len(texts) == len(ids) > 5
    assert "".join(texts) == "a 🙂é"
    assert "\ufffd" not in "".join(texts)
    cut = spell([*ids[:-1], MASK], MASK, processor.tokenizer.decode)
    assert cut[-1] is None
    assert cut[-2] == ""


def test_a_history_is_needed(output: Any, processor: Any) -> None:
    bare = type(output)(**{name: value for name, value in output.items() if name != "history"})
    with pytest.raises(ValueError, match="output_history=True and return_dict_in_generate=True"):
        Recording.of(bare, processor)


# The page ------------------------------------------------------------------------------------------------------------

HOSTILE = '</script><script>document.title = "broken"</script><b id="injected">&amp;'


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Two blocks of four: 3 steps with a revision, then 2 with an end that cuts."""
    steps = [
        RecordedStep(0, ["A", None, None, None], [0], [], [0.99, 0.4, 0.2, 0.3]),
        RecordedStep(0, ["A", " rod", None, " star"], [1, 3], [], [0.99, 0.1, 0.2, 0.8]),
        RecordedStep(0, ["A", " red", " <b>", " star"], [2], [1], [0.99, 0.9, 0.5, 0.8]),
        RecordedStep(1, ["\n", None, None, "x"], [0, 3], [], [1.0, 0.3, 0.4, 0.6]),
        RecordedStep(1, ["\n", "end", "<|im_end|>", "x"], [1, 2], [], [1.0, 0.7, 0.9, 0.6]),
    ]
    return Recording(steps, 4, 7, 5, 7 / 5, "A red <b> star\nend", f"Title {HOSTILE}", f"What? {HOSTILE}", [draw()])


@pytest.fixture(scope="module")
def formed() -> Recording:
    """An answer in a form, which dictated two of its four tokens, and which places a box and a point."""
    steps = [
        RecordedStep(0, ["A", None, None, " star"], [0, 3], [], [1.0, 0.4, 0.2, 1.0]),
        RecordedStep(0, ["A", " red", " b", " star"], [1, 2], [], [1.0, 0.9, 0.5, 1.0]),
    ]
    things = [Thing("a star", (24, 32, 72, 48)), Thing("its tip", (48, 33))]
    return Recording(steps, 4, 4, 2, 2.0, "A red b star", "T", "W", [draw()], frozenset({0, 3}), things)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, recording: Recording, tmp_path: Path) -> Iterator[Any]:
    """The page, paused at its beginning; whatever it logs or asks for is in `page.noise`."""
    write_html(recording, tmp_path / "page.html")
    with browser.new_context(reduced_motion="reduce", viewport={"width": 1200, "height": 800}) as context:
        page = context.new_page()
        page.noise = []
        page.on("request", lambda request: page.noise.append(request.url))
        page.on("console", lambda message: page.noise.append(message.text))
        page.on("pageerror", lambda error: page.noise.append(str(error)))
        page.goto(f"file://{tmp_path}/page.html")
        yield page


def shown(page: Any) -> list[str]:
    return page.locator("#answer .token").all_text_contents()


def status(page: Any) -> str:
    return page.locator("#status").text_content()


def wait_for_step(page: Any, step: int) -> None:
    """Wait until this many steps are shown; the page lets no script of others look."""
    deadline = time.monotonic() + 20
    while int(page.locator("#scrubber").input_value()) < step:
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def colour(page: Any, token: int, name: str = "background-color") -> Any:
    """Red, green, blue of a token as it is painted."""
    locator = page.locator("#answer .token").nth(token)
    painted = locator.evaluate(
        """(node, name) => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
            canvas.fillStyle = getComputedStyle(node)[name];
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }""",
        name,
    )
    return tuple(painted)


@pytest.mark.process
def test_the_page_asks_for_nothing_and_complains_about_nothing(page: Any) -> None:
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    assert [noise.rpartition("/")[2] for noise in page.noise] == ["page.html"]


@pytest.mark.process
def test_the_page_shows_counts_and_the_picture(page: Any) -> None:
    counts = [page.locator(f"#{name}").text_content() for name in ("num-tokens", "num-forwards", "tokens-per-forward")]
    assert counts == ["7", "5", "1.40"]
    picture = page.locator(".images img")
    assert picture.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]") == [True, 96, 64]
    assert picture.get_attribute("alt") == "Picture 1 of the prompt"


@pytest.mark.process
def test_texts_are_text(page: Any, recording: Recording) -> None:
    assert page.locator("h1").text_content() == recording.title
    assert page.locator(".prompt").text_content() == recording.prompt
    assert page.locator("#injected").count() == 0
    assert page.title().startswith("Title </script>")


@pytest.mark.process
def test_keys_step_through_it(page: Any) -> None:
    states = [["", "", "", ""], ["A", "", "", ""], ["A", "rod", "", "star"], ["A", "red", "<b>", "star"]]
    for expected in states:
        assert shown(page)[:4] == expected
        page.keyboard.press("ArrowRight")
    assert shown(page) == ["A", "red", "<b>", "star", "⏎\n", "", "", "x"]
    assert status(page) == "Step 4 of 5 · step 1 of block 2 · 2 new"
    page.keyboard.press("Shift+ArrowLeft")
    assert status(page) == "Step 3 of 5 · step 3 of block 1 · 1 new, 1 revised"
    page.keyboard.press("Home")
    assert status(page) == "All to come"
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert shown(page)[-2:] == ["<|im_end|>", "x"]
    assert page.locator("#answer .cut").all_text_contents() == ["x"]
    page.keyboard.press("ArrowLeft")
    assert page.locator("#answer .cut").count() == 0


@pytest.mark.process
def test_the_scrubber_and_the_bars_scrub(page: Any) -> None:
    scrubber = page.locator("#scrubber")
    scrubber.fill("2")
    assert shown(page)[:4] == ["A", "rod", "", "star"]
    assert scrubber.get_attribute("aria-valuetext") == status(page) == "Step 2 of 5 · step 2 of block 1 · 2 new"
    scrubber.focus()
    page.keyboard.press("ArrowRight")
    assert status(page).startswith("Step 3 of 5")
    bars = page.locator("#bars i")
    heights = bars.evaluate_all("bars => bars.map((bar) => bar.getBoundingClientRect().height)")
    assert heights[1] > heights[0] == heights[2]
    bars.nth(4).click()
    assert scrubber.input_value() == "5"
    assert bars.evaluate_all("bars => bars.map((bar) => bar.className)") == [
        "first done",
        "done",
        "done",
        "first done",
        "now",
    ]


@pytest.mark.process
def test_it_plays_and_pauses(page: Any) -> None:
    page.locator("#speed").select_option("0.5")
    page.locator("body").press("Space")
    wait_for_step(page, 1)
    page.locator("#play").click()
    assert page.locator("#play").text_content() == "Play"
    stopped = status(page)
    page.wait_for_timeout(1000)
    assert status(page) == stopped
    page.locator("#play").click()
    assert page.locator("#play").text_content() == "Pause"
    page.locator("#speed").select_option("4")
    wait_for_step(page, 5)
    assert page.locator("#play").text_content() == "Play"


@pytest.mark.process
def test_it_starts_by_itself_unless_motion_is_unwanted(browser: Any, recording: Recording, tmp_path: Path) -> None:
    write_html(recording, tmp_path / "page.html")
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/page.html")
    wait_for_step(page, 1)
    page.close()


@pytest.mark.process
def test_colours_tell_confidence_and_marks_tell_changes(page: Any) -> None:
    page.keyboard.press("End")
    sure, revised, unsure = (colour(page, token) for token in range(3))
    assert len({sure, revised, unsure}) == 3
    assert unsure[0] > revised[0] > sure[0], "redder where less sure"
    assert page.locator("#answer .revised").all_text_contents() == ["red"]
    assert page.locator("#answer .new").all_text_contents() == ["end", "<|im_end|>"]
    assert page.locator("#answer .token").nth(1).get_attribute("title") == "step 3, 90 % sure"
    page.locator("#numbers").check()
    number = page.locator("#answer .token").nth(2).evaluate("node => getComputedStyle(node, '::before').content")
    assert number.startswith("attr(data-step)") or "3" in number


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.process
def test_confidence_is_told_without_hue_and_nothing_moves(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    boxes = (
        "boxes => boxes.map((box) => { const { x, y, width } = box.getBoundingClientRect(); return [x, y, width]; })"
    )
    places = []
    for key in ("Home", "ArrowRight", "ArrowRight", "End"):
        page.keyboard.press(key)
        places.append(page.locator("#answer .token").evaluate_all(boxes))
    assert all(place == pytest.approx(places[0][n], abs=0.3) for each in places for n, place in enumerate(each))
    bar = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--bar').trim()")
    assert all(contrast(ImageColor.getrgb(bar), colour(page, token)) >= 3 for token in range(5))
    sure = "boxes => boxes.map((box) => box.style.getPropertyValue('--sure'))"
    shares = page.locator("#answer .token").evaluate_all(sure)
    assert [float(share) for share in shares[:3]] == [0.99, 0.9, 0.5]
    page.keyboard.press(".")
    page.keyboard.press(".")
    assert page.locator("#detail").text_content() == "Token 2: step 3, 90 % sure"
    page.locator("#answer .token").nth(2).click()
    assert page.locator("#detail").text_content() == "Token 3: step 3, 50 % sure"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.process
def test_text_is_readable_in_light_and_dark(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.keyboard.press("End")
    assert (
        page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        == {
            "light": "rgb(246, 245, 242)",
            "dark": "rgb(20, 19, 18)",
        }[scheme]
    )
    for token in range(5):
        assert contrast(colour(page, token), colour(page, token, "color")) >= 4.5


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Contrast ratio of the Web Content Accessibility Guidelines."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: tuple[int, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.process
def test_dictated_tokens_and_places_are_shown(browser: Any, formed: Recording, tmp_path: Path, scheme: str) -> None:
    write_html(formed, tmp_path / "page.html")
    with browser.new_context(reduced_motion="reduce", viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        page.emulate_media(color_scheme=scheme)
        page.goto(f"file://{tmp_path}/page.html")
        assert not page.locator("#things").is_visible(), "nothing is placed before it is written"
        page.keyboard.press("ArrowRight")
        assert page.locator("#answer .dictated").all_text_contents() == ["A", "star"]
        assert status(page) == "Step 1 of 2 · step 1 of block 1 · 2 new, 2 of them dictated"
        page.keyboard.press("End")
        tokens = page.locator("#answer .token")
        assert [tokens.nth(n).get_attribute("title") for n in (0, 1)] == [
            "step 1, dictated by the form",
            "step 2, 90 % sure",
        ]
        style = "node => [getComputedStyle(node).backgroundImage.slice(0, 6), getComputedStyle(node).outlineStyle]"
        assert tokens.nth(0).evaluate(style) == ["none", "solid"], "told without hue: a frame in the place of the bar"
        assert tokens.nth(1).evaluate(style) == ["linear", "none"]
        assert page.locator(".legend .dictated").count() == 1
        # The box is over its part of the picture, whatever the picture's size on the page.
        place = (
            "node => { const { x, y, width, height } = node.getBoundingClientRect(); return [x, y, width, height]; }"
        )
        left, top, width, height = page.locator(".images img").evaluate(place)
        shown = page.locator("#things rect").evaluate(place)
        assert shown == pytest.approx([left + width / 4, top + height / 2, width / 2, height / 4], abs=4)
        assert page.locator("#things text").all_text_contents() == ["a star", "its tip"]
        assert page.locator("#things").get_attribute("aria-label") == "Placed by the answer: a star, its tip"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.process
def test_every_control_has_a_name_and_is_reached_by_keyboard(page: Any) -> None:
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("[document.activeElement.ariaLabel, document.activeElement.id].join('|')"))
    assert names == ["Step|scrubber", "|play", "One step back|back", "One step on|forth", "|speed", "|numbers"]
    for name in ("Speed", "step numbers"):
        assert page.get_by_label(name).count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    page.keyboard.press("ArrowRight")
    assert page.locator("[aria-live]").text_content() == status(page)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.process
def test_it_fits_the_width(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.keyboard.press("End")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def long_recording() -> Recording:
    """1024 tokens in blocks of 4, one per step."""
    steps = [
        RecordedStep(block, [" word"] * (place + 1) + [None] * (3 - place), [place], [], [0.9] * 4)
        for block in range(256)
        for place in range(4)
    ]
    return Recording(steps, 4, 1024, 1024, 1.0, " word" * 1024, "A long answer", "What?", [draw()])


@pytest.fixture(params=[360, 1200])
def long_page(request: Any, browser: Any, long_recording: Recording, tmp_path: Path) -> Iterator[Any]:
    """Its page, paused, in a narrow window and a wide one."""
    write_html(long_recording, tmp_path / "page.html")
    with browser.new_context(reduced_motion="reduce", viewport={"width": request.param, "height": 700}) as context:
        page = context.new_page()
        page.goto(f"file://{tmp_path}/page.html")
        yield page


def edges(page: Any, selector: str) -> Any:
    """Left, top, right and bottom in the window of the first element that is meant, in pixels."""
    found = page.locator(selector).first.evaluate("node => node.getBoundingClientRect().toJSON()")
    return [found[name] for name in ("left", "top", "right", "bottom")]


@pytest.mark.process
def test_a_long_answer_fits_the_width(long_page: Any) -> None:
    page, width = long_page, long_page.viewport_size["width"]
    for key in ("Home", "End"):
        page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    bars = page.locator("#bars i")
    left, _, right, _ = edges(page, "#player")
    widths = bars.evaluate_all("bars => bars.map((bar) => bar.getBoundingClientRect().width)")
    assert bars.last.evaluate("bar => bar.getBoundingClientRect().right") <= right
    assert left <= bars.first.evaluate("bar => bar.getBoundingClientRect().left")
    assert min(widths) >= 2
    assert page.locator("#bars .now").count() == 1
    page.keyboard.press("Home")
    steps = -(-1024 // len(widths))
    assert steps in range(1024 // len(widths), 1024 // len(widths) + 2)
    bars.nth(10).click()
    assert page.locator("#scrubber").input_value() == str(11 * steps)
    assert bars.evaluate_all("bars => bars.findIndex((bar) => bar.className === 'now')") == 10
    page.set_viewport_size({"width": 500, "height": 700})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 500
    assert page.locator("#bars .now").count() == 1


@pytest.mark.process
def test_a_long_answer_plays_in_view(long_page: Any) -> None:
    page = long_page

    def is_in_view() -> bool:
        _, top, _, bottom = edges(page, "#answer .new")
        _, floor, _, end = edges(page, "#player")
        return top >= 0 and bottom <= floor and end <= 700

    page.locator("#scrubber").fill("700")
    assert is_in_view()
    assert page.evaluate("scrollY") > 700
    page.locator("#speed").select_option("4")
    page.locator("#play").click()
    wait_for_step(page, 725)
    assert is_in_view()
    # Whoever scrolls away is left there, until told otherwise.
    page.mouse.move(100, 100)
    page.mouse.wheel(0, -20_000)
    page.wait_for_timeout(600)
    assert page.evaluate("scrollY") < 200
    assert edges(page, "#player")[3] <= 700
    page.keyboard.press("ArrowRight")
    assert is_in_view()


@pytest.mark.process
def test_without_scripts_the_answer_is_there(browser: Any, recording: Recording, tmp_path: Path) -> None:
    write_html(recording, tmp_path / "page.html")
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"file://{tmp_path}/page.html")
        assert "A red <b> star" in page.locator("#answer").inner_text()


@pytest.mark.thorough
def test_large_pictures_are_made_small(recording: Recording) -> None:
    noise = Image.effect_noise((3000, 2000), 80).convert("RGB")
    page = html_of(Recording(**{**vars(recording), "images": [noise]}))
    assert "data:image/jpeg;base64," in page
    assert len(page) < 2_000_000


# Pictures ------------------------------------------------------------------------------------------------------------


def pixel(image: Image.Image, drawing: Drawing, token: int) -> tuple[int, ...]:
    """The colour of a token's box, left of its text."""
    place, scale = drawing.places[token], image.width // WIDTH
    return image.convert("RGB").getpixel((round((place.x + place.width / 2) * scale), round((place.y + 24) * scale)))


def test_the_picture_is_shaded_by_step(recording: Recording, tmp_path: Path) -> None:
    write_png(recording, tmp_path / "a.png")
    drawing = Drawing(recording, 2)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * WIDTH, 2 * drawing.height)
        shades = [pixel(image, drawing, token) for token in range(4)]
        assert shades == [mixed(EARLY, LATE, number, 3) for number in (1, 3, 3, 2)]
        assert len(drawing.places) == recording.num_tokens, "what was cut is not drawn"


def test_pictures_tell_what_was_dictated_and_placed(formed: Recording) -> None:
    drawing = Drawing(formed, 1)
    before, after = drawing.draw(1), drawing.draw(2)
    inside = [(round(place.x + place.width / 2), round(place.y) + 21) for place in drawing.places]
    assert [after.getpixel(at) == (255, 255, 255) for at in inside] == [True, False, False, True], "no shade"
    place = drawing.places[3]
    assert after.getpixel((round(place.x + place.width / 2), round(place.y))) == ImageColor.getrgb(SOFT), "a frame"
    drawn = drawing.images[0].size
    corner = (MARGIN + drawn[0] // 4, drawing.top + drawn[1] // 2)
    marks = [image.getpixel((corner[0] + 1, corner[1] + 20)) for image in (before, after)]
    assert marks[0] == drawing.images[0].getpixel((drawn[0] // 4 + 1, drawn[1] // 2 + 20))
    assert math.dist(marks[1], ImageColor.getrgb(COLOURS[0])) < 60 < math.dist(marks[0], ImageColor.getrgb(COLOURS[0]))


def test_the_animation_has_a_frame_a_step(recording: Recording, tmp_path: Path) -> None:
    write_gif(recording, tmp_path / "a.gif")
    drawing = Drawing(recording, 1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (len(recording.steps) + 1, 0)
        durations, second = [], []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            second.append(pixel(gif, drawing, 1))
            frame = gif.convert("RGB")
            assert frame.getpixel((2, 2)) == (255, 255, 255)
            rings = ImageColor.getrgb(RING) in {colour for _, colour in frame.getcolors(10**6)}
            assert rings == (0 < number < len(recording.steps))
    assert durations == [400] * 5 + [3000]
    assert second[0] == second[1] == ImageColor.getrgb(OPEN)
    assert len(set(second)) == 3


def test_a_long_animation_leaves_steps_out(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = len(recording.steps)
    monkeypatch.setattr("bard_vl.viewer.picture.MOST_FRAMES", last // 2)
    write_gif(recording, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames <= last // 2 + 1
        gif.seek(gif.n_frames - 1)
        final = gif.convert("RGB")
    monkeypatch.undo()
    write_gif(recording, tmp_path / "b.gif")
    with Image.open(tmp_path / "b.gif") as whole:
        whole.seek(whole.n_frames - 1)
        difference = ImageChops.difference(whole.convert("RGB"), final)
    assert max(ImageStat.Stat(difference).mean) < 2


def test_nothing_overlaps_and_nothing_leaves_the_paper(output: Any, processor: Any) -> None:
    recording = Recording.of(output, processor, 0)
    for scale in (1, 2):
        drawing = Drawing(recording, scale)
        for before, after in zip(drawing.places, drawing.places[1:], strict=False):
            assert after.y > before.y or after.x >= before.x + before.width - 1e-6
        assert all(place.x + place.width <= WIDTH and place.y < drawing.height for place in drawing.places)


def test_lines_break_between_words() -> None:
    assert list(words(["The", " sta", "r", ".", "\n", "x", " ", "y", "<|im_end|>"])) == [
        [0],
        [1, 2, 3],
        [4],
        [5],
        [6],
        [7],
        [8],
    ]


def test_a_font_is_found_for_other_scripts_where_the_system_has_one() -> None:
    own = load_font("red star", 12)
    assert own.getname() == ImageFont.load_default(12).getname()
    assert load_font("звезда", 12).getname() != own.getname() or not system_has("DejaVuSans.ttf")
    with pytest.raises(OSError, match="cannot open resource"):
        load_font("red", 12, "absent.ttf")


def system_has(name: str) -> bool:
    try:
        ImageFont.truetype(name, 12)
    except OSError:
        return False
    return True
