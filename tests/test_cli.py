"""`bard-vl`: every command answers as `generate` does; mistakes end it with one line and the right exit code."""

import base64
import functools
import importlib.metadata
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bard_vl import BardVLGenerationConfig, BardVLProcessor
from bard_vl.app.memory import readable
from bard_vl.app.session import Session, build_settings
from bard_vl.evaluation.scenes import scene
from bard_vl_cli.main import main
from bard_vl_cli.media import expand, read
from fresh import ROOT, convert, mark_trained
from PIL import Image
from test_example import GREY, Screen
from tiny import IDS, draw, draw_frames, draw_scene, write_qwen3vl
from transformers import AutoModelForImageTextToText

MASK = IDS["small"].mask_token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints (plain, converted, without a stated block size, without weights), pictures and videos."""
    folder = tmp_path_factory.mktemp("cli")
    write_qwen3vl(folder / "qwen")
    seed = convert(folder / "qwen", folder / "seed", "--block-size", 4, "--mask-token-id", MASK)
    bard = mark_trained(shutil.copytree(seed, folder / "bard"))
    for name in ("unstated", "weightless"):
        shutil.copytree(bard, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "unstated" / "config.json"
    config.write_text(re.sub(r'\s*"block_size": 4,', "", config.read_text()))
    awq = shutil.copytree(folder / "weightless", folder / "awq") / "config.json"
    awq.write_text(json.dumps(json.loads(awq.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    draw_scene(folder / "photo.png")
    draw_scene(folder / "other.png", (128, 64), seed=1)
    (folder / "text.png").write_text("no picture")
    frames = draw_frames(4)
    (folder / "frames").mkdir()
    (folder / "empty").mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{number}.png")
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    write_video(folder / "clip.mp4", draw_frames(12))
    return folder


def write_video(path: Path, frames: list[Image.Image]) -> None:
    """Four frames per second."""
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=4)
        stream.width, stream.height = frames[0].size
        for frame in frames:
            video.mux(stream.encode(av.VideoFrame.from_image(frame)))
        video.mux(stream.encode())


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """A function that runs the program on a line; its exit code, output and errors."""
    monkeypatch.chdir(folder)

    def run(line: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()  # what the test itself has printed
        code = main(line.split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def expected(folder: Path, messages: list[dict[str, Any]], **settings: Any) -> tuple[str, Any]:
    """The answer of `generate`, by transformers' own calls."""
    processor = BardVLProcessor.from_pretrained(folder / "bard")
    model = AutoModelForImageTextToText.from_pretrained(folder / "bard", dtype="auto")
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    output = model.generate(**inputs, return_dict_in_generate=True, **settings)
    response = output.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(response, skip_special_tokens=True), output


def user(*images: Any, text: str = "Describe the picture.") -> dict[str, Any]:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


# run -----------------------------------------------------------------------------------------------------------------


def test_run_prints_the_answer_of_generate_and_nothing_else(run: Any, folder: Path) -> None:
    code, out, err = run("run photo.png --model bard --max-new-tokens 18 --threshold 0.3")
    text, output = expected(folder, [user(draw())], max_new_tokens=18, confidence_threshold=0.3)
    assert (code, out) == (0, f"{text}\n")
    assert re.fullmatch(
        rf"18 tokens in {sum(output.num_forwards.values())} forwards \(\d+\.\d\d tokens per forward\), "
        r"\d+\.\d s, \d+ tokens/s; prompt of \d+ tokens\n",
        err,
    )


def test_several_pictures_a_question_and_settings(run: Any, folder: Path) -> None:
    line = "run photo.png other.png -p Which? -m bard --max-new-tokens 9 --steps 2 --set remasking_strategy=margin -q"
    settings = {"max_new_tokens": 9, "denoising_steps": 2, "remasking_strategy": "margin"}
    text, _ = expected(folder, [user(draw(), draw((128, 64), 1), text="Which?")], **settings)
    assert run(line) == (0, f"{text}\n", "")


def test_a_system_prompt_and_a_question_from_standard_input(run: Any, folder: Path) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "brief"}]}
    text, _ = expected(folder, [system, user(text="How many?")], max_new_tokens=8)
    assert run("run --prompt - --system brief -m bard --max-new-tokens 8 -q", "How many?\n") == (0, f"{text}\n", "")


