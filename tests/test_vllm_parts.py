"""The parts of the vLLM plugin that need no vLLM: attention, denoising, settings. tests/on_vllm tests the rest."""

import contextlib
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bard_vl import BardVLConfig, BardVLGenerationConfig
from bard_vl.generation_config_bard_vl import SETTINGS, DecodingSettings, Setting, passes
from bard_vl.inputs_bard_vl import Prompt
from bard_vl.masking_bard_vl import block_visibility
from bard_vl.remasking_bard_vl import REMASKING_RULES
from bard_vl.rows_bard_vl import Denoiser, Rows
from bard_vl.serving.vllm import canvas_length, is_tested
from bard_vl.serving.vllm import denoising as parts
from bard_vl.serving.vllm.denoising import Blocks
from bard_vl.serving.vllm.pieces import cut, whole_blocks
from bard_vl.serving.vllm.settings import BOUNDS, OF_REQUESTS, read_checkpoint, request_settings, stated_block_size
from ragged import partition_sequence
from tiny import IDS, qwen3vl_config

MASK, VOCABULARY = 30, 32


def shown(pieces: Any, row: int, start: int, count: int, num_keys: int) -> torch.Tensor:
    """(count, keys) what the queries of a row see by its pieces."""
    mine = [piece for piece, owner in enumerate(pieces.rows) if owner == row]
    ends = [pieces.ends[piece] for piece in mine for _ in range(pieces.bounds[piece + 1] - pieces.bounds[piece])]
    assert len(ends) == count
    assert ends[-1] == start + count
    return torch.arange(num_keys) < torch.tensor(np.array(ends))[:, None]


def test_pieces_show_what_the_masks_of_the_package_show() -> None:
    for block_size in (1, 2, 3, 4, 8):
        lengths = np.arange(1, 20)
        partition = partition_sequence(torch.tensor(lengths), 40, block_size)
        visible = block_visibility(partition, partition)
        whole = -(-(lengths + 2 * block_size) // 1)
        pieces = cut(np.zeros_like(lengths), whole, lengths, block_size)
        for row, count in enumerate(whole):
            assert torch.equal(shown(pieces, row, 0, count, count), visible[row, :count, :count])
        # In steps that end with blocks, each of a few tokens at most, and with other rows beside it.
        start = np.zeros_like(lengths)
        while (start < whole).any():
            wanted = np.minimum(whole - start, 2 * block_size + 1)
            count = np.array(
                [
                    n if first + n == end else whole_blocks(first, n, length, block_size)
                    for first, n, length, end in zip(start, wanted, lengths, whole, strict=True)
                ]
            )
            pieces = cut(start, count, lengths, block_size)
            for row, (first, n) in enumerate(zip(start, count, strict=True)):
                assert n or first == whole[row]
                if n:
                    seen = shown(pieces, row, first, n, first + n)
                    assert torch.equal(seen, visible[row, first : first + n, : first + n])
            start = start + count


def settings_of(**stated: Any) -> DecodingSettings:
    config = SimpleNamespace(
        block_size=8, mask_token_id=MASK, get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY)
    )
    return DecodingSettings.resolve(BardVLGenerationConfig(**stated), config, 0)


def alone(settings: DecodingSettings, logits: list[torch.Tensor], seed: int) -> list[list[int]]:
    """Ids after each step of a block that the package's own denoiser decides."""
    prompt = torch.zeros(1, 1, dtype=torch.long)
    rows = Rows.lay_out(Prompt.realign(prompt, prompt + 1, prompt[None].expand(3, 1, 1), {}), [8], 8, MASK, 17)
    denoiser, owner = Denoiser(settings, torch.device("cpu")), torch.tensor([0])
    generator, ids = torch.Generator().manual_seed(seed), []
    for step in logits:
        if (rows.ids[0, 1:9] == MASK).any():
            denoiser.decide(rows, owner, denoiser.choose(rows, owner, step[None], generator))
        ids.append(rows.ids[0, 1:9].tolist())
    return ids


