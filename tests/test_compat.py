"""The needs of this package in transformers, one by one: a test that fails names the change of a release.

The whole file runs in seconds on any line, and needs only transformers and torch.
"""

import ast
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bard_vl import (
    BardVLCache,
    BardVLConfig,
    BardVLForConditionalGeneration,
    BardVLGenerationConfig,
    BardVLModel,
    BardVLProcessor,
    compat_bard_vl,
)
from packaging.version import Version
from ragged import MASK, NO_ID, Row, collate
from ragged import load as load_golden
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import DynamicLayer

ROOT = Path(__file__).resolve().parents[1]
OF_THE_PROCESSOR = {f"{name}_bard_vl.py" for name in ("media", "messages", "processing")}
BLOCKS = {"block_size": 4, "max_new_tokens": 8, "eos_token_id": NO_ID}
ROW = Row().add_text(3, 1).add_image((1, 4, 4), 2).add_text(4, 3)


@pytest.fixture(scope="module")
def model() -> BardVLForConditionalGeneration:
    return load_golden()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return collate([ROW])


@contextmanager
def spied(name: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """An attention function of that name that notes the mask and the further arguments it is given."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.append((mask, kwargs))
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return found.transpose(1, 2).contiguous(), None

    compat_bard_vl.register_attention(name, attend)
    yield seen


def test_this_line_is_one_that_was_tested() -> None:
    lowest, end = map(Version, compat_bard_vl.TESTED)
    assert lowest <= Version(transformers.__version__) < end, "a line that nobody has tried: widen TESTED if all passes"


UNTESTED = """
import transformers
transformers.__version__ = "9.0.0"
import bard_vl
bard_vl.compat_bard_vl.warn_if_untested()
"""


@pytest.mark.process
def test_an_untested_line_is_warned_of_once() -> None:
    done = subprocess.run([sys.executable, "-c", UNTESTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = "Bard-VL is tested with transformers 4.57 up to, not including, 5.25; this is 9.0.0"
    assert done.stderr.count(told) == 1


# --- the text model, its cache and its attention ----------------------------------------------------------------------


def text_call(model: Any, length: int = 6) -> dict[str, Any]:
    """Arguments of `encode_text` for tokens that all see all."""
    ids = torch.arange(20, 20 + length)[None]
    return {
        "embeds": model.get_input_embeddings()(ids),
        "mask": torch.ones(1, 1, length, length, dtype=torch.bool),
        "positions": torch.arange(length).expand(4, 1, -1),
    }


@torch.no_grad()
def test_the_text_model_takes_embeddings_mask_positions_and_cache(model: BardVLForConditionalGeneration) -> None:
    call, cache = text_call(model), BardVLCache(model.config.text_config.num_hidden_layers)
    whole = compat_bard_vl.encode_text(model.model.language_model, **call)
    found = compat_bard_vl.encode_text(model.model.language_model, **call, cache=cache, use_cache=True)
    assert torch.equal(found[0], whole[0]), "hidden states are no longer the first item, or a cache changes them"
    assert cache.get_seq_length() == 6, "the cache is not reached: it has another name"
    assert compat_bard_vl.cache_of(found) is cache, "the output does not give the cache back under its name"


@torch.no_grad()
def test_a_caches_layer_decides_which_keys_are_seen(model: BardVLForConditionalGeneration) -> None:
    class Doubled(DynamicLayer):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(keys, values)
            return torch.cat([keys, keys], 2), torch.cat([values, values], 2)

    cache = transformers.cache_utils.Cache(
        layers=[Doubled() for _ in range(model.config.text_config.num_hidden_layers)]
    )
    call = text_call(model)
    whole = compat_bard_vl.encode_text(model.model.language_model, **call)[0]
    call["mask"] = call["mask"].repeat(1, 1, 1, 2)
    doubled = compat_bard_vl.encode_text(model.model.language_model, **call, cache=cache)[0]
    torch.testing.assert_close(doubled, whole, msg="layers no longer call `update(keys, values, ...)` of a cache layer")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_masks_and_further_arguments_reach_the_attention(dtype: torch.dtype) -> None:
    with spied("spy") as seen:
        own = load_golden("bard_vl").__class__.from_pretrained(ROOT / "tests/golden/untied", dtype=torch.float32)
        compat_bard_vl.set_attention(own.config.text_config, "spy")
        compat_bard_vl.set_attention(own.model.language_model.config, "spy")
        call = text_call(own)
        call["mask"] = torch.zeros(1, 1, 6, 6) if dtype.is_floating_point else call["mask"]
        compat_bard_vl.encode_text(own.model.language_model, **call, num_clean=3)
    assert len(seen) == own.config.text_config.num_hidden_layers
    assert all(mask is call["mask"] for mask, _ in seen), "4-D masks are changed on their way to the attention"
    assert all(kwargs["num_clean"] == 3 for _, kwargs in seen), "keywords of the text model no longer reach attention"
    assert compat_bard_vl.attention_of(own.config.text_config) == "spy"


@torch.no_grad()
def test_text_positions_restart_without_packing(model: BardVLForConditionalGeneration) -> None:
    call = text_call(model)
    expected = compat_bard_vl.encode_text(model.model.language_model, **call)[0]
    call["positions"] = torch.cat([torch.tensor([0, 1, 2, 0, 1, 2]).expand(1, 1, -1), call["positions"][1:]])
    found = compat_bard_vl.encode_text(model.model.language_model, **call)[0]
    assert torch.equal(found, expected), "the first of the four positions is read for more than packing without a mask"


# --- positions and visual features ------------------------------------------------------------------------------------


def test_positions_of_images_are_those_of_the_paper(model: BardVLForConditionalGeneration) -> None:
    ids, grid = collate([ROW])["input_ids"], torch.tensor([[1, 4, 4]])
    found = compat_bard_vl.multimodal_positions(
        model.model, ids, torch.ones_like(ids), {"image_grid_thw": grid, "video_grid_thw": None}
    )[:, 0]
    text, image = list(range(4)), [[4] * 4, [4, 4, 5, 5], [4, 5, 4, 5]]
    behind = list(range(6, 6 + ids.shape[1] - 8))
    assert found.tolist() == [text + axis + behind for axis in image], "multimodal positions are counted otherwise"


@torch.no_grad()
def test_visual_features_are_embeddings_and_one_addition_a_deepstack_layer(
    model: BardVLForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> None:
    grids = torch.cat([inputs["image_grid_thw"]] * 2)
    pixels = torch.cat([inputs["pixel_values"]] * 2)
    embeds, deepstack = compat_bard_vl.visual_features(model.model, pixels, grids)
    hidden, layers = model.config.text_config.hidden_size, model.config.vision_config.deepstack_visual_indexes
    assert embeds.shape == (8, hidden), "the tower's embeddings come in another form"
    assert [layer.shape for layer in deepstack] == [(8, hidden)] * len(layers), "deepstack features come otherwise"
    torch.testing.assert_close(embeds[:4], embeds[4:])


@torch.no_grad()
def test_deepstack_features_are_added_where_tokens_show_them(model: BardVLForConditionalGeneration) -> None:
    call, shown = text_call(model), torch.tensor([[False, True, True, False, False, False]])
    layers = [torch.ones(2, model.config.text_config.hidden_size)] * 2
    plain = compat_bard_vl.encode_text(model.model.language_model, **call)[0]
    nothing = {"visual_pos_masks": shown, "deepstack_visual_embeds": [0 * layer for layer in layers]}
    something = {"visual_pos_masks": shown, "deepstack_visual_embeds": layers}
    assert torch.equal(compat_bard_vl.encode_text(model.model.language_model, **call, **nothing)[0], plain)
    changed = compat_bard_vl.encode_text(model.model.language_model, **call, **something)[0]
    assert not torch.allclose(changed, plain), "the text model no longer takes deepstack features by these names"


# --- both names of the cache ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", compat_bard_vl.CACHE_NAMES)
@pytest.mark.parametrize("part", ["model", "trunk"])
def test_forwards_take_and_give_the_cache_by_both_names(
    model: BardVLForConditionalGeneration, name: str, part: str
) -> None:
    module = model if part == "model" else model.model
    ids, blocks = torch.arange(20, 33)[None], (torch.arange(13) // 4)[None]
    positions = model.get_position_ids(ids)
    whole, cache = module(input_ids=ids, block_size=4)[0], DynamicCache()
    first = module(input_ids=ids[:, :8], block_size=4, use_cache=True, **{name: cache})
    assert first.cache is first.past_key_values is first["past_key_values"] is first["cache"] is cache
    rest = {"input_ids": ids[:, 8:], "position_ids": positions[:, :, 8:], "block_ids": blocks, name: cache}
    torch.testing.assert_close(module(**rest)[0], whole[:, 8:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="two names of one argument"):
        module(input_ids=ids[:, :8], block_size=4, past_key_values=cache, cache=DynamicCache())


@pytest.mark.parametrize("name", compat_bard_vl.CACHE_NAMES)
def test_generate_takes_and_gives_the_cache_by_both_names(
    model: BardVLForConditionalGeneration, inputs: dict[str, torch.Tensor], name: str
) -> None:
    first = model.generate(**inputs, **BLOCKS, return_dict_in_generate=True)
    assert first.cache is first.past_key_values is first["past_key_values"]
    again = model.generate(**inputs, **BLOCKS, **{name: first.cache}, return_dict_in_generate=True)
    assert again.num_encoded_tokens.item() < first.num_encoded_tokens.item()
    assert torch.equal(again.sequences, first.sequences)
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(**inputs, **BLOCKS, past_key_values=first.cache, cache=BardVLCache(3))


def test_nothing_of_ours_is_deprecated(
    model: BardVLForConditionalGeneration, inputs: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        output = model.generate(**inputs, **BLOCKS, return_dict_in_generate=True)
        model.generate(**inputs, **BLOCKS, past_key_values=output.past_key_values)
        model.score(inputs, torch.tensor([[5, 6, 7]]), block_size=4, mask_token_id=MASK)
        found = model(**inputs, block_size=4, labels=inputs["input_ids"], output_hidden_states=True)
        assert len(found.hidden_states) == model.config.text_config.num_hidden_layers + 1
        model(**inputs, block_size=4, return_dict=False)
    assert [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()] == []


def test_forward_refuses_arguments_that_it_does_not_know(model: BardVLForConditionalGeneration) -> None:
    ids = torch.arange(20, 26)[None]
    for module in (model, model.model):
        with pytest.raises(ValueError, match=r"`forward` does not know `block_sise`, `kache`"):
            module(input_ids=ids, block_size=4, kache=DynamicCache(), block_sise=3)
        module(input_ids=ids, block_size=4, second_per_grid_ts=None)  # asks for nothing


def test_a_cache_is_not_moved_between_devices_nor_gathered(model: BardVLForConditionalGeneration) -> None:
    for name in compat_bard_vl.CACHE_NAMES:
        assert name in type(model)._skip_keys_device_placement
        assert name in model.config.keys_to_ignore_at_inference


# --- configs and files ------------------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}


@pytest.mark.parametrize(
    "spelling", [{"rope_theta": 1234.0, "rope_scaling": ROPE}, {"rope_parameters": {**ROPE, "rope_theta": 1234.0}}]
)
def test_rope_is_read_and_written_in_the_spelling_of_every_line(spelling: dict[str, Any]) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    text_config = {**small, "vocab_size": 8, **json.loads(json.dumps(spelling))}
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "deepstack_visual_indexes": [0]}
    config = BardVLConfig(text_config=text_config, vision_config=tower)
    text = config.to_dict()["text_config"]
    assert text["rope_theta"] == 1234.0
    assert text["rope_scaling"].items() >= ROPE.items()
    assert "rope_parameters" not in text
    rotary = BardVLModel(BardVLConfig(**config.to_dict())).language_model.rotary_emb
    second = (1 / 1234.0) ** (2 / (64 // 4 if text.get("head_dim") is None else text["head_dim"]))
    assert rotary.inv_freq[1].item() == pytest.approx(second), "the text model reads RoPE from another place"


@pytest.mark.parametrize("tie", [True, False])
def test_both_levels_of_a_config_tie_alike(tie: bool) -> None:
    for stated in ({"text_config": {"tie_word_embeddings": tie}}, {"tie_word_embeddings": tie}):
        config = BardVLConfig(**stated)
        assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is tie
        assert config.to_dict()["tie_word_embeddings"] is config.to_dict()["text_config"]["tie_word_embeddings"] is tie


def test_what_a_plain_generation_config_leaves_unset_is_known() -> None:
    neutral = compat_bard_vl.plain_defaults()
    for name, value in {"num_beams": 1, "do_sample": False, "top_k": 50, "use_cache": True}.items():
        assert value in neutral[name], f"a plain GenerationConfig has another default of {name}"
    config = transformers.GenerationConfig(temperature=0.5, do_sample=True).to_dict()
    stated = {name for name, value in config.items() if value is not None and value not in neutral.get(name, ())}
    assert {name for name in stated if name[0] != "_"} - {"transformers_version"} == {"temperature", "do_sample"}


def test_settings_come_from_the_file_by_our_own_reading(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 20, "temperature": 0.7, "do_sample": True}))
    read = BardVLGenerationConfig.from_pretrained(tmp_path)
    assert read.explicit() == {}, "files are no longer read through `read_settings`"
    for source in ("config.json", "model.safetensors"):
        (tmp_path / source).write_bytes((ROOT / "tests/golden/untied" / source).read_bytes())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is BardVLGenerationConfig
    assert loaded.generation_config.explicit() == {}, "from_pretrained brings settings that the file does not state"
    loaded.generation_config.top_k = 9
    config, others = loaded._prepare_generation_config(None, None, confidence_threshold=0.5, foreign=1)
    assert (config.top_k, config.confidence_threshold, others) == (9, 0.5, {"foreign": 1})


def test_saving_carries_the_code(model: BardVLForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    missing = {path.name for path in ROOT.glob("*_bard_vl.py")} - code - OF_THE_PROCESSOR
    assert not missing, "save_pretrained no longer copies the files that modeling_bard_vl.py imports"
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_bard_vl.BardVLForConditionalGeneration"


# --- registration -----------------------------------------------------------------------------------------------------


def test_the_auto_classes_know_the_model() -> None:
    config = AutoConfig.from_pretrained(ROOT / "tests/golden/untied")
    assert type(config) is BardVLConfig
    with torch.device("meta"):
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            assert type(auto_class.from_config(config)) is BardVLForConditionalGeneration
    assert transformers.models.auto.processing_auto.PROCESSOR_MAPPING[BardVLConfig] is BardVLProcessor
    table = getattr(transformers.models.auto.modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    assert table is None or table["bard_vl"] == "BardVLForConditionalGeneration"


# --- one place --------------------------------------------------------------------------------------------------------

MOVING = (
    *(
        "_attn_implementation",
        "AttentionInterface",
        "get_rope_index",
        "get_image_features",
        "pooler_output",
        "signature",
    ),
    *("rope_parameters", "rope_scaling", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "_get_default_generation_params"),
    *(
        "_dict_from_json_file",
        "_prepare_generation_config",
        "_skip_keys_device_placement",
        "_auto_class",
        "ModelOutput",
    ),
)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_bard_vl.py")), ids=lambda path: path.name)
def test_no_other_root_file_names_what_moves(path: Path) -> None:
    if path.name in ("compat_bard_vl.py", "processing_bard_vl.py"):
        return
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    passed = {word.arg for node in tree if isinstance(node, ast.Call) for word in node.keywords}
    assert "past_key_values" not in passed, "hand a cache to transformers' modules by compat_bard_vl"
    words = set(path.read_text("utf-8").replace(".", " ").replace('"', " ").replace("(", " ").split())
    assert not words & set(MOVING)


# --- rooms ------------------------------------------------------------------------------------------------------------

FOLDERS = {"app", "batch", "benchmarks", "cli", "evaluation", "examples", "serving", "tests", "training", "viewer"}
REACHES = {  # the folders that a folder's files may import beside their own; the root files import none
    **{"app": set(), "training": {"app"}, "evaluation": {"app", "training"}, "examples": set()},
    **{"cli": {"app", "batch", "training", "viewer"}, "batch": {"app"}, "viewer": {"app"}, "serving": {"app"}},
}
FOREIGN_PRIVATE = {"_attn_implementation", "_replace", "_version", "_forward_pre_hooks"}  # of other libraries


def imported(path: Path) -> set[str]:
    """Dotted names of this package that a file imports, as `app.session`; what `bard_vl` itself gives is empty."""
    room, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = room[: len(room) + 1 - node.level]
            found |= {".".join((*base, *(node.module or each.name).split("."))) for each in node.names}
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("bard_vl."):
            found.add(str(node.module).partition(".")[2])
        elif isinstance(node, ast.Import):
            found |= {each.name.partition(".")[2] for each in node.names if f"{each.name}.".startswith("bard_vl.")}
    return found


@pytest.mark.parametrize("room", ["", *REACHES])
def test_imports_go_down(room: str) -> None:
    for path in sorted((ROOT / room).glob("*_bard_vl.py" if room == "" else "**/*.py")):
        folders = {name.split(".")[0] for name in imported(path)} & FOLDERS
        assert folders <= {room} | REACHES.get(room, set()), f"{path.name} imports {sorted(folders)}"
        if room == "examples":
            assert imported(path) <= {""}, f"{path.name} imports below bard_vl"


def test_nothing_private_is_named_from_outside() -> None:
    """Names with a leading underscore that this tree defines are used through `self` and its kin, or in their file."""
    trees = {
        path: ast.parse(path.read_text("utf-8"))
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")
    }
    defined = {
        path: {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for path, tree in trees.items()
    }
    for path, tree in trees.items():
        elsewhere = set().union(*(names for other, names in defined.items() if other != path)) - defined[path]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or f"{node.module}.".startswith("bard_vl.")):
                private = [each.name for each in node.names if each.name.startswith("_") and each.name[:2] != "__"]
                assert private == [], f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    continue
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super":
                    continue
                assert node.attr not in elsewhere - FOREIGN_PRIVATE, f"{path.name}: {ast.unparse(node)}"
