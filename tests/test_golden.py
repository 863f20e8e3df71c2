"""The reference's outputs on tiny random models, token for token (invariant 1)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
VISUAL = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@cache
def load(folder: str) -> tuple[BardVLForConditionalGeneration, dict[str, torch.Tensor], dict[str, dict]]:
    path = GOLDEN / folder
    model = BardVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    cases = {case["case"]: case for case in json.loads((path / "cases.json").read_text())}
    return model, load_file(path / "cases.safetensors"), cases


def cases_of(op: str) -> list[tuple[str, str]]:
    return [
        (folder, case["case"])
        for folder in ("untied", "tied")
        for case in json.loads((GOLDEN / folder / "cases.json").read_text())
        if case["op"] == op
    ]


def tensors_of(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    return {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(case + ".")}


@pytest.mark.parametrize("attention", ["bard_vl", "sdpa", "eager"])
@pytest.mark.parametrize(("folder", "case"), cases_of("prefill_logits"))
def test_block_causal_prefill_logits(folder: str, case: str, attention: str) -> None:
    model, tensors, cases = load(folder)
    golden = tensors_of(tensors, case)
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            logits = model(
                input_ids=golden["input_ids"],
                block_size=cases[case]["block_size"],
                logits_to_keep=6,
                **{name: golden[name] for name in VISUAL if name in golden},
            ).logits
    finally:
        model.set_attn_implementation("bard_vl")
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    positions = model.get_position_ids(
        golden["input_ids"], **{name: golden.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    )
    assert torch.equal(positions[1:], golden["position_ids"])


MODES = {
    "as it comes": {},
    "one block a chunk": {"prefill_chunk_size": 1},
    "the host looks every third step": {"check_interval": 3},
    "both": {"prefill_chunk_size": 1, "check_interval": 5},
    "static": {"cache_implementation": "static"},
    "static, one block a chunk": {"cache_implementation": "static", "prefill_chunk_size": 1},
    "static, the host looks every third step": {"cache_implementation": "static", "check_interval": 3},
}


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("folder", "case"), cases_of("generate"))
def test_generated_tokens_and_steps(folder: str, case: str, mode: str) -> None:
    model, tensors, cases = load(folder)
    golden, arguments = tensors_of(tensors, case), cases[case]["arguments"]
    inputs = {name: golden[name] for name in ("input_ids", *VISUAL) if name in golden}
    with torch.compiler.set_stance("force_eager"):  # what runs where nothing can be compiled; see test_compilation
        ids, stats = model.generate(inputs, return_step_stats=True, **arguments, **MODES[mode])
    expected = golden["output_ids"][0, : arguments["max_new_tokens"]].tolist()
    if arguments["eos_token_id"] in expected:
        expected = expected[: expected.index(arguments["eos_token_id"]) + 1]
    assert ids[0].tolist() == expected
    assert torch.equal(stats["block_step_counts"], golden["block_step_counts"])
    assert stats["num_response_tokens"] == len(expected)


@pytest.mark.parametrize(("folder", "case"), cases_of("packed_logits"))
def test_explicit_mask_passes_through(folder: str, case: str) -> None:
    model, tensors, cases = load(folder)
    golden = tensors_of(tensors, case)
    expected = golden["noisy_logits"]
    first = cases[case]["prompt_length"] + cases[case]["padded_response_length"]
    with torch.no_grad():
        logits = model(
            input_ids=golden["input_ids"],
            attention_mask=golden["attention_mask"],
            position_ids=golden["position_ids"],
            logits_to_keep=torch.arange(first, first + expected.shape[1]),
            **{name: golden[name] for name in VISUAL if name in golden},
        ).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
