"""`transformers serve` and `transformers chat`, as installed, run a converted folder: its answers are `generate`'s."""

import asyncio
import base64
import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import bard_vl
import fresh
import openai
import pytest
import tiny
import torch
from bard_vl.evaluation.scenes import scene
from bard_vl.serving.__main__ import main
from golden_models import calls_of
from packaging.version import Version
from PIL import Image
from test_readme import make_published
from transformers.cli.serving.utils import DirectStreamer, _GenerationCancelled

pytestmark = pytest.mark.process

MANUAL = (fresh.ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", MANUAL, re.M | re.S) for line in block.splitlines()]
EOS = tiny.IDS["small"].eos_token_id
QUESTION = "What is the colour of the circle?"
SETTINGS = {"max_new_tokens": 21, "confidence_threshold": 0.02}
EXAMPLES = fresh.ROOT / "examples"
SEED_OF_EXAMPLES = 2  # of the scenes in examples/images


class Server:
    """A running server, a client of it, and what `generate` says without it."""

    def __init__(self, folder: Path, url: str):
        self.name, self.url = str(folder), url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1, timeout=300)
        self.model = bard_vl.BardVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.processor = bard_vl.BardVLProcessor.from_pretrained(folder)

    def ask(self, messages: list[dict[str, Any]], *, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        extra = {"generation_config": json.dumps(SETTINGS if settings is None else settings)}
        create = self.client.chat.completions.create
        return create(model=self.name, messages=messages, extra_body=extra, **options)

    def expected(self, messages: list[dict[str, Any]], **settings: Any) -> tuple[str, int]:
        """Text and number of tokens of the answer."""
        inputs = self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        sequences = self.model.generate(**inputs, **(SETTINGS | settings), tokenizer=self.processor)
        response = sequences[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(response, skip_special_tokens=True), len(response)


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home_of_package = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **home_of_package, "PATH": path, "COLUMNS": "200"}


@contextmanager
def serving(command: str, home: Path) -> Iterator[str]:
    """The address of a server that the command starts, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*shlex.split(command), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    home.mkdir(exist_ok=True)
    with (home / "log").open("w") as log:
        process = subprocess.Popen(arguments, env=environment(home), cwd=home, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("room")
    return fresh.convert(tiny.write_qwen3vl(room / "qwen"), room / "bard", "--block-size", 4, "--mask-token-id", 447)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(printed("transformers serve", folder), folder.parent / "home") as url:
        yield Server(folder, url)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The checkpoint of the examples, saved with its code."""
    room = tmp_path_factory.mktemp("room")
    for part in (bard_vl.BardVLForConditionalGeneration, bard_vl.BardVLProcessor):
        part.from_pretrained(EXAMPLES / "checkpoint").save_pretrained(room / "examples")
    with serving(printed("transformers serve", room / "examples"), room / "home") as url:
        yield Server(room / "examples", url)


OURS = "python -m bard_vl.serving Bard-VL-4B"
PUBLISHED = "fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct"


def printed(beginning: str, folder: Path) -> str:
    """The manual's command that begins so, for a checkpoint."""
    (command,) = [command for command in COMMANDS if command.startswith(beginning)]
    return re.sub(rf"Bard-VL-4B|{PUBLISHED}", str(folder), command).replace("python", sys.executable, 1)


def test_every_command_of_the_manual_is_run() -> None:
    known = ("pip install", "transformers serve", "transformers chat", OURS, f"python -m bard_vl.serving {PUBLISHED}")
    assert len(COMMANDS) == len({*known})
    assert all(command.startswith(known) for command in COMMANDS)


def test_a_seed_is_warned_of(folder: Path, ours: Server) -> None:
    log = (folder.parent / "own" / "log").read_text()
    assert f"{folder} is a seed: until it is trained for block diffusion it writes nonsense" in log


def streamed(text: str) -> str:
    """A text as a stream shows it: its decoder keeps back the bytes of a character that never ends."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def user(*items: Any) -> list[dict[str, Any]]:
    """A question by text, and by pictures as data addresses."""
    content = [{"type": "text", "text": item} if isinstance(item, str) else image_item(item) for item in items]
    return [{"role": "user", "content": content}]


def image_item(image: Image.Image) -> dict[str, Any]:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"bard-vl-{os.getpid()}.png"
    image.save(path)
    data = base64.b64encode(path.read_bytes()).decode()
    path.unlink()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


CHATS: dict[str, list[dict[str, Any]]] = {
    "text": user(QUESTION),
    "image": user(tiny.draw(seed=1), QUESTION),
    "two images": user(tiny.draw((64, 64), seed=2), tiny.draw(seed=3), QUESTION),
    "turns": [
        {"role": "system", "content": "Be brief."},
        *user(tiny.draw(seed=4), QUESTION),
        {"role": "assistant", "content": "Red."},
        *user("And the square?"),
    ],
}


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_generate(server: Server, name: str) -> None:
    text, length = server.expected(CHATS[name])
    answer = server.ask(CHATS[name])
    assert answer.choices[0].message.content == text
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", length)


@pytest.mark.parametrize("name", CHATS)
def test_streams_tell_the_same_in_parts(server: Server, name: str) -> None:
    text, length = server.expected(CHATS[name])
    chunks = list(server.ask(CHATS[name], stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(parts) == streamed(text)
    assert len(parts) > 2
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].usage.completion_tokens) == ("length", length)


@pytest.mark.parametrize("stream", [False, True])
def test_ends_are_seen(server: Server, stream: bool) -> None:
    whole, _ = server.expected(CHATS["image"])
    stop = re.findall(r"[a-z]{2,}", whole)[1]
    text, length = server.expected(CHATS["image"], stop_strings=[stop, "never said"])
    assert len(text) < len(whole)
    for options, expected in (({"stop": [stop, "never said"]}, (text, length)), ({"logit_bias": {EOS: 100}}, ("", 1))):
        answer = server.ask(CHATS["image"], stream=stream, **options)
        if stream:
            *parts, last = list(answer)
            said = "".join(part.choices[0].delta.content or "" for part in parts)
        else:
            last, said = answer, answer.choices[0].message.content
        assert said == expected[0]
        assert (last.choices[0].finish_reason, last.usage.completion_tokens) == ("stop", expected[1])


def test_fields_of_the_request_are_settings(server: Server) -> None:
    stored = {"max_new_tokens": 9, "confidence_threshold": 0.9}
    plain = server.client.chat.completions.create(model=server.name, messages=CHATS["text"], max_tokens=9)
    assert plain.choices[0].message.content == server.expected(CHATS["text"], **stored)[0]
    options = {"temperature": 0.0, "top_p": 0.5, "frequency_penalty": 0.5, "max_completion_tokens": 9}
    text, _ = server.expected(CHATS["text"], repetition_penalty=1.5, max_new_tokens=9)
    assert server.ask(CHATS["text"], **options).choices[0].message.content == text


@pytest.mark.parametrize("body", [{"logit_bias": {}}, {"stop": []}, {"stop": ""}], ids=str)
def test_fields_that_ask_for_nothing_change_nothing(server: Server, body: dict[str, Any]) -> None:
    text, length = server.expected(CHATS["text"], max_new_tokens=9, confidence_threshold=0.9)
    answer = server.client.chat.completions.create(model=server.name, messages=CHATS["text"], max_tokens=9, **body)
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == length


def test_logit_bias_needs_no_other_settings(server: Server) -> None:
    bias = {server.processor.tokenizer.convert_tokens_to_ids("a"): 100}
    request = {"model": server.name, "messages": CHATS["text"], "max_tokens": 5, "logit_bias": bias}
    assert server.client.chat.completions.create(**request).choices[0].message.content == "aaaaa"
    parts = [part.choices[0].delta.content for part in server.client.chat.completions.create(**request, stream=True)]
    assert "".join(filter(None, parts)) == "aaaaa"


def test_completions_continue_a_text(server: Server) -> None:
    answer = server.client.completions.create(model=server.name, prompt="The image shows", max_tokens=9)
    inputs = server.processor.tokenizer("The image shows", return_tensors="pt")
    sequences = server.model.generate(**inputs, max_new_tokens=9)
    assert answer.choices[0].text == server.processor.decode(sequences[0, inputs["input_ids"].shape[1] :])


def test_simultaneous_requests_get_their_own_answers(server: Server) -> None:
    seeds = {seed: {**SETTINGS, "do_sample": True, "seed": seed} for seed in (1, 2, 3)}
    jobs: list[tuple[str, dict[str, Any]]] = [(name, dict(SETTINGS)) for name in CHATS]
    jobs += [("image", settings) for settings in seeds.values()]
    expected = [streamed(server.expected(CHATS[name], **settings)[0]) for name, settings in jobs]
    assert len(set(expected)) == len(expected)

    def ask(job: tuple[str, dict[str, Any]]) -> str:
        chunks = server.ask(CHATS[job[0]], settings=job[1], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(ask, jobs * 2)) == expected * 2


def test_a_client_that_leaves_stops_its_answer(server: Server) -> None:
    settings = {"max_new_tokens": 4_000, "confidence_threshold": 1.0, "eos_token_id": []}
    start = time.monotonic()
    stream = server.ask(CHATS["text"], settings=settings, stream=True)
    for count, _ in enumerate(stream):
        if count == 100:
            break
    stream.close()
    left = time.monotonic()
    assert server.ask(CHATS["text"]).choices[0].message.content == server.expected(CHATS["text"])[0]
    assert time.monotonic() - left < 5 * (left - start), "the rest would have taken much longer"


def test_an_answer_that_is_stopped_costs_no_forward_more(server: Server, request: pytest.FixtureRequest) -> None:
    loop = asyncio.new_event_loop()
    request.addfinalizer(loop.close)
    streamer = DirectStreamer(server.processor.tokenizer._tokenizer, loop, asyncio.Queue())

    def leave(ids: torch.Tensor, _: Any) -> torch.Tensor:
        if ids.shape[1] == 9 + 3 * 4:  # the server does so when its client is gone
            streamer.cancel()
        return torch.tensor([False])

    ids = torch.arange(20, 29)[None]
    settings = {"denoising_steps": 1, "max_new_tokens": 40, "stopping_criteria": [leave], "eos_token_id": []}
    with calls_of(server.model.model.language_model) as calls, pytest.raises(_GenerationCancelled):
        server.model.generate(ids, streamer=streamer, **settings)
    assert len(calls) == 3


def test_wrong_settings_are_told_and_survived(server: Server) -> None:
    wrong = {**SETTINGS, "confidence_threshold": 7}
    with pytest.raises(openai.APIError) as error:
        list(server.ask(CHATS["text"], settings=wrong, stream=True))
    assert error.value.body == "`confidence_threshold` must be a number in [0.0, 1.0], got 7"
    with pytest.raises(openai.InternalServerError):
        server.ask(CHATS["text"], settings=wrong)
    assert server.ask(CHATS["text"]).choices[0].message.content == server.expected(CHATS["text"])[0]


def test_the_checkpoint_of_the_examples_reads_pictures(embedded: Server) -> None:
    paths = sorted((EXAMPLES / "images").iterdir())
    chats = [user(Image.open(path), "Describe the picture.") for path in paths]
    settings = {"max_new_tokens": 96, "confidence_threshold": 0.9}
    expected = [embedded.expected(chat, **settings) for chat in chats]
    captions = [scene(True, SEED_OF_EXAMPLES, int(path.stem)).caption() for path in paths]
    right = [text == caption for (text, _), caption in zip(expected, captions, strict=True)]
    assert sum(right) >= len(right) - 1

    def ask(chat: list[dict[str, Any]]) -> tuple[str, str, int]:
        *parts, last = embedded.ask(chat, settings=settings, stream=True)
        said = "".join(part.choices[0].delta.content or "" for part in parts)
        return said, last.choices[0].finish_reason, last.usage.completion_tokens

    with ThreadPoolExecutor(len(chats)) as pool:
        assert list(pool.map(ask, chats)) == [(text, "stop", length) for text, length in expected]
    text, length = embedded.expected(chats[0], **settings, stop_strings=["shapes"])
    assert text.startswith(captions[0].partition("shapes")[0] + "shapes")
    assert len(text) < len(captions[0]) / 2
    answer = embedded.ask(chats[0], settings=settings, stop=["shapes"])
    assert answer.choices[0].message.content == text
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", length)


@pytest.mark.parametrize("which", ["server", "embedded"])
def test_chat_talks_to_the_server(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Server = request.getfixturevalue(which)
    (tmp_path / "fast.json").write_text(json.dumps({"confidence_threshold": 0.02}))
    command = printed("transformers chat", Path(server.name)).replace("http://localhost:8000", server.url)
    command = f"{command.replace('=256', '=21')} --generation-config {tmp_path / 'fast.json'}"
    # An answer that its length has cut off is followed by the question whether to go on; the trained one ends itself.
    go_on = ["n"] if which == "server" else []
    typed = "\n".join([QUESTION, *go_on, "And the square?", *go_on, "!save", "!exit", ""])
    online = {**environment(tmp_path), "HF_HUB_OFFLINE": "0"}  # offline, its client refuses this machine too
    options: dict[str, Any] = {"env": online, "cwd": tmp_path, "input": typed, "capture_output": True, "text": True}
    done = subprocess.run(shlex.split(command), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = Path(server.name).glob("chat_2*.json")
    history = json.loads(saved.read_text())["chat_history"]
    saved.unlink()
    assert [turn["role"] for turn in history] == ["user", "assistant"] * 2
    for turn in (1, 3):
        assert history[turn]["content"] == streamed(server.expected(history[:turn])[0])


def test_snippet_of_the_manual_streams(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", MANUAL, re.M | re.S)
    photo = tiny.draw_scene(tmp_path / "photo.jpg")
    for there, here in {"http://localhost:8000": server.url, "Bard-VL-4B": server.name, "photo.jpg": photo}.items():
        assert there in snippet
        snippet = snippet.replace(there, str(here))
    names: dict[str, Any] = {}
    exec(snippet, names)
    messages = [{"role": "user", "content": names["content"]}]
    assert capsys.readouterr().out == streamed(server.expected(messages, **names["settings"])[0])


def test_a_checkpoint_without_code_or_block_size_is_served_by_the_package(folder: Path) -> None:
    published = make_published(folder.parent / "qwen", folder.parent / PUBLISHED.rpartition("/")[2])
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "mask_token_id": 447}))
    command = printed(f"python -m bard_vl.serving {PUBLISHED}", published)
    by_name = {"block_size": 16, "confidence_threshold": 0.5}
    with serving(command, folder.parent / "home of the package") as url:
        server = Server(published, url)
        plain = server.client.chat.completions.create(model=server.name, messages=CHATS["image"], max_tokens=21)
        assert plain.choices[0].message.content == server.expected(CHATS["image"], **by_name)[0]
        for own in ({"block_size": 4}, {"block_size": 8, "confidence_threshold": 0.9}):
            answer = server.ask(CHATS["image"], settings={"max_new_tokens": 21, **own})
            assert answer.choices[0].message.content == server.expected(CHATS["image"], **(by_name | own))[0]


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[Server]:
    """The package's own server of a folder whose code it does not trust."""
    with serving(
        f"{printed(OURS, folder)} --max-picture-pixels 20000 --max-new-tokens 40", folder.parent / "own"
    ) as url:
        yield Server(folder, url)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_code_in_the_folder_needs_no_trust_if_the_package_serves_it(ours: Server, name: str, stream: bool) -> None:
    text, _ = ours.expected(CHATS[name])
    answer = ours.ask(CHATS[name], stream=stream)
    if stream:
        assert "".join(part.choices[0].delta.content or "" for part in answer) == streamed(text)
    else:
        assert answer.choices[0].message.content == text


def picture(data: bytes, kind: str = "png") -> list[dict[str, Any]]:
    return asked_about(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def asked_about(address: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": address}, {"type": "text", "text": "What?"}]}
    ]


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (head, b"IDAT" + zlib.compress(b""), b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


TEXT = user(QUESTION)
NOT_TOLD = "a picture must be `data:image/...;base64,...`, got"
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({}, "malformed request: KeyError: 'messages'"),
    "empty": ({"messages": []}, "`messages` must be a list of turns with something in it, got []"),
    "a number": ({"messages": 5}, "`messages` must be a list of turns"),
    "no role": ({"messages": [{"content": "a"}]}, "a turn of `messages` must have a `role` of"),
    "no content": ({"messages": [{"role": "user"}]}, "the `content` of a turn must be a text or a list"),
    "an answer at the end": (
        {"messages": [*TEXT, {"role": "assistant", "content": "a"}]},
        "ends with the assistant's turn",
    ),
    "half an emoji": ({"messages": user("\ud83d")}, "the request holds half a character"),
    "an unknown item": ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "must be a text or a picture"),
    "a sound": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}]},
        "a text or a p",
    ),
    "a number as text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "a text or a picture",
    ),
    "calls that are none": (
        {"messages": [{"role": "assistant", "tool_calls": [{"a": 1}]}, *TEXT]},
        "malformed request",
    ),
    "a path": ({"messages": asked_about({"url": "/etc/hostname"})}, f"{NOT_TOLD} '/etc/hostname'"),
    "a file address": ({"messages": asked_about("file:///etc/hostname")}, NOT_TOLD),
    "an address": ({"messages": asked_about("http://127.0.0.1:1/a.png")}, NOT_TOLD),
    "bare base64": ({"messages": asked_about("aGVsbG8=")}, NOT_TOLD),
    "no address": ({"messages": asked_about({"url": 5})}, "`image_url` must be an address, got 5"),
    "a video": (
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/a"}}]}]},
        "a text or",
    ),
    "no base64": ({"messages": asked_about("data:image/png;base64,?!")}, "a picture cannot be read: "),
    "no picture": ({"messages": picture(b"hello")}, "a picture cannot be read: cannot identify image file"),
    "half a picture": ({"messages": picture(header_of(60, 60))}, "a picture cannot be read: "),
    "400 megapixels": ({"messages": picture(header_of(20_000, 20_000))}, "400000000 pixels"),
    "together": (
        {"messages": user(*[tiny.draw((100, 90))] * 3)},
        "a picture of 9000 pixels is too large: this server takes 2000 more",
    ),
    "seed": ({"seed": 2**70}, "`seed` must lie in"),
    "temperature": ({"temperature": "hot"}, "could not convert string to float: 'hot'"),
    "tokens": ({"max_tokens": -1}, "`max_new_tokens` must be an integer of at least 1, got -1"),
    "tokens of a list": ({"max_tokens": [1]}, "malformed request: TypeError"),
    "infinite tokens": ({"max_tokens": 1e400}, "cannot convert float infinity to integer"),
    "stop": ({"stop": 5}, "`stop_strings` must be a non-empty text or a list of them, got 5"),
    "bias of a word": ({"logit_bias": {"red": 1}}, "invalid literal for int"),
    "bias outside": ({"logit_bias": {"999999": 1}}, "`sequence_bias`: 999999 lies outside the vocabulary"),
    "a list of biases": ({"logit_bias": [1]}, "malformed request: AttributeError"),
    "another model": ({"model": "/etc"}, "Server is pinned to"),
    "an unknown field": ({"colour": "red"}, "Unexpected fields in the request: {'colour'}"),
    "settings that are none": (
        {"generation_config": "[1]"},
        "`generation_config` must be a JSON object of settings, got [1]",
    ),
    "broken settings": ({"generation_config": "{"}, "Expecting property name"),
    "a wrong setting": (
        {"generation_config": '{"confidence_threshold": 7}'},
        "`confidence_threshold` must be a number in",
    ),
    "the server's setting": ({"generation_config": '{"cache_implementation": "static"}'}, "is the server's to set"),
    "another output": ({"generation_config": '{"return_dict_in_generate": true}'}, "is the server's to set, got True"),
    "another template": (
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "may set add_vision_id, enable_thinking",
    ),
    "other pixels": ({"chat_template_kwargs": {"processor_kwargs": {}}}, "may set add_vision_id, enable_thinking, got"),
    "no room": ({"messages": user("a " * 6000)}, "a prompt reaches position"),
    "257 pictures": (
        {"messages": user(*[tiny.draw((8, 8))] * 257)},
        "a request may hold 256 pictures at this server, got 257",
    ),
    "a large block": ({"generation_config": '{"block_size": 129}'}, "`block_size` may be 128 at this server, got 129"),
    "large n-grams": ({"generation_config": '{"no_repeat_ngram_size": 65}'}, "`no_repeat_ngram_size` may be 64 at th"),
    "a long phrase": (
        {"generation_config": json.dumps({"bad_words_ids": [[5] * 33]})},
        "`bad_words_ids` may hold 1024 sequences of 32 tokens at this server, got 1 of 33 at most",
    ),
    "many biases": (
        {"generation_config": json.dumps({"sequence_bias": [[[5, n % 400], 1.0] for n in range(1025)]})},
        "`sequence_bias` may hold 1024 sequences of 32 tokens at this server, got 1025 of 2 at most",
    ),
    "many stops": ({"stop": [str(n) for n in range(9)]}, "`stop` may hold 8 texts of 256 characters at this server"),
    "a long stop": ({"stop": "a" * 257}, "`stop` may hold 8 texts of 256 characters at this server, got 1 of 257"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("settings", [{"max_new_tokens": 10**6}, {"max_length": 4000}, {"max_new_tokens": 7}], ids=str)
def test_a_response_ends_at_the_servers_limit(ours: Server, settings: dict[str, int], stream: bool) -> None:
    settings = {"eos_token_id": [], "confidence_threshold": 0.02, **settings}
    answer = ours.ask(CHATS["text"], settings=settings, stream=stream)
    last = list(answer)[-1] if stream else answer
    assert last.usage.completion_tokens == min(settings.get("max_new_tokens", 40), 40)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_client_are_4xx_with_their_message(ours: Server, name: str, stream: bool) -> None:
    change, message = FAULTS[name]
    body = {
        "model": ours.name,
        **({} if "messages" in change or name == "no messages" else {"messages": TEXT}),
        **change,
    }
    status, told = post(f"{ours.url}/v1/chat/completions", {**body, "stream": stream})
    assert 400 <= status < 500, told
    if "detail" in told:  # of transformers' own checks
        assert message in told["detail"]
    else:
        assert message in told["error"]["message"]
        assert told["error"]["type"] == "invalid_request_error"


def post(url: str, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_the_client_knows_its_fault_and_the_server_goes_on(ours: Server) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ours.ask(CHATS["text"], settings={**SETTINGS, "confidence_threshold": 7}, stream=stream)
        assert error.value.body["message"] == "`confidence_threshold` must be a number in [0.0, 1.0], got 7"
    plain = ours.client.chat.completions.create(model=ours.name, messages=CHATS["text"], max_tokens=9)
    assert (
        plain.choices[0].message.content == ours.expected(CHATS["text"], max_new_tokens=9, confidence_threshold=0.9)[0]
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": []}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}]},
        ),
        ("/v1/responses", {"input": [{"type": "input_image", "image_url": "http://127.0.0.1:1/a.png"}]}),
        ("/v1/responses", {"input": "a", "max_output_tokens": -1}),
        ("/v1/responses", {"input": [5]}),
        ("/v1/completions", {"prompt": ["a"]}),
        ("/v1/completions", {"prompt": ""}),
        ("/v1/completions", {"prompt": "a", "max_tokens": "x"}),
        ("/load_model", {"model": "/etc"}),
        ("/load_model", {"model": 5}),
        ("/reset", {}),
        ("/v1/systemone", {"state": "a", "questions": {"a": {}}}),
        ("/v1/audio/transcriptions", {}),
        ("/v1/chat/completions", b"[" * 100_000),
        ("/v1/chat/completions", b"[1]"),
        ("/v1/chat/completions", b"\xff"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_other_doors_are_closed_or_tell_their_faults(ours: Server, path: str, body: Any) -> None:
    status, told = post(f"{ours.url}{path}", body)
    assert 400 <= status < 500
    assert told


def test_responses_and_completions_answer(ours: Server) -> None:
    text, _ = ours.expected(CHATS["text"], max_new_tokens=9, confidence_threshold=0.9)
    answer = ours.client.responses.create(model=ours.name, input=QUESTION, max_output_tokens=9, stream=False)
    assert answer.output_text == text
    events = list(ours.client.responses.create(model=ours.name, input=QUESTION, max_output_tokens=9, stream=True))
    assert events[-1].response.output_text == streamed(text)
    assert ours.client.completions.create(model=ours.name, prompt="The image shows", max_tokens=5).choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
}
CALLED = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
TOOLS = [  # short, for this server's limit
    {"type": "function", "function": {"name": "a", "parameters": CALLED}},
    {"type": "function", "function": {"name": "b"}},
]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_form_that_a_request_asks_for(ours: Server, stream: bool) -> None:
    def ask(**options: Any) -> Any:
        answer = ours.ask(CHATS["text"], stream=stream, settings={"max_new_tokens": 40, "temperature": 1.5}, **options)
        if not stream:
            return answer.choices[0].message, answer.choices[0].finish_reason
        parts = [part.choices[0] for part in answer]
        calls = [call for part in parts for call in part.delta.tool_calls or []]
        told = type("Told", (), {"tool_calls": calls, "content": "".join(part.delta.content or "" for part in parts)})
        return told, parts[-1].finish_reason

    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}):
        told, _ = ask(response_format=wanted)
        value = json.loads(told.content)
        assert isinstance(value, dict)
        if wanted["type"] == "json_schema":
            assert value["colour"] in ("red", "blue")
            assert value["count"] in range(10)
    for choice, names in (("required", {"a", "b"}), ({"type": "function", "function": {"name": "a"}}, {"a"})):
        told, reason = ask(tools=TOOLS, tool_choice=choice)
        (call,) = told.tool_calls
        assert call.function.name in names
        assert json.loads(call.function.arguments).keys() == ({"a"} if call.function.name == "a" else set())
        assert reason == "tool_calls"
        assert not told.content
    for options, named in (
        ({"response_format": {"type": "xml"}}, "'xml'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}}, "colour"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "sing"}}}, "'sing'"),
        ({"tool_choice": "required"}, "no `tools`"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "string", "maxLength": 999}},
                }
            },
            "999",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "max_tokens": 3},
            "tokens at least",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=named):
            ask(**options)


