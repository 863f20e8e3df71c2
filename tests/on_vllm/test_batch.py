"""Workers of `bard-vl batch` that decode by vLLM give the answers of those that decode by `generate`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from bard_vl.batch.requests import Asking, Request
from bard_vl.batch.workers import Recipe, VllmWorker, Worker
from oracle import IDS, Oracle, make_checkpoint

pytestmark = pytest.mark.process  # vLLM asks what CPU it runs on

LONG = {"max_new_tokens": 41, "confidence_threshold": 0.02}
QUESTION = "What is it?"


def test_answers_are_those_of_generate(tmp_path: Path) -> None:
    """Pictures or none, an end of the checkpoint, its own length, a stop string; what is refused has an error."""
    folder = make_checkpoint(tmp_path)
    (response,) = Oracle(folder).see([{"role": "user", "content": QUESTION}], **LONG).tokens
    stored = json.loads((folder / "generation_config.json").read_text())
    own = {"max_new_tokens": 10, "eos_token_id": [IDS.eos_token_id, response[21]]}
    tiny.write_json(folder / "generation_config.json", {**stored, **own})
    pictures = [str(tiny.draw_scene(tmp_path / f"{width}.png", (width, 96))) for width in (64, 128)]
    bodies = [{"prompt": QUESTION}, {"prompt": QUESTION, "images": pictures[:1]}, {"prompt": 5}]
    bodies += [{"prompt": "Which?", "images": pictures}]
    requests = [Request(row, f"question {row}", body) for row, body in enumerate(bodies, 1)]
    where = {"dtype": "float32", "min_pixels": 3000, "max_pixels": 6000}
    room = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4}
    recipe = Recipe(str(folder), LONG, Asking(), where, engine="vllm", vllm=room)
    first = VllmWorker(recipe)

    def ask(**settings: Any) -> list[dict[str, Any]]:
        worker = VllmWorker(replace(recipe, settings=settings))
        worker.engine = first.engine
        return worker.answer(requests)

    said = Worker(recipe).answer(requests)
    assert said[0]["finish_reason"] == "eos"
    assert {"length", None} <= {answer.get("finish_reason") for answer in said}
    assert ask(**LONG) == [without_forwards(answer) for answer in said]
    brief = Worker(replace(recipe, settings={"confidence_threshold": 0.02})).answer(requests)
    assert ask(confidence_threshold=0.02) == [without_forwards(answer) for answer in brief]
    stop = re.findall(r"[!-~]{2}", said[1]["text"])[0]
    stopped = ask(**LONG, stop_strings=[stop])[1]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == said[1]["text"].partition(stop)[0] + stop
    assert "repetition_penalty" in ask(**LONG, repetition_penalty=1.2)[0]["error"]


def without_forwards(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "forwards"}