def test_json_tells_what_generate_tells(run: Any, folder: Path) -> None:
    code, out, err = run("run photo.png --model bard --max-new-tokens 10 --json")
    text, output = expected(folder, [user(draw())], max_new_tokens=10)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found.pop("seconds") > 0
    assert found.pop("tokens_per_second") > 0
    assert found == {
        "model": "bard",
        "prompt": "Describe the picture.",
        "response": text,
        "finish_reason": "length",
        "num_tokens": 10,
        "num_forwards": output.num_forwards,
        "tokens_per_forward": float(output.tokens_per_forward[0]),
        "block_step_counts": output.block_step_counts[0].tolist(),
        "prompt_tokens": 24,
        "visual_tokens": 6,
        "encoded_prompt_tokens": 24,
    }


def test_an_empty_answer_is_told(run: Any, folder: Path) -> None:
    _, output = expected(folder, [user(draw())], max_new_tokens=4)
    first = int(output.sequences[0, -4])
    processor = BardVLProcessor.from_pretrained(folder / "bard")
    special = processor.tokenizer.eos_token_id
    bias = f"[[[{special}],100.0]]"
    code, out, err = run(f"run photo.png -m bard --max-new-tokens 4 --set sequence_bias={bias}")
    assert (code, out.strip(), first != special) == (0, "", True)
    assert err.splitlines()[-1].startswith("an empty answer, of 1 token; prompt of ")


def test_the_reason_of_an_end(run: Any, folder: Path) -> None:
    _, output = expected(folder, [user(draw())], max_new_tokens=8)
    third = int(output.sequences[0, -6])
    ended = json.loads(run(f"run photo.png -m bard --json --max-new-tokens 8 --set eos_token_id={third}")[1])
    assert (ended["finish_reason"], ended["num_tokens"] <= 3) == ("eos", True)
    stopped = json.loads(run("run photo.png -m bard --json --max-new-tokens 8 --set max_time=0")[1])
    assert (stopped["finish_reason"], stopped["num_tokens"]) == ("stop", 4)
    session = Session(str(folder / "bard"), build_settings({}, [f"max_length={output.sequences.shape[1] - 2}"]))
    session.model.generation_config.max_new_tokens = None  # stored, it would come before `max_length`
    cut = session.ask([user(draw())])
    assert (cut.finish_reason, cut.num_tokens) == ("length", 6)


