"""Another checkout of the package as a contender: its `generate` in a process of its own, same weights, same prompts.

A process imports one `bard_vl`. So `CheckoutContender` starts this file with the other checkout first on the path, and
asks it for one call after another over pipes. What that adds, JSON of some thousand ids, is under 1 ms per call.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import Decoded, EngineContender, Task
from shapes import SHAPES, build_model


class CheckoutContender:
    """`generate` of the package in another folder; `settings` are further arguments of it.

    Args:
        name: what tables call it.
        folder: root of the checkout.
        model: what `build_model` is called with there: shape (by name), device, dtype (by name) and seed.
        is_batched: whether it decodes all prompts together.
        settings: further arguments of `generate`, as JSON can tell them.
    """

    is_block_diffusion, is_in_process = True, False

    def __init__(self, name: str, folder: Path, model: dict[str, Any], is_batched: bool, **settings: Any):
        self.name, self.is_batched = name, is_batched
        self.dtype, self.is_optional = getattr(torch, model["dtype"]), bool(settings)
        self.num_warm_ups = 2 if settings or model["device"] != "cpu" else 1
        self.path = tempfile.TemporaryDirectory()
        Path(self.path.name, "bard_vl").symlink_to(folder.resolve())
        paths = [self.path.name, *filter(None, [os.environ.get("PYTHONPATH")])]
        start = {"model": model, "is_batched": is_batched, "settings": settings, "threads": torch.get_num_threads()}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
        """See `Contender`.

        Raises:
            RuntimeError: the process has ended; its own message is on stderr.
        """
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        print(json.dumps({"prompts": [prompt.tolist() for prompt in prompts], "task": asdict(task)}), file=asked)
        asked.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        decoded = json.loads(answer)
        return Decoded(decoded["tokens"], Counter(decoded["forwards"]))


def serve(start: dict[str, Any]) -> None:
    """Answer each line of standard input, a call, with a line on standard output."""
    torch.set_num_threads(start["threads"])
    asked, device = start["model"], torch.device(start["model"]["device"])
    model = build_model(SHAPES[asked["shape"]], device, getattr(torch, asked["dtype"]), asked["seed"])
    contender = EngineContender("", model, start["is_batched"], **start["settings"])
    for line in sys.stdin:
        call = json.loads(line)
        prompts = [torch.tensor(prompt, device=device) for prompt in call["prompts"]]
        decoded = contender.decode(prompts, Task(**call["task"]))
        print(json.dumps({"tokens": decoded.tokens, "forwards": decoded.forwards}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
