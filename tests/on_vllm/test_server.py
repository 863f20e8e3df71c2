"""vLLM's OpenAI server with the plugin, blocks of 16 and two ranks of tensor parallelism, asked by the real client."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from oracle import Oracle, make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving as benchmark

pytestmark = pytest.mark.process

SETTINGS = {"confidence_threshold": 0.02, "max_new_tokens": 40, "block_size": 16}


class Server:
    """A running server, and what `generate` says without it."""

    def __init__(self, folder: Path, url: str, log: Path):
        self.name, self.url, self.log, self.oracle = str(folder), url, log, Oracle(folder)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=200)

    def ask(self, messages: list[dict[str, Any]], *, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        stated = {"model": self.name, "messages": messages, "max_tokens": 40, "temperature": 0}
        body = {"return_token_ids": True, **(extra or {})}
        return self.client.chat.completions.create(**{**stated, **options}, extra_body=body)

    def expected(self, messages: list[dict[str, Any]], **settings: Any) -> list[int]:
        return self.oracle.see(messages, **{**SETTINGS, **settings}).tokens[0]

    def gauge(self, name: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.M))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    room = tmp_path_factory.mktemp("served")
    folder, log = make_checkpoint(room), room / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--port", port, "--host", "127.0.0.1", "--max-model-len", 512, "--max-num-seqs", 4, "--enforce-eager"]
    command += ["--tensor-parallel-size", 2, "--hf-overrides", '{"block_size": 16}', "--block-size", 32]
    command += ["--override-generation-config", '{"confidence_threshold": 0.02}', *benchmark.LOGGED]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    variables["VLLM_LOGGING_LEVEL"] = "INFO"  # the benchmark counts what is logged
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), env=variables, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Server(folder, url, log)
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def tokens(reply: Any) -> list[int]:
    """Ids of an answer, or of a part of one: the texts of this model are half characters, which streams keep back."""
    return (reply.choices[0].model_extra or {}).get("token_ids") or []


def text(words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": words}]


QUESTIONS = ["What is the colour of the circle?", "How many?", "Describe the image. It shows a star.", "one, two"]


def test_questions_together_with_a_threshold_each(server: Server) -> None:
    thresholds = (0.01, 0.02, 0.05, 0.9)

    def ask(place: int) -> Any:
        return server.ask(text(QUESTIONS[place]), extra={"vllm_xargs": {"confidence_threshold": thresholds[place]}})

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, range(4)))
    for place, reply in enumerate(replies):
        said = server.expected(text(QUESTIONS[place]), confidence_threshold=thresholds[place])
        assert (tokens(reply), reply.usage.completion_tokens) == (said, len(said))


def test_pictures_in_a_stream_of_a_part_for_each_block(server: Server) -> None:
    pictures, parts = [tiny.draw((96, 64), 3), tiny.draw((64, 128), 4)], []
    for picture in pictures:
        data = io.BytesIO()
        picture.save(data, "PNG")
        address = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    question = {"type": "text", "text": "Which one?"}
    mine = [{"role": "user", "content": [*({"type": "image", "image": each} for each in pictures), question]}]
    said = server.expected(mine, eos_token_id=[])
    stream = server.ask([{"role": "user", "content": [*parts, question]}], stream=True, extra={"ignore_eos": True})
    deltas = [tokens(chunk) for chunk in stream if chunk.choices]
    assert [each for each in deltas if each] == [said[:16], said[16:32], said[32:]]


def test_the_servers_own_defaults_are_greedy_and_bounded_by_the_request_alone(server: Server) -> None:
    own = {"temperature": openai.NOT_GIVEN, "max_tokens": 300}  # the checkpoint states 256
    reply = server.ask(text(QUESTIONS[0]), extra={"ignore_eos": True}, **own)
    assert tokens(reply) == server.expected(text(QUESTIONS[0]), max_new_tokens=300, eos_token_id=[])
    assert reply.usage.completion_tokens == 300


def test_a_conversation_goes_on(server: Server) -> None:
    messages = text(QUESTIONS[2])
    for question in (QUESTIONS[0], QUESTIONS[3]):
        reply = server.ask(messages)
        assert tokens(reply) == server.expected(messages)
        messages = [*messages, {"role": "assistant", "content": reply.choices[0].message.content}, *text(question)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ({"extra": {"vllm_xargs": {"confidence_threshold": 2}}}, "confidence_threshold.*2"),
        ({"extra": {"vllm_xargs": {"steps": 2}}}, "denoising_steps.*got steps"),
        ({"frequency_penalty": 1.0}, "frequency_penalty=1.0"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_a_wrong_request_is_told_so(server: Server, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        server.ask(text(QUESTIONS[1]), **options)


def test_the_benchmark_counts_what_the_server_does(server: Server) -> None:
    arguments = benchmark.read_arguments(["--vllm", server.name, "--requests", "2", "--max-tokens", "24"])
    measured = benchmark.Server("vllm", server.name, [])
    result = benchmark.measure(measured, server.url, server.log, 1, arguments)
    figures = result.figures(16)
    assert [reply.tokens for reply in result.replies] == [24] * 2
    assert len({reply.text for reply in result.replies}) > 1
    # Four blocks, one request after the other: a step is a forward, a prompt takes one more.
    assert 4 <= result.counts["steps"] <= 4 * 16
    assert result.counts["forwards"] == result.counts["steps"] + 2
    assert figures["steps per block"] == result.counts["steps"] / 4
    assert benchmark.to_markdown([result], 16).count("\n") == 2


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    extra = {"ignore_eos": True, "vllm_xargs": {"confidence_threshold": 1.0}}
    before = server.gauge("generation_tokens_total")
    stream = server.ask(text(QUESTIONS[0]), max_tokens=400, stream=True, extra=extra)
    next(iter(stream))
    stream.close()
    while server.gauge("num_requests_running"):
        time.sleep(0.1)
    assert server.gauge("generation_tokens_total") - before < 400
    assert tokens(server.ask(text(QUESTIONS[1]))) == server.expected(text(QUESTIONS[1]))


def test_a_seed_is_warned_of(server: Server) -> None:
    assert "is a seed: until it is trained for block diffusion it writes nonsense" in server.log.read_text()