def test_a_length_beyond_the_positions_is_a_limit(run: Any, folder: Path) -> None:
    shutil.copytree(folder / "bard", folder / "tight", dirs_exist_ok=True)
    config = json.loads((folder / "bard" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (folder / "tight" / "config.json").write_text(json.dumps(config))
    code, out, err = run("run photo.png -m tight --max-new-tokens 9000 --json")
    found = json.loads(out)
    assert (code, err, found["finish_reason"]) == (0, "", "length")
    assert found["num_tokens"] == json.loads(run("run photo.png -m tight --dry-run --json")[1])["new_tokens"] < 40
    assert found["response"] == expected(folder, [user(draw())], max_new_tokens=found["num_tokens"])[0]


def test_the_small_example_says_that_it_answers(run: Any, folder: Path) -> None:
    picture = ROOT / "examples" / "images" / "1.png"
    code, out, err = run(f"run {picture}")
    assert (code, out) == (0, f"{scene(True, 2, 1).caption()}\n")
    notice, took = err.splitlines()
    assert notice.startswith("the small example answers: it knows pictures like examples/images alone")
    assert took.startswith("43 tokens in ")
    assert run(f"run {picture} --quiet") == (0, out, "")
    assert notice not in run("run photo.png -m bard --max-new-tokens 4")[2]
    assert run(f"chat {picture}", "Describe the picture.\n")[2].splitlines()[0] == notice


def test_each_file_is_asked_about_alone(run: Any, folder: Path) -> None:
    alone = [run(f"run {name} -m bard -q --prompt What? --max-new-tokens 8")[1] for name in ("photo.png", "other.png")]
    line = "run photo.png text.png other.png --each -m bard --prompt - --max-new-tokens 8"
    code, out, err = run(f"{line} -q", "What?")
    assert (code, out) == (1, f"photo.png:\n{alone[0]}other.png:\n{alone[1]}")
    assert err.startswith("error: text.png cannot be read as a picture")
    assert len(err.splitlines()) == 1
    _, out, _ = run(f"{line} --json", "What?")
    told = [json.loads(part) for part in out.splitlines()]
    assert [(each["file"], f"{each['response']}\n") for each in told] == [
        ("photo.png", alone[0]),
        ("other.png", alone[1]),
    ]


def test_samples_are_those_of_generate(run: Any, folder: Path) -> None:
    line = "run photo.png -m bard -q --max-new-tokens 12 --temperature 1 --seed 3 --num-samples 3"
    sampled = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "num_return_sequences": 3}
    _, output = expected(folder, [user("photo.png")], **sampled)
    processor = BardVLProcessor.from_pretrained(folder / "bard")
    texts = processor.batch_decode(output.sequences[:, -output.confidences.shape[1] :], skip_special_tokens=True)
    assert len({*texts}) == 3
    code, out, _ = run(line)
    assert (code, out) == (0, "".join(f"answer {number}:\n{text}\n" for number, text in enumerate(texts, 1)))
    told = json.loads(run(f"{line} --json")[1])["samples"]
    assert [sample["response"] for sample in told] == texts
    assert [sample["num_tokens"] for sample in told] == [int((row > 0).sum()) for row in output.confidences]


def test_pages_of_a_document_are_pictures(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [draw((90, 60), seed) for seed in range(3)]
    pages[0].save(folder / "three.pdf", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "long.pdf", save_all=True, append_images=[pages[1]] * 39)
    assert [read(place, None)["image"].size for place in expand(["three.pdf", "photo.png"])[:3]] == [(180, 120)] * 3
    for places, shown in {"#2": "2", "#2-": "23", "#-2": "12", "#1-3": "123", "": "123"}.items():
        assert expand([f"three.pdf{places}"]) == [f"three.pdf#{number}" for number in shown]
    second = read("three.pdf#2", None)["image"].resize((90, 60))
    differences = [np.abs(np.subtract(second, page, dtype=int)).mean() for page in pages]
    assert np.argmin(differences) == 1
    code, out, _ = run("run three.pdf#2-3 -m bard --each --json --max-new-tokens 4")
    assert (code, [json.loads(part)["file"] for part in out.splitlines()]) == (0, ["three.pdf#2", "three.pdf#3"])
    asked = json.loads(run("run three.pdf -m bard --json --max-new-tokens 4")[1])
    assert asked["visual_tokens"] == 3 * json.loads(out.splitlines()[0])["visual_tokens"]
    (folder / "broken.pdf").write_text("no document")
    for place, told in {
        "three.pdf#4": "three.pdf#4: there are pages 1 to 3",
        "long.pdf": "long.pdf has 40 pages, 32 at a time are read at most: name some, for instance long.pdf#1-32",
        "broken.pdf": "cannot read the document broken.pdf",
        "absent.pdf": "cannot read the document absent.pdf: no such file",
    }.items():
        assert told in run(f"run {place} -m weightless")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        run("run three.pdf -m weightless")[2] == 'error: three.pdf: PDFs need pypdfium2: pip install "bard-vl[pdf]"\n'
    )


@pytest.mark.thorough
def test_a_seed_repeats_a_sample(run: Any) -> None:
    line = "run photo.png -m bard -q --max-new-tokens 16 --temperature 2 --seed"
    first, again, other = (run(f"{line} {seed}")[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("file", "tokens"), [("frames", 12), ("clip.gif", 12), ("clip.mp4", 18)])
def test_videos_are_folders_animations_and_files(run: Any, file: str, tokens: int) -> None:
    code, out, _ = run(f"run {file} --model bard --max-new-tokens 8 --json")
    found = json.loads(out)
    assert (code, found["prompt"], found["visual_tokens"]) == (0, "Describe the video.", tokens)


def test_a_folder_of_frames_is_the_video_that_the_processor_knows(run: Any, folder: Path) -> None:
    metadata = {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4}
    processor = BardVLProcessor.from_pretrained(folder / "bard")
    content = [{"type": "video", "video": draw_frames(4)}, {"type": "text", "text": "Describe the video."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"},
        **{"video_metadata": [metadata], "do_sample_frames": False},
    )
    model = AutoModelForImageTextToText.from_pretrained(folder / "bard", dtype="auto")
    response = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(response, skip_special_tokens=True)
    for file in ("frames", "clip.gif"):
        assert run(f"run {file} -m bard --max-new-tokens 8 -q")[1] == f"{text}\n"


def test_addresses_are_fetched(run: Any, folder: Path) -> None:
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        for file in ("photo.png", "clip.gif"):
            local, fetched = (
                run(f"run {place} -m bard --max-new-tokens 8 -q") for place in (file, f"{where}/{file}?a=b")
            )
            assert fetched == local
            assert local[0] == 0
    finally:
        server.shutdown()
        server.server_close()
    data = base64.b64encode((folder / "photo.png").read_bytes() + bytes(8000)).decode()
    assert run(f"run data:image/png;base64,{data} -m bard --max-new-tokens 8 -q") == run(
        "run photo.png -m bard --max-new-tokens 8 -q"
    )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


def test_pixels_are_bounded(run: Any) -> None:
    counts = [
        json.loads(run(f"run photo.png -m bard --max-new-tokens 4 --json {options}")[1])["visual_tokens"]
        for options in ("", "--max-pixels 2048", "--min-pixels 20000")
    ]
    assert counts[1] == 1 < counts[0] == 6 < counts[2]


def test_a_dry_run_reads_no_weights(run: Any) -> None:
    code, out, err = run("run photo.png --model weightless --dry-run --max-new-tokens 8")
    assert (code, err) == (0, "")
    for part in ("weights", "cache", "6 visual tokens", "prompt of 24 tokens, response of 8 tokens", "free on cpu"):
        assert part in out
    found = json.loads(run("run photo.png --model weightless --dry-run --max-new-tokens 8 --json --dtype bfloat16")[1])
    whole = json.loads(run("run photo.png --model bard --dry-run --max-new-tokens 8 --json --dtype float32")[1])
    assert (found["visual_tokens"], found["new_tokens"], found["cache"] * 2) == (6, 8, whole["cache"])
    weights = AutoModelForImageTextToText.from_pretrained("bard", dtype=torch.float32).parameters()
    assert whole["weights"] - sum(p.numel() * 4 for p in weights) in range(10_000)  # buffers


def test_a_dry_run_says_whether_it_fits(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "run photo.png --model weightless --dry-run --max-new-tokens 4000"
    whole = json.loads(run(f"{line} --json")[1])
    assert (whole["fits"], whole["refused"]) == ("yes", None)
    for share, fits, comment in ((0.9, "perhaps", "not at full length"), (0.01, "no", "needs about")):
        monkeypatch.setattr("bard_vl.app.session.free_memory", lambda _, share=share: int(share * whole["total"]))
        found = json.loads(run(f"{line} --json")[1])
        assert found["fits"] == fits
        assert (found["refused"] is None) == (fits != "no")
        assert re.search(rf"does it fit +{fits}.*{comment}", run(line)[1], flags=re.DOTALL)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(("file", "kind"), [("photo.png", "picture"), ("clip.mp4", "video"), ("frames", "video")])
def test_pictures_of_the_denoising_are_written(run: Any, folder: Path, file: str, kind: str) -> None:
    code, out, _ = run(f"run {file} -m bard --max-new-tokens 8 --html a.html --gif a.gif --png a.png")
    assert code == 0
    assert out.strip()
    page = (folder / "a.html").read_text()
    assert f"Describe the {kind}." in page
    assert "data:image/" in page
    with Image.open(folder / "a.gif") as gif, Image.open(folder / "a.png") as png:
        assert gif.n_frames > 2
        assert png.size[0] == 2 * gif.size[0]


def test_undecided_tokens_are_those_of_the_mask_id_in_force(run: Any, folder: Path) -> None:
    shutil.copytree(folder / "bard", folder / "plain", dirs_exist_ok=True)
    settings = json.loads((folder / "plain" / "processor_config.json").read_text())
    assert settings.pop("mask_token_id") == MASK
    (folder / "plain" / "processor_config.json").write_text(json.dumps(settings))
    assert BardVLProcessor.from_pretrained(folder / "plain").mask_token_id != MASK
    for options in ("-m plain", "-m bard --set mask_token_id=446"):
        assert run(f"run photo.png {options} --max-new-tokens 4 --set eos_token_id=[] --html a.html")[0] == 0
        (data,) = re.findall(r'id="recording">(.*?)</script>', (folder / "a.html").read_text())
        first, *_, last = [step["texts"].count(None) for step in json.loads(data)["steps"]]
        assert first > last == 0
    stored = BardVLGenerationConfig.from_pretrained(folder / "plain")
    stored.mask_token_id = 445
    stored.save_pretrained(folder / "plain")
    assert Session(str(folder / "plain")).processor.mask_token_id == 445
    assert Session(str(folder / "plain"), build_settings({}, ["mask_token_id=444"])).processor.mask_token_id == 444
    code, _, err = run("run photo.png -m weightless --set mask_token_id=4000")
    assert (code, "`mask_token_id` = 4000 lies outside the vocabulary" in err) == (1, True)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("", 2, "no command"),
        ("nonsense", 2, "No such command 'nonsense'"),
        ("run --nonsense", 2, "No such option: --nonsense"),
        ("run photo.png --block-size x", 2, "Invalid value for '--block-size'"),
        ("run --model bard", 2, "nothing to answer: give a picture, a video or --prompt"),
        ("run photo.png --model unstated", 2, "unstated states no block size: give --block-size, the number after B"),
        (
            "run photo.png --model qwen",
            2,
            "qwen is no Bard-VL checkpoint: its model type is qwen3_vl; convert it first: bard-vl",
        ),
        ("run photo.png --model weightless --block-size 0", 2, "`block_size` must be an integer of at least 1, got 0"),
        ("run photo.png --model weightless --threshold 2", 2, "`confidence_threshold` must be a number in"),
        ("run photo.png --model weightless --set nonsense=1", 2, "unknown generation settings: nonsense"),
        ("run photo.png --model weightless --set nonsense", 2, "--set takes NAME=VALUE, got 'nonsense'"),
        ("run photo.png --model weightless --set num_return_sequences=2", 2, "`num_return_sequences` is the command's"),
        ("run photo.png --model weightless --device tpu9", 2, "--device tpu9 cannot be used"),
        ("run photo.png --model weightless --dtype int8", 2, "--dtype must be bfloat16, float16 or float32, got int8"),
        ("run photo.png --model weightless --min-pixels 9 --max-pixels 8", 2, "--min-pixels 9 is more than --max-"),
        ("run photo.png --model weightless --html absent/a.html", 2, "absent/a.html cannot be written: no such folder"),
        ("run photo.png --model weightless --png frames", 2, "frames cannot be written: a folder"),
        ("run photo.png --model awq", 2, "awq has AWQ weights: pip install gptqmodel"),
        ("run photo.png --each --html a.html", 2, "--each gives several answers, --html is about one: leave one of"),
        (
            "run photo.png --num-samples 2 --compare bard",
            2,
            "--num-samples 2 gives several answers, --compare is about",
        ),
        ("run photo.png --model weightless --num-samples 2", 2, "--num-samples 2 would all be the same: give --temp"),
        ("run --each --prompt x", 2, "nothing to answer"),
        ("run photo.png --model ./nowhere", 1, "./nowhere is no folder here, and cannot be had from the Hub: "),
        ("run photo.png --model frames", 2, "frames is no checkpoint: it has no config.json"),
        ("run absent.png --model weightless", 1, "absent.png cannot be read as a picture: no such file"),
        ("run text.png --model weightless", 1, "text.png cannot be read as a picture: cannot identify image file"),
        ("run empty --model weightless", 1, "empty cannot be read as a video: the folder holds no pictures"),
        ("run absent.mp4 --model weightless", 1, "absent.mp4 cannot be read as a video: no such file"),
        ("run photo.png --model weightless --block-size 9000", 1, "`max_position_embeddings`); there is room for 0"),
        ("run photo.png --model weightless", 1, "weightless"),
        ("chat absent.png --model weightless", 1, "absent.png cannot be read as a picture: no such file"),
        ("demo --model qwen", 2, "qwen is no Bard-VL checkpoint"),
        ("convert --source absent --output x", 1, "absent"),
        ("convert --source qwen", 2, "the following arguments are required: --output"),
        ("bench --shape huge", 2, "argument --shape: invalid choice: 'huge'"),
    ],
)
def test_mistakes_end_in_one_line_before_weights_are_read(run: Any, line: str, code: int, message: str) -> None:
    found, out, err = run(line)
    assert found == code
    assert ("Usage: bard-vl" in out) if not line else (out == "")
    last = err.splitlines()[-1]
    assert "error: " in last
    assert message in last
    if not line.startswith(("convert", "bench")):  # whose parsers print the usage first
        assert err == f"{last}\n"
        assert last.startswith("error: ")


def test_what_does_not_fit_is_refused_before_weights_are_read(run: Any, folder: Path) -> None:
    config = json.loads((folder / "weightless" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2**40
    shutil.copytree(folder / "weightless", folder / "long", dirs_exist_ok=True)
    (folder / "long" / "config.json").write_text(json.dumps(config))
    code, out, err = run("run photo.png --model long --max-new-tokens 10000000000")
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"error: a prompt of 24 tokens, 6 of images and videos needs about .* TB at most \(.* of weights, .*\); "
        r"cpu has .* free; no limit on the pixels of an image makes it fit; or lower `max_new_tokens`, which is "
        r"10000000000\n",
        err,
    )


def test_a_device_that_runs_out_of_memory_is_told_in_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    expected = readable(json.loads(run("run photo.png -m bard --dry-run --json --max-new-tokens 8")[1])["total"])
    monkeypatch.setattr("bard_vl.BardVLForConditionalGeneration.generate", exhaust)
    code, out, err = run("run photo.png --model bard --max-new-tokens 8")
    assert (code, out) == (1, "")
    assert err == (
        "error: cpu ran out of memory; a prompt of 24 tokens and a response of 8 were expected to take "
        f"{expected}, weights included: lower --max-pixels or --max-new-tokens\n"
    )


def test_a_traceback_on_request(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BARD_VL_TRACEBACK", "1")
    code, _, err = run("run absent.png --model weightless")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: absent.png")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "processor_config.json", "config.json"])
def test_a_damaged_checkpoint_is_named(run: Any, folder: Path, tmp_path: Path, file: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "bard", damaged)
    (damaged / file).write_bytes((damaged / file).read_bytes()[:-20])
    code, out, err = run(f"run photo.png --model {damaged}")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: .*{damaged}.*\n", err), err
    assert file != "model.safetensors" or f"{damaged / file} cannot be read: " in err


@pytest.mark.parametrize("command", ["run", "chat", "batch", "demo", "convert", "bench"])
def test_help_teaches(run: Any, command: str) -> None:
    code, out, err = run(f"{command} --help")
    assert (code, err) == (0, "")
    assert f"bard-vl {command}" in out
    if command in ("run", "chat", "batch", "demo"):
        assert re.search(rf"Examples? *\n.*bard-vl {command} ", out, flags=re.DOTALL)
    else:
        assert {"convert": "--mask-row", "bench": "--compile"}[command] in out


def test_version_and_entry_point(run: Any) -> None:
    import bard_vl

    assert run("--version") == (0, f"bard-vl {bard_vl.__version__}\n", "")
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="bard-vl")
    assert entry.load() is main


# chat ----------------------------------------------------------------------------------------------------------------

TURN = re.compile(r"(\d+) tokens in \d+ forwards .* prompt of (\d+) tokens(?:, (\d+) of them encoded)?")


def test_a_conversation_encodes_only_what_is_new(run: Any, folder: Path) -> None:
    lines = "What is it?\nAnd its colour?\n/image other.png\nAnd this?\n/reset\nWho?\n/quit\nnever\n"
    code, out, err = run("chat photo.png --model bard --max-new-tokens 12", lines)
    first, _ = expected(folder, [user(draw(), text="What is it?")], max_new_tokens=12)
    reply = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    chat = [user(draw(), text="What is it?"), reply, user(text="And its colour?")]
    second, _ = expected(folder, chat, max_new_tokens=12)
    reply = {"role": "assistant", "content": [{"type": "text", "text": second}]}
    chat += [reply, user(draw((128, 64), 1), text="And this?")]
    third, _ = expected(folder, chat, max_new_tokens=12)
    fourth, _ = expected(folder, [user(text="Who?")], max_new_tokens=12)
    assert (code, out) == (0, "".join(f"{text}\n" for text in (first, second, third, fourth)))
    turns = [tuple(int(number or 0) for number in TURN.match(line).groups()) for line in err.splitlines()]
    assert len(turns) == 4
    lengths, encoded = [turn[1] for turn in turns], [turn[2] for turn in turns]
    assert encoded[0] == encoded[3] == 0, "a first turn is encoded whole, and so it is after a reset"
    assert encoded[1] == lengths[1] - lengths[0] // 4 * 4, "from the block boundary before the first prompt's end"
    assert encoded[2] == lengths[2] - lengths[1] // 4 * 4


def test_only_what_is_new_must_fit(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr("bard_vl.app.session.check_fits", lambda *_: counts.append(1))
    assert run("chat photo.png --model bard --max-new-tokens 4", "What is it?\nAnd this?\n/reset\nWho?\n")[0] == 0
    assert len(counts) == 2, "a later turn has a cache, with which `generate` reckons"


def test_a_conversation_keeps_its_system_prompt_and_its_seed(run: Any, folder: Path) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "brief"}]}
    settings = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3}
    text, _ = expected(folder, [system, user(text="Who?")], **settings)
    options = "--system brief --max-new-tokens 12 --temperature 2 --quiet"
    found = run(f"chat --model bard {options} --seed 3", "Who?\n/reset\nWho?\n")
    assert found == (0, f"{text}\n" * 2, "")
    assert run(f"chat --model bard {options} --seed 4", "Who?\n")[1] != f"{text}\n"


