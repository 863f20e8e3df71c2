"""The compiled layers give what transformers' modules give, and serve no model that is anything else than plain."""

from pathlib import Path

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration
from bard_vl.cache_bard_vl import BardVLCache
from bard_vl.engine_bard_vl import SlotEncoder
from bard_vl.layers_bard_vl import Layers, is_plain
from bard_vl.rows_bard_vl import Rows
from ragged import MASK, Row, collate
from torch._dynamo.utils import counters

BLOCKS = [(0, 16, 4), (0, 20, 4), (1, 4, 4), (2, 28, 4)]
LENGTHS = [24, 9, 33]
GOLDEN = Path(__file__).parent / "golden" / "untied"


def fresh() -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float32, mask_token_id=MASK).eval()


def encoder_of(model: BardVLForConditionalGeneration) -> SlotEncoder:
    """Three encoded prompts of different lengths."""
    inputs = collate([Row().add_text(length, length) for length in LENGTHS])
    prompt = model.read_call(inputs, None, {"block_size": 4, "mask_token_id": MASK}).prompt
    rows = Rows.lay_out(prompt, [8] * 3, 4, MASK, 48)
    encoder = SlotEncoder(model, rows, BardVLCache(model.config.text_config.num_hidden_layers), 4)
    encoder.encode_prompts(prompt, 0, 0)
    return encoder


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_they_equal_the_modules(fuses: bool, dtype: torch.dtype) -> None:
    model = fresh().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mine, theirs = encoder_of(model), encoder_of(model)
    expected = theirs.encode(BLOCKS)
    with torch.compiler.set_stance("force_eager"):
        layers = Layers(model.model.language_model, fuses)
        found = mine.encode(BLOCKS, layers=layers)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for ours, stock in zip(mine.cache.layers, theirs.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, stock.keys, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours.values, stock.values, atol=tolerance, rtol=tolerance)
    assert {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {}
    assert layers.is_current()
    assert is_plain(model.model.language_model)


@torch.no_grad()
def test_fused_weights_are_saved_trained_and_moved_as_before(tmp_path: Path) -> None:
    model = fresh()
    layers = Layers(model.model.language_model, fuses=True)
    model.save_pretrained(tmp_path)
    again = BardVLForConditionalGeneration.from_pretrained(tmp_path)
    for (name, mine), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj.weight.mul_(2)  # as an optimiser does, in place
    rows = slice(len(attention.q_proj.weight), len(attention.q_proj.weight) + len(attention.k_proj.weight))
    assert torch.equal(layers.layers[0].inputs[0][rows], attention.k_proj.weight)
    model.to(torch.float64)
    assert not layers.is_current()


@pytest.mark.compiled
@torch.no_grad()
def test_they_are_compiled_twice_whatever_the_lengths() -> None:
    model = fresh()
    layers, encoder = Layers(model.model.language_model, fuses=False), encoder_of(model)
    expected = encoder_of(model)
    counters.clear()
    for blocks in (BLOCKS[:1], BLOCKS[:2], BLOCKS, [*BLOCKS, (1, 8, 1)], BLOCKS[1:]):
        torch.testing.assert_close(encoder.encode(blocks, layers=layers), expected.encode(blocks), atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 9  # three functions, a few numbers of tokens and any


def hooked(model: BardVLForConditionalGeneration) -> None:
    model.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: None)


def adapted(model: BardVLForConditionalGeneration) -> None:
    class Adapter(torch.nn.Linear):
        pass

    linear = model.model.language_model.layers[0].self_attn.q_proj
    model.model.language_model.layers[0].self_attn.q_proj = Adapter(linear.in_features, linear.out_features, bias=False)


def patched(model: BardVLForConditionalGeneration) -> None:
    layer = model.model.language_model.layers[0]
    layer.forward = layer.forward


def in_training(model: BardVLForConditionalGeneration) -> None:
    model.train()


@pytest.mark.parametrize("change", [hooked, adapted, patched, in_training], ids=lambda change: change.__name__)
def test_whatever_is_special_runs_as_its_modules_say(change: object) -> None:
    model = fresh()
    assert is_plain(model.model.language_model)
    change(model)
    assert not is_plain(model.model.language_model)
