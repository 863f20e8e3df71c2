"""Boxes and points: right for pictures of any shape, and drawn where things are."""

import json
from pathlib import Path
from typing import Any

import pytest
from bard_vl.app.boxes import Thing, draw_things, find_things, read_things, things_schema
from bard_vl.evaluation import scenes
from bard_vl.evaluation.grounding import things_of, write_chats
from bard_vl.forms_bard_vl import Form
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops


@given(st.integers(1, 4000), st.integers(1, 4000), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_places_survive_the_way_to_the_model_and_back(width: int, height: int, shares: list[float]) -> None:
    left, right, top, bottom = *sorted(shares[:2]), *sorted(shares[2:])
    box = Thing("box", (left * width, top * height, right * width, bottom * height))
    for thing in (box, Thing("point", box.place[:2])):
        (back,) = read_things(json.dumps([thing.relative(width, height)]), width, height)
        assert back.label == thing.label
        for number, (old, new) in enumerate(zip(thing.place, back.place, strict=True)):
            assert abs(old - new) <= (height if number % 2 else width) / 2000 + 1e-6


@pytest.mark.parametrize("size", [(256, 256), (1024, 256), (100, 700)])
def test_boxes_of_scenes_hold_their_shapes_after_resizing(size: tuple[int, int]) -> None:
    scene = scenes.scene(True, 1, 3)
    told = [thing.relative(256, 256) for thing in things_of(scene)]
    form = Form.read({"json_schema": things_schema(labels=[thing.label for thing in things_of(scene)])})
    picture = scene.draw().resize(size, Image.Resampling.NEAREST)
    found = read_things(form.parse(json.dumps(told)), *size)
    assert [thing.label for thing in found] == [f"{each.size} {each.colour} {each.shape}" for each in scene.things]
    for thing, shown in zip(found, scene.things, strict=True):
        left, top, right, bottom = thing.place
        middle = picture.getpixel((round((left + right) / 2), round((top + bottom) / 2)))
        assert "#{:02x}{:02x}{:02x}".format(*middle) == scenes.COLOURS[shown.colour]
    drawn = draw_things(picture, found)
    assert drawn.size == size
    left, top, right, bottom = (round(part) for part in found[0].place)
    assert drawn.getpixel((right - 1, (top + bottom) // 2)) == (0xE6, 0x19, 0x4B)
    assert picture.getpixel((right - 1, (top + bottom) // 2)) == (255, 255, 255), "the picture itself is as it was"


def test_a_question_for_one_box_names_its_cell(tmp_path: Path) -> None:
    write_chats(tmp_path / "box", 4, held_out=True, seed=1, about="box")
    for number, line in enumerate((tmp_path / "box" / "chats.jsonl").read_text().splitlines()):
        asked, told = (message["content"] for message in json.loads(line)["messages"])
        (thing,) = read_things(told, 256, 256)
        column, row = (int(sum(thing.place[axis::2]) / 2) // scenes.CELL for axis in (0, 1))
        (shown,) = [each for each in scenes.scene(True, 1, number).things if (each.row, each.column) == (row, column)]
        assert asked[1]["text"] == f"Locate the shape at {shown.cell}, as JSON."
        assert thing.label == f"{shown.size} {shown.colour} {shown.shape}"


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_the_box_of_a_shape_is_what_it_fills(shape: str) -> None:
    thing = scenes.Thing(1, 2, "large", "red", shape)
    picture = scenes.Scene((thing,), None).draw()
    filled = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).getbbox()
    assert filled == pytest.approx(thing.box, abs=1.5)


def test_places_are_found_in_whatever_text_holds_them() -> None:
    box = '{"bbox_2d": [0, 500, 500, 1000], "label": "a [cup]"}'
    cup = Thing("a [cup]", (0, 25, 100, 50))
    for text in (f"[{box}]", box, f"```json\n[\n{box}\n]\n```", f"Two [2] {{things}}: [{box}, {box}].", f"[{box}"):
        assert find_things(text, 200, 50)[:1] == [cup]
    assert len(find_things(f"[1] [{box}, {box}]", 200, 50)) == 2
    for text in ("", "A red circle.", "[]", '[{"bbox_2d": [0, 0, 9, 1001]}]', "[" * 20_000, '{"label": "cup"}'):
        assert find_things(text, 200, 50) == []


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ([{"bbox_2d": [0, 0, 10], "label": "a"}], "got"),
        ([{"bbox_2d": [0, 0, 10, 1001], "label": "a"}], "1001"),
        ([{"bbox_2d": [20, 0, 10, 10], "label": "a"}], "left, top, right, bottom"),
        ([{"label": "a"}], "`bbox_2d` or `point_2d`"),
        (["a"], "'a'"),
        ("A cup.", "must be JSON, got 'A cup.'"),
        ([{"point_2d": [True, 3]}], "True"),
    ],
)
def test_what_is_no_place_is_named(answer: Any, named: str) -> None:
    with pytest.raises(ValueError, match="got") as error:
        read_things(answer, 10, 10)
    assert named in str(error.value)


def test_schemas_are_forms_that_can_be_kept_to() -> None:
    for kind, place in (("bbox_2d", [0, 0, 999, 1000]), ("point_2d", [3, 1000])):
        form = Form.read({"json_schema": things_schema(kind, most=2)})
        told = [{kind: place, "label": "a red circle"}]
        assert form.parse(json.dumps(told)) == told
        for wrong in ([{kind: [*place[:-1], 1001], "label": "a"}], told * 3):
            with pytest.raises(ValueError, match="does not have the form"):
                form.parse(json.dumps(wrong))
    with pytest.raises(ValueError, match="bbox_3d"):
        things_schema("bbox_3d")
