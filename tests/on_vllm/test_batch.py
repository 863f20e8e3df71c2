"""Workers of `bard-vl batch` that decode by vLLM give the answers of those that decode by `generate`."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from oracle import make_checkpoint

pytest.importorskip("pyarrow", reason="bard-vl[batch] is not in this environment")
from bard_vl.batch.requests import Asking, Request
from bard_vl.batch.workers import Recipe, VllmWorker, Worker


def test_answers_are_those_of_generate(tmp_path: Path) -> None:
    settings = {"max_new_tokens": 21, "confidence_threshold": 0.02}
    where = {"dtype": "float32", "min_pixels": 3000, "max_pixels": 6000}
    recipe = Recipe(str(make_checkpoint(tmp_path)), settings, Asking(system="Be brief."), where)
    picture = str(tiny.draw_scene(tmp_path / "1.png", (128, 96)))
    requests = [
        Request(1, "a", {"prompt": "What is it?"}),
        Request(2, "b", {"prompt": "What is it?", "images": [picture]}),
        Request(3, "c", {"prompt": "Which?", "images": [picture, str(tiny.draw_scene(tmp_path / "2.png"))]}),
        Request(4, "d", {"prompt": 5}),
    ]
    expected = Worker(recipe).answer(requests)
    worker = VllmWorker(replace(recipe, engine="vllm"))
    found = worker.answer(requests)
    for answer in expected:
        answer.pop("forwards", None)
    assert found == expected
    refused = VllmWorker(replace(recipe, settings={**settings, "repetition_penalty": 1.2}))
    refused.engine = worker.engine
    assert all("repetition_penalty" in answer["error"] for answer in refused.answer(requests[:2]))