def test_answers_of_a_conversation_have_the_form_that_holds(run: Any) -> None:
    lines = 'What?\n/form --template "No. {n}" --slot n=7|12\nAnd?\n/form --choices "a b|c"\nSo?\n/form\nFree?\n'
    code, out, err = run("chat --model bard --max-new-tokens 12 --regex [0-9]{3} --quiet", lines)
    number, values, choice, free = out.removesuffix("\n").split("\n", 3)
    assert (code, err) == (0, "")
    assert re.fullmatch("[0-9]{3}", number)
    assert json.loads(values)["n"] in ("7", "12")
    assert choice in ("a b", "c")
    # What was told counts: the answer without a form is one to the whole conversation.
    told = ("What?", number, "And?", f"No. {json.loads(values)['n']}", "So?", choice, "Free?")
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": [{"type": "text", "text": text}]}
        for place, text in enumerate(told)
    ]
    assert free == expected(Path(), messages, max_new_tokens=12)[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/nonsense\n", "unknown command /nonsense"),
        ("/image absent.png\nWhat?\n", "absent.png cannot be read"),
        ("/form --choices a --regex b\n", "give one of --choices"),
        ("/form --colour red\n", "No such option: --colour"),
        ("/form --regex (\n", "`regex`: "),
    ],
)
def test_a_failure_ends_a_conversation_by_script(run: Any, lines: str, message: str) -> None:
    code, out, err = run("chat --model bard", lines)
    assert (code, out) == (2 if lines.startswith("/form") else 1, "")
    assert message in err


