r"""Servers side by side: clients that each ask about a picture after a picture, in streams, and what they wait for.

    python benchmarks/serving.py --transformers Bard-VL-4B --vllm Bard-VL-4B --qwen Qwen3-VL-4B-Instruct
    python benchmarks/serving.py --vllm Bard-VL-4B --clients 8 --json serving.json -- --max-model-len 8192

It starts one server after the other, those that are asked for:
- `python -m bard_vl.serving`, which is `transformers serve` with this package's classes,
- vLLM with the plugin,
- vLLM with a Qwen3-VL: give the one that the Bard-VL was made of, and both have the same shapes.

Every server gets the same pictures and questions by the `openai` client. Options behind `--` are vLLM's.
Answers go on to `--max-tokens` where the server can ignore ends, as vLLM can. Forwards and steps are what vLLM counts.
vLLM's steps on a CPU run in Triton's interpreter, where seconds mean nothing: there tokens and counts are what is
measured, and `agreement` says how many answers of the two Bard-VL servers are the same.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from bard_vl.evaluation.scenes import scene

QUESTION = "Describe the picture."  # which the small checkpoint of the examples has learnt to do
STEPS = "vllm:diffusion_num_denoising_steps_total"
# vLLM's counters leave out forwards that no client gets a token of; its log has a line for each.
LOGGED = ["--enable-logging-iteration-details"]
FORWARD = re.compile(r" Iteration\(\d+\): ")


@dataclass
class Server:
    """A server to measure.

    Attributes:
        name: `transformers`, `vllm` or `qwen`.
        model: folder or Hub id.
        options: of its command.
    """

    name: str
    model: str
    options: list[str]

    @property
    def is_vllm(self) -> bool:
        """Whether it runs on vLLM."""
        return self.name != "transformers"

    @contextlib.contextmanager
    def running(self, log: Path) -> Iterator[str]:
        """Its address, while it runs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        module = ["vllm.entrypoints.openai.api_server", "--model"] if self.is_vllm else ["bard_vl.serving"]
        place = ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as output:
            command = [sys.executable, "-m", *module, self.model, *place, *self.options]
            command += LOGGED if self.is_vllm else []
            variables = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
        url = f"http://127.0.0.1:{port}"
        try:
            while not answers(f"{url}/health"):
                if process.poll() is not None:
                    sys.exit(f"error: {shlex.join(command)} ended; {log} tells why")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait()


@dataclass
class Reply:
    """An answer in a stream.

    Attributes:
        text: of it.
        tokens: of it, as the server counts; parts where it does not.
        times: seconds from the request to each part that came.
    """

    text: str
    tokens: int
    times: list[float]