def test_a_body_says_how_large_it_is_and_is_not_too_large(ours: Server) -> None:
    for header, told in (("Content-Length: 99999999", "413"), ("Transfer-Encoding: chunked", "411")):
        with socket.create_connection(("127.0.0.1", int(ours.url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
            assert connection.recv(4096).split()[1].decode() == told


def test_pictures_at_addresses_are_opened_on_request(folder: Path, tmp_path: Path) -> None:
    """Within the same limit of pixels, which Pillow then keeps."""
    tiny.draw((100, 90)).save(tmp_path / "small.png")
    (tmp_path / "large.png").write_bytes(header_of(20_000, 20_000))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        options = "--allow-addresses --max-picture-pixels 20000"
        with serving(f"{printed(OURS, folder)} {options}", folder.parent / "home that opens addresses") as url:
            server = Server(folder, url)
            address = f"http://127.0.0.1:{pictures.server_port}"
            expected = server.expected(user(Image.open(tmp_path / "small.png"), "What?"))[0]
            assert server.ask(asked_about(f"{address}/small.png")).choices[0].message.content == expected
            for place, message in (
                (f"{address}/large.png", "400000000 pixels"),
                (str(tmp_path / "small.png"), "or an http"),
            ):
                with pytest.raises(openai.BadRequestError, match=message):
                    server.ask(asked_about(place))
        pictures.shutdown()


def test_a_server_without_a_model_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bard_vl.serving", "--port", "0"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("error: no model: give a folder or Hub id.*\n", done.stderr), "that, and no library's warning"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-new-tokens", "0", "error: `--max-new-tokens` must be an integer of at least 1, got 0"),
        ("--block-size", "0", "error: `block_size` must be an integer of at least 1, got 0"),
        ("--max-picture-pixels", "0", "error: `--max-picture-pixels` must be an integer of at least 1, got 0"),
        ("--threshold", "7", "error: `confidence_threshold` must be a number in [0.0, 1.0], got 7.0"),
    ],
)
def test_wrong_options_end_the_server(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", "x", option, value])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_an_old_transformers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.8.1")
    with pytest.raises(SystemExit, match=r"^error: serving needs transformers 5.9.0 or newer, this is 5.8.1$"):
        main()


TOO_OLD = [line for line in fresh.LINES[1:] if Version(fresh.line_name(line)) < Version("5.9")]


@pytest.mark.process(group="lines")
@pytest.mark.parametrize("line", TOO_OLD, ids=fresh.line_name)
def test_lines_too_old_to_serve_say_so(tmp_path: Path, line: str) -> None:
    said = rf"SystemExit: error: serving needs transformers 5\.9\.0 or newer, this is {re.escape(Path(line).name)}\n$"
    with pytest.raises(AssertionError, match=said):
        fresh.call("bard_vl.serving.__main__.main", home=tmp_path, line=line, package=True)