@pytest.mark.parametrize("tile", [1, 2**30])
def test_blocks_of_mixed_settings_denoise_as_each_alone(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TILE", tile)
    mixed = [settings_of(remasking_strategy=name, denoising_steps=n) for name in REMASKING_RULES for n in (1, 3, 8)]
    mixed += [settings_of(confidence_threshold=threshold) for threshold in (0.0, 0.2, 1.0)]
    mixed += [settings_of(temperature=0.8), settings_of(temperature=2.0, top_k=5, denoising_steps=4)]
    slots = np.random.default_rng(0).permutation(len(mixed) + 3)[: len(mixed)]
    blocks = Blocks(len(mixed) + 3, 8, MASK, torch.device("cpu"))
    for slot, settings in zip(slots, mixed, strict=True):
        blocks.begin(int(slot), settings, seed=int(slot))
    logits = [2 * torch.randn(len(mixed), 8, VOCABULARY, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    expected = [alone(settings, [step[row] for step in logits], int(slots[row])) for row, settings in enumerate(mixed)]
    ended: set[int] = set()
    for number, step in enumerate(logits):
        ids, finished = blocks.advance(slots, step)
        for row in set(range(len(mixed))) - ended:
            assert ids[row].tolist() == expected[row][number], mixed[row]
            if finished[row]:
                ended.add(row)
                assert blocks.ids[slots[row]].tolist() == [MASK] * 8
                assert blocks.step[slots[row]] == 0
    assert len(ended) == len(mixed)  # the last of eight steps takes what is left
    assert len({tuple(map(tuple, ids)) for ids in expected}) > len(mixed) // 2  # the settings do differ


def model_config(**changes: Any) -> Any:
    """The part of vLLM's config of a model that the settings read."""
    config = BardVLConfig(**qwen3vl_config(), block_size=4, mask_token_id=IDS["small"].mask_token_id)
    stated = {"model": "nowhere", "revision": None, "generation_config": "vllm", "override_generation_config": {}}
    return SimpleNamespace(**{**stated, "hf_config": config, **changes})


def params(**changes: Any) -> Any:
    """vLLM's parameters of a request, as far as they are read."""
    stated = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "extra_args": None, "min_p": 0.0, "min_tokens": 0}
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    return SimpleNamespace(**{**stated, **neutral, **changes})


def test_a_request_states_what_generate_takes() -> None:
    served = model_config(override_generation_config={"confidence_threshold": 0.7, "max_new_tokens": None})
    read_checkpoint(served)
    plain = request_settings(params(), served.hf_config)
    assert (plain.bound, plain.denoising_steps, plain.samples) == (0.7, 4, False)
    own = {"confidence_threshold": 0.1, "denoising_steps": 2, "remasking_strategy": "low_confidence_dynamic"}
    for rule, bound in (({}, 0.1), ({"remasking_strategy": "factor", "factor": 2.0}, 2.0)):
        asked = params(temperature=0.5, top_k=-1, extra_args={**own, **rule})
        stated = asdict(request_settings(asked, served.hf_config))
        stated |= stated.pop("sampling")
        wanted = {**own, **rule, "bound": bound, "temperature": 0.5, "top_k": 0}
        assert {name: stated[name] for name in wanted if name in stated} == {
            name: value for name, value in wanted.items() if name not in BOUNDS
        }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra_args": {"confidence_threshold": 2}}, "confidence_threshold.*2"),
        ({"extra_args": {"denoising_steps": 5}}, "denoising_steps.*5"),
        ({"extra_args": {"remasking_strategy": "best"}}, "remasking_strategy.*best"),
        ({"extra_args": {"block_size": 8}}, f"{OF_REQUESTS[0]}.*block_size"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"logprobs": 1}, "logprobs=1"),
        ({"min_tokens": 3}, "min_tokens=3"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    served = model_config()
    read_checkpoint(served)
    with pytest.raises(ValueError, match=said):
        request_settings(params(**changes), served.hf_config)


@pytest.mark.parametrize("row", SETTINGS.values(), ids=SETTINGS)
def test_a_checkpoint_that_asks_for_other_tokens_is_refused(row: Setting) -> None:
    """Settings that the table sends to the plugin are taken, all others refused unless they ask for nothing."""
    some = (*row.allowed.get("choices", ()), "x", 1, 2, 0.25, [5], [[5, 6]], [[[5, 6], 0.5]])
    value = next(value for value in some if value not in row.off and passes(row, value))
    with contextlib.nullcontext() if "vllm" in row.reaches else pytest.raises(ValueError, match=f"{row.name}=.*plugin"):
        read_checkpoint(model_config(override_generation_config={row.name: value}))
    for neutral in row.off:
        read_checkpoint(model_config(override_generation_config={row.name: neutral}))


def test_what_the_plugin_does_not_do() -> None:
    assert {name for name, row in SETTINGS.items() if "vllm" not in row.reaches} == {
        *("revision", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
        *("sequence_bias", "stop_strings", "max_time", "seed", "concurrent_blocks"),
    }


def test_block_size_and_threshold_of_a_published_name() -> None:
    name = "fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct"
    published = model_config(model=name)
    published.hf_config.block_size, published.hf_config._name_or_path = None, name
    assert stated_block_size(published.hf_config) == 16
    (notice,) = read_checkpoint(published)
    assert "confidence threshold 0.5" in notice
    assert request_settings(params(), published.hf_config).bound == 0.5
    published.hf_config.block_size, published.hf_config._name_or_path = None, "some-folder"
    with pytest.raises(ValueError, match=r"some-folder: neither config.json nor the name states the block size"):
        stated_block_size(published.hf_config)


def test_another_version_of_vllm_is_refused_by_name() -> None:
    config = model_config().hf_config
    assert is_tested("0.32.7+cpu")
    assert canvas_length("0.32.0")(config) == 4
    for other in ("0.31.2", "0.33.0", "dev"):
        with pytest.raises(ValueError, match=f"by vLLM 0.32, this is vLLM {other}"):
            canvas_length(other)(config)