@dataclass
class Result:
    """The measurements of a server with a number of clients.

    Attributes:
        seconds: from the first request to the last part.
        replies: one per request, in the order of the pictures.
        counts: what vLLM counted: forwards, and denoising steps of all requests together.
    """

    server: str
    clients: int
    seconds: float
    replies: list[Reply]
    counts: dict[str, int] = field(default_factory=dict)

    def figures(self, block_size: int) -> dict[str, float]:
        """Figures of the raw numbers; `block_size` is that of Bard-VL, 1 for Qwen3-VL."""
        between = [b - a for reply in self.replies for a, b in zip(reply.times, reply.times[1:], strict=False)]
        tokens = sum(reply.tokens for reply in self.replies)
        blocks = sum(-(-reply.tokens // block_size) for reply in self.replies)
        figures = {
            "tokens": tokens,
            "tokens/s": tokens / self.seconds,
            "ms to first block": 1000 * statistics.median(reply.times[0] for reply in self.replies if reply.times),
        }
        if between:
            figures["ms per block"] = 1000 * statistics.median(between)
        if "forwards" in self.counts:
            figures["forwards"] = self.counts["forwards"]
        if self.counts.get("steps"):
            figures["steps per block"] = self.counts["steps"] / blocks
        return figures


def answers(url: str) -> bool:
    """Whether something answers there."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def picture(index: int) -> str:
    """Picture number `index` as the address that a request gives."""
    data = io.BytesIO()
    scene(False, 0, index).draw().save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def counters(url: str, log: Path) -> dict[str, int]:
    """The work of vLLM since its start: forwards, and denoising steps of all requests together."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    steps = re.findall(rf"^{STEPS}(?:{{.*}})? (\S+)$", text, re.M)
    forwards = len(FORWARD.findall(log.read_text(encoding="utf-8", errors="replace")))
    return {"forwards": forwards, **({"steps": int(sum(map(float, steps)))} if steps else {})}


def ask(client: Any, server: Server, index: int, max_tokens: int, threshold: float | None) -> Reply:
    """Ask about a picture."""
    content = [{"type": "image_url", "image_url": {"url": picture(index)}}, {"type": "text", "text": QUESTION}]
    extra: dict[str, Any] = {"ignore_eos": True} if server.is_vllm else {}
    if threshold is not None and server.name == "vllm":
        extra["vllm_xargs"] = {"confidence_threshold": threshold}
    if threshold is not None and not server.is_vllm:
        settings = {"confidence_threshold": threshold, "max_new_tokens": max_tokens}
        extra["generation_config"] = json.dumps(settings)
    start, text, times, usage = time.perf_counter(), "", [], None
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            times.append(time.perf_counter() - start)
    return Reply(text, usage.completion_tokens if usage else len(times), times)


def measure(server: Server, url: str, log: Path, clients: int, arguments: argparse.Namespace) -> Result:
    """Let `clients` ask at once, each `--requests` times in a row."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)
    ask(client, server, 10_000, arguments.max_tokens, arguments.threshold)  # nobody waits for what happens once
    before = counters(url, log) if server.is_vllm else {}
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        asked = [
            pool.submit(ask, client, server, index, arguments.max_tokens, arguments.threshold)
            for index in range(clients * arguments.requests)
        ]
        replies = [each.result() for each in asked]
    seconds = time.perf_counter() - start
    after = counters(url, log) if server.is_vllm else {}
    counts = {name: value - before.get(name, 0) for name, value in after.items()}
    return Result(server.name, clients, seconds, replies, counts)


def agreement(results: list[Result]) -> dict[int, float]:
    """Share of answers that both Bard-VL servers gave, by the number of clients."""
    said = {(result.server, result.clients): [reply.text for reply in result.replies] for result in results}
    numbers = {clients for name, clients in said if name == "vllm" and ("transformers", clients) in said}
    return {
        n: statistics.mean(
            one.startswith(other) or other.startswith(one)  # one of them goes on behind an end
            for one, other in zip(said["vllm", n], said["transformers", n], strict=True)
        )
        for n in sorted(numbers)
    }


def to_markdown(results: list[Result], block_size: int) -> str:
    """A row for each server and number of clients."""
    columns = ["tokens", "tokens/s", "ms to first block", "ms per block", "forwards", "steps per block"]
    lines = [" | ".join(["| server", "clients", *columns, ""]).rstrip(), "|" + "---|" * (len(columns) + 2)]
    for result in results:
        figures = result.figures(1 if result.server == "qwen" else block_size)
        cells = [f"{figures[name]:,.4g}" if name in figures else "" for name in columns]
        lines.append(" | ".join([f"| {result.server}", str(result.clients), *cells, ""]).rstrip())
    return "\n".join(lines)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", metavar="BARD", help="serve this Bard-VL by transformers")
    parser.add_argument("--vllm", metavar="BARD", help="serve this Bard-VL by vLLM")
    parser.add_argument("--qwen", metavar="QWEN", help="serve this Qwen3-VL by vLLM")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once, default: 1 8 32")
    parser.add_argument("--requests", type=int, default=4, help="of each client, default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer, default: %(default)s")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument("--block-size", type=int, default=16, help="to count blocks by, default: %(default)s")
    parser.add_argument("--json", type=Path, help="where raw results go")
    parser.add_argument(
        "--logs", type=Path, default=Path("serving-logs"), help="what servers print, default: %(default)s"
    )
    stated, options = arguments, []
    if "--" in arguments:
        stated, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parsed = parser.parse_args(stated)
    parsed.options = options
    if not (parsed.transformers or parsed.vllm or parsed.qwen):
        parser.error("nothing to measure: give --transformers, --vllm or --qwen")
    return parsed


def main(command: list[str]) -> None:
    """Measure, print a table, and store what was measured."""
    arguments = read_arguments(command)
    asked = {name: getattr(arguments, name) for name in ("transformers", "vllm", "qwen")}
    results: list[Result] = []
    arguments.logs.mkdir(parents=True, exist_ok=True)
    for name, model in asked.items():
        if model is None:
            continue
        server = Server(name, model, arguments.options if name != "transformers" else [])
        log = arguments.logs / f"{name}.log"
        with server.running(log) as url:
            results += [measure(server, url, log, clients, arguments) for clients in arguments.clients]
    print(to_markdown(results, arguments.block_size))
    for clients, share in agreement(results).items():
        print(f"\n{clients} clients: {share:.0%} of the answers of `transformers` and `vllm` are the same")
    if arguments.json:
        figures = [result.figures(1 if result.server == "qwen" else arguments.block_size) for result in results]
        rows = [asdict(result) | {"figures": each} for result, each in zip(results, figures, strict=True)]
        stored = {"command": command, "cpus": os.cpu_count(), "results": rows}
        arguments.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