# check ---------------------------------------------------------------------------------------------------------------


def test_check_counts_the_chats_that_training_would_use(run: Any, folder: Path) -> None:
    answer = {"role": "assistant", "content": "Red shapes."}
    chats = [[user(place, text="Shapes?"), answer] for place in ("photo.png", "other.png", "missing.png")]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    processor = BardVLProcessor.from_pretrained(folder / "bard")
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    asked = [user(draw(size), text="Shapes?") for size in ((96, 64), (128, 64))]
    prompts = [processor.apply_chat_template([each], **options) for each in asked]
    blocks = -(-(len(processor.tokenizer("Red shapes.")["input_ids"]) + 1) // 8)
    columns = sorted(len(prompt["input_ids"][0]) + 2 * 8 * blocks for prompt in prompts)
    code, out, err = run("check chats.jsonl --model weightless --block-size 8 --json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["chats"], found["usable"], found["skipped"]) == (3, 2, {"missing image": 1})
    assert found["columns"] == {"median": columns[1], "largest": columns[1], "in all": sum(columns)}
    code, out, _ = run(f"check chats.jsonl --model weightless --block-size 8 --max-length {columns[0]}")
    assert code == 0
    assert out.startswith("3 chats, 1 can be trained on\n")
    assert "skipped 1: too long for a row" in out
    code, _, err = run("check chats.jsonl --model weightless --max-length 8")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: none of the 3 chats can be used")


# convert and bench ---------------------------------------------------------------------------------------------------


def test_convert_is_the_converter(run: Any, folder: Path) -> None:
    code, out, _ = run(f"convert --source qwen --output converted --block-size 4 --mask-token-id {MASK} --quiet")
    assert (code, out) == (0, "")
    for path in (folder / "seed").iterdir():
        if path.name != "README.md":  # names the folder
            assert (folder / "converted" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.thorough
def test_bench_is_the_benchmark(run: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = "bench --shape tiny --only engine --repetitions 1 --prompt-length 9 --new-tokens 9 --block-size 4 --steps 2"
    code, out, _ = run(f"{line} --quiet --json bench.json")
    assert code == 0
    assert "tokens/s" in out
    measured = json.loads((folder / "bench.json").read_text())
    assert measured["arguments"]["new_tokens"] == 9


# Terminals and signals -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "40", "LINES": "4", "NO_COLOR": ""}


def start(folder: Path, *arguments: str, **pipes: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "bard_vl_cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(), **pipes)


class Terminal:
    """The program with all its ends on a terminal, and the other end of that."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.end, inner = os.openpty()
        self.process = start(folder, *arguments, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)
        self.unread = ""

    def read_until(self, wanted: str, seconds: float = 120) -> str:
        """The output up to a text, that text included; the rest stays for the next call."""
        deadline = time.monotonic() + seconds
        while wanted not in self.unread:
            assert time.monotonic() < deadline, self.unread
            assert self._read(), self.unread
        before, found, self.unread = self.unread.partition(wanted)
        return before + found

    def _read(self) -> bool:
        """Take what is there, waiting for a second; whether the program still holds its end."""
        if select.select([self.end], [], [], 1)[0]:
            try:
                self.unread += os.read(self.end, 65536).decode(errors="replace")
            except OSError:  # closed
                return False
        return True

    def type(self, line: str) -> None:
        os.write(self.end, f"{line}\n".encode())

    def close(self, seconds: float = 300) -> str:
        """Wait for the program's end, which must be a good one; the rest of what it prints."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.unread
        os.close(self.end)
        assert self.process.wait(timeout=seconds) == 0
        return self.unread


@pytest.mark.process
def test_drafts_are_grey_on_a_terminal_and_leave_only_the_text(folder: Path, run: Any) -> None:
    output = Terminal(folder, "run", "photo.png", "-m", "bard", "--max-new-tokens", "16", "-q").close()
    assert GREY in output
    text = run("run photo.png -m bard --max-new-tokens 16 -q")[1]
    shown = Screen(40).write(output[output.index(GREY) :]).lines()
    expected = Screen(40).write(text.replace("\n", "\r\n")).lines()
    assert [line for line in shown if line] == [line for line in expected if line]


@pytest.mark.process
def test_an_interrupt_ends_the_program_with_130(folder: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start(
        folder, "run", "photo.png", "-m", "bard", "--max-new-tokens", "4000", "--set", "eos_token_id=[]", **pipes
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted"


@pytest.mark.parametrize("library", ["libtorch_cpu.so", "tokenizers.abi3.so", "_imaging.cpython"])
@pytest.mark.process
def test_an_interrupt_while_the_program_starts_is_one_line(folder: Path, library: str) -> None:
    process = start(folder, "run", "photo.png", "-m", "bard", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():  # what is being loaded
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    # Other packages may log while they are imported.
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "error: interrupted")


@pytest.mark.parametrize(
    "line", ["--help", "batch --help", "models", "--version", "run --nonsense", "run", "chat --seed x"]
)
@pytest.mark.process
def test_help_the_table_and_mistyped_options_do_not_wait_for_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    process = start(folder, *line.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=300)
    said = "".join(each for each in err.splitlines(keepends=True) if not each.startswith("import time:"))
    assert process.returncode == (0 if out else 2)
    assert bool(out) != said.startswith("error: ")
    imported = {each.rpartition("|")[2].strip() for each in err.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "bard_vl"}


@pytest.mark.process
def test_a_reader_that_leaves_ends_the_program_quietly(folder: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start(
        folder, "run", "photo.png", "-m", "bard", "--max-new-tokens", "2000", "--set", "eos_token_id=[]", **pipes
    )
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 1
    assert not re.search("^(error|Traceback)", err, flags=re.MULTILINE)
    assert "Enum subclass" not in err, "torchao's"


@pytest.mark.process
def test_an_interrupt_stops_an_answer_and_not_the_conversation(folder: Path) -> None:
    options = ("-m", "bard", "--max-new-tokens", "4000", "--set", "eos_token_id=[]", "--quiet")
    terminal = Terminal(folder, "chat", "photo.png", *options)
    terminal.read_until("/quit: leave")
    terminal.read_until("> ")
    terminal.type("/image absent.png")
    terminal.read_until("error: absent.png cannot be read")
    terminal.read_until("> ")
    terminal.type("Describe it.")
    terminal.read_until(GREY)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.read_until("stopped")
    terminal.read_until("\n> ")
    terminal.type("/quit")
    terminal.close()


def test_the_checkout_has_the_page_template_and_the_benchmarks() -> None:
    assert (ROOT / "benchmarks" / "decoding.py").is_file()
    packaged = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("bard_vl.app", "bard_vl_cli", "bard_vl.viewer", "page.html.jinja"):
        assert f'"{name}"' in packaged
