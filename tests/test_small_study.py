"""The small-scale study: its scenes, its measurements, its controls, and all of it at once at minute sizes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.evaluation import agreement, cells, experiment, llama_as_qwen3vl, report, scenes, small_study, tiny_model
from bard_vl.training.chats import ChatEncoder, ChatLimits
from bard_vl.training.data import PackingCollator
from bard_vl.training.packing import Sample, pack
from bard_vl.training.trainer import BlockDiffusionTrainer
from training_cases import MASK, bard_folder
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLForConditionalGeneration

SPLITS = {"train": False, "held-out": True}


# Scenes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_a_function_of_its_number(split: str) -> None:
    first, again = (scenes.conversations(SPLITS[split], 0, 20) for _ in range(2))
    assert first == again
    assert first != scenes.conversations(SPLITS[split], 1, 20)
    assert len({shown for shown, *_ in first}) == 20


def test_no_scene_is_in_both_splits() -> None:
    seen = {split: {scenes.scene(held_out, 0, i) for i in range(500)} for split, held_out in SPLITS.items()}
    assert not any(shown.held_out for shown in seen["train"])
    assert all(shown.held_out for shown in seen["held-out"])


def test_pictures_show_what_captions_say() -> None:
    for index in range(50):
        shown = scenes.scene(False, 0, index)
        picture = shown.draw()
        expected = {(thing.column, thing.row): scenes.COLOURS[thing.colour] for thing in shown.things}
        for column in range(scenes.GRID):
            for row in range(scenes.GRID):
                if shown.word is None or row != shown.word.row:
                    centre = [(place + 0.5) * scenes.CELL for place in (column, row)]
                    colour = "#{:02x}{:02x}{:02x}".format(*picture.getpixel(tuple(map(int, centre))))
                    assert colour == expected.get((column, row), "#ffffff")
        for thing in shown.things:
            assert f"at {thing.cell} a {thing.size} {thing.colour} {thing.shape}" in shown.caption()


def test_answers_of_a_scene() -> None:
    things = (scenes.Thing(0, 1, "large", "red", "star"), scenes.Thing(0, 3, "small", "blue", "cross"))
    shown = scenes.Scene(things, scenes.Word(2, "black", "moon"))
    assert shown.caption() == (
        "There are two shapes: at b1 a large red star and at d1 a small blue cross. "
        "The word moon is written in row 3, in black."
    )
    word, cell, row = shown.questions()
    assert word == [("Which word is written?", "The word moon is written in row 3 of the picture, in black letters.")]
    told = "The cell d1 of the picture holds a small blue cross, and nothing else is to be seen in it."
    assert cell[1] == ("What is at d1?", told)
    told = "In row 1 of the picture one sees, from left to right: at b1 a large red star and at d1 a small blue cross."
    assert row == [("What is in row 1?", told)]


# Cells ---------------------------------------------------------------------------------------------------------------


def test_cells_have_names_of_their_own_and_equal_budgets() -> None:
    names = [cell.name for cell in cells.CELLS]
    assert len(set(names)) == len(names)
    for size in cells.SIZES:
        assert len({cell.units for cell in cells.ways(size)}) == 1
        assert {cell.block_size for cell in cells.ways(size)} == {size}
    compared = {name for group in report.CONTROLS.values() for name in group} | set(report.NOISES)
    assert compared <= set(names)
    assert set(small_study.CLAIMS) <= set(names)


def test_budgets_of_controls_are_equal() -> None:
    units = {cell.name: cell.units for cell in cells.CELLS}
    for names in (("warm-32", "swd-32", "swd+ce-32", "large-teacher-32", "ar-continued", "block-1"), report.NOISES):
        assert len({units[name] for name in names}) == 1
    assert units["faulty-mask-8"] == units["right-mask-8"]


def plain_sample(prompt: int, response: int) -> Sample:
    length = prompt + response
    return Sample(
        input_ids=torch.arange(length),
        position_ids=torch.arange(length).expand(3, length),
        responses=[(prompt, length)],
        visual_index=torch.full((length,), -1),
    )


def test_the_faulty_mask_shows_clean_tokens_the_noisy_ones() -> None:
    rows = pack([plain_sample(4, 6)], 2, 32, pad_token_id=0, response_padding_id=0)
    right = BlockDiffusionTrainer.attention_mask
    trainer = experiment.FaultyMaskTrainer.__new__(experiment.FaultyMaskTrainer)
    trainer.args = type("Arguments", (), {"mask_form": "dense"})()
    added = trainer.attention_mask(rows.layout()) & ~right(trainer, rows.layout())
    clean, noisy = slice(4, 10), slice(10, 16)
    assert added[0, 0, clean, noisy].sum() == added.sum() == 24
    assert added[0, 0, clean, noisy].tolist() == [[key // 2 <= query // 2 for key in range(6)] for query in range(6)]


# The whole study at minute sizes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a finished smoke study."""
    work = tmp_path_factory.mktemp("study")
    small_study.main(["--smoke", "--work", str(work), "--threads", "1"])
    return work


def test_every_cell_leaves_its_figures(work: Path) -> None:
    for name in small_study.CLAIMS:
        run = json.loads((work / "smoke" / "results" / f"{name}-seed-0.json").read_text())
        assert run["cell"] == name
        assert [stage["block_size"] for stage in run["stages"]][-1:] == ([16] if name != "parent" else [])
        for score in run["scores"]:
            assert 0 <= score["exact"] <= 100
            assert score["tokens_per_forward"] > 0


def test_finished_cells_and_shared_stages_are_kept(work: Path, capsys: pytest.CaptureFixture) -> None:
    folders = sorted(path.name for path in (work / "smoke" / "stages").iterdir() if path.is_dir())
    assert sorted(name.rpartition("-")[0] for name in folders) == ["block-16"] * 4 + ["block-4", "block-8"]
    before = {path: path.stat().st_mtime_ns for path in (work / "smoke").rglob("*") if path.name != "SMALL_STUDY.md"}
    small_study.main(["--smoke", "--work", str(work), "--cells", "warm-16", "--threads", "1"])
    assert "warm-16, seed" not in capsys.readouterr().out
    changed = [path for path in before if path.stat().st_mtime_ns != before[path] and path.suffix == ".json"]
    assert not changed


@pytest.mark.process
def test_what_is_damaged_is_named_and_made_again(work: Path, capsys: pytest.CaptureFixture) -> None:
    folder = next((work / "smoke" / "stages").glob("block-8-*"))
    weights, how = folder / "model.safetensors", folder / "how.json"
    weights.write_bytes(weights.read_bytes()[:-9])
    how.write_bytes(b"\0" * 40)
    result = work / "smoke" / "results" / "warm-16-seed-0.json"
    before = json.loads(result.read_text())
    result.write_text(result.read_text()[:50])
    with pytest.raises(SystemExit, match=r"error: .*warm-16-seed-0.json is damaged: JSONDecodeError"):
        small_study.main(["--smoke", "--work", str(work), "--report"])
    small_study.main(["--smoke", "--work", str(work), "--cells", "warm-16", "--threads", "1"])
    told = capsys.readouterr().err
    assert f"{result} is damaged: JSONDecodeError" in told
    assert f"{folder} is damaged and made again: how.json is damaged" in told
    after = json.loads(result.read_text())
    assert [score["exact"] for score in after["scores"]] == [score["exact"] for score in before["scores"]]


def test_a_cell_that_another_process_runs_is_left_to_it(work: Path) -> None:
    results = work / "other"
    with small_study.locked(work / "smoke" / "parent-seed-0.json"):
        small_study.main(
            ["--smoke", "--work", str(work), "--results", str(results), "--cells", "parent", "--threads", "1"]
        )
    assert not list(results.glob("*.json"))


def test_the_parent_is_measured_as_it_decodes(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    model = Qwen3VLForConditionalGeneration.from_pretrained(study.parent()).eval()
    samples = []
    for sample in study.held_out[:2]:
        start = sample.responses[0][0]
        inputs = {"input_ids": sample.input_ids[None, :start], **experiment.pictures([sample])}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        settings = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": tiny_model.PAD_TOKEN_ID}
        written = model.generate(**inputs, **settings, do_sample=False)[0]
        positions = torch.cat([sample.position_ids[:, :start], sample.position_ids[:, start : start + 8]], dim=1)
        samples.append(Sample(written, positions, [(start, start + 8)], sample.visual_index, sample.visual_inputs))
    assert experiment.measure_autoregressive(model, samples)["exact"] == 100
    samples[0].input_ids[-3] = (samples[0].input_ids[-3] + 1) % 256
    assert experiment.measure_autoregressive(model, samples) | {"seconds": 0} == {
        "threshold": None,
        "revision": None,
        "exact": 50,
        "captions": 0,
        "questions": 100,
        "tokens_per_forward": 1.0,
        "seconds": 0,
    }


def test_answers_are_long_enough_for_large_blocks(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    captions = study.held_out[::2]
    assert min(len(experiment.answer(sample)) for sample in captions) > 32


def test_samples_are_kept_as_they_are(work: Path, tmp_path: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    config = BardVLConfig(
        **{n: v for n, v in json.loads((study.random() / "config.json").read_text()).items() if n != "model_type"}
    )
    samples = [*experiment.encode(study.processor, config, scenes.conversations(False, 0, 8)), plain_sample(4, 6)]
    samples.append(replace(plain_sample(4, 6), responses=[(2, 4), (6, 9)], sample_id=7, merge_size=3))
    assert len({frozenset(sample.visual_inputs) for sample in samples}) == 2
    small_study.write_samples(samples, tmp_path / "samples.safetensors")
    again = small_study.read_samples(tmp_path / "samples.safetensors")
    assert len(again) == len(samples) > 10, "so many that their numbers sort otherwise as texts"
    for sample, read in zip(samples, again, strict=True):
        for name in ("responses", "sample_id", "merge_size"):
            assert getattr(read, name) == getattr(sample, name)
        for name in ("input_ids", "position_ids", "visual_index"):
            assert torch.equal(getattr(read, name), getattr(sample, name))
        assert read.visual_inputs.keys() == sample.visual_inputs.keys()
        assert all(torch.equal(read.visual_inputs[name], part) for name, part in sample.visual_inputs.items())


def test_the_study_reads_no_pickles(work: Path) -> None:
    suffixes = {path.suffix for path in work.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".lock", ".md", ".png", ".txt", ".jinja", ".py", ".yaml", ""}, suffixes
    assert not {path.name for path in work.rglob("*.bin")}


def test_the_work_folder_is_of_one_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_study.WORK.parent == Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    small_study.make_private(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    with pytest.raises(SystemExit, match=r"^error: .*open is another user's, or others can write to it"):
        small_study.main(["--smoke", "--work", str(tmp_path / "open")])
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "own").stat().st_uid + 1)
    with pytest.raises(SystemExit, match="own is another user's"):
        small_study.main(["--smoke", "--work", str(tmp_path / "own")])
    assert [path for name in ("open", "own") for path in (tmp_path / name).iterdir()] == []


# Report --------------------------------------------------------------------------------------------------------------


def run_of(name: str, exact: float, tokens_per_forward: float, seed: int = 0, answers: int = 1000) -> dict[str, Any]:
    score = {"threshold": 0.9, "revision": None, "exact": exact, "captions": exact, "questions": exact}
    scores = [score | {"tokens_per_forward": tokens_per_forward, "seconds": 1.0}]
    stages = [{"block_size": 8, "loss": 0.5, "seconds": 60.0}]
    return {"cell": name, "seed": seed, "block_size": 8, "steps": 10, "batch_size": 4, "stages": stages} | {
        "answers": answers,
        "answer_length": 30.0,
        "scores": scores,
    }


@pytest.mark.parametrize(
    ("warm", "direct", "verdict"),
    [(90.0, 80.0, "**yes**"), (80.0, 90.0, "**no**"), (80.0, 80.5, "**undecided**")],
)
def test_claims_follow_the_figures(warm: float, direct: float, verdict: str) -> None:
    runs = {"warm-32": [run_of("warm-32", warm, 5)], "direct-32": [run_of("direct-32", direct, 6)]}
    line = report.compare(runs, "warm-32", "direct-32", "Warm beats direct")
    assert verdict in line
    assert f"{warm:.1f} and {direct:.1f} percent exact" in line


def test_claims_without_their_cells_are_open() -> None:
    assert report.compare({}, "warm-32", "direct-32", "Warm beats direct") == "Warm beats direct: not run yet."
    assert report.speed_claim({}).endswith("not run yet.")
    apart = {"warm-32": [run_of("warm-32", 90.0, 5, 0)], "direct-32": [run_of("direct-32", 80.0, 6, 1)]}
    assert report.compare(apart, "warm-32", "direct-32", "Warm beats direct").endswith(
        "not run yet with a common seed."
    )


def test_seeds_that_disagree_leave_a_claim_open() -> None:
    runs = {
        "warm-32": [run_of("warm-32", exact, 5, seed) for seed, exact in enumerate((95.0, 80.0, 90.0))],
        "direct-32": [run_of("direct-32", exact, 6, seed) for seed, exact in enumerate((80.0, 85.0, 84.0))],
    }
    line = report.compare(runs, "warm-32", "direct-32", "Warm beats direct")
    assert "**undecided**; 88.3 and 83.0 percent exact, +5.3 ± 5.8 points (3 seeds)" in line


@pytest.mark.parametrize(
    ("exact", "speed", "verdict"), [(93.0, 4.0, "**yes**"), (93.0, 2.0, "**no**"), (80.0, 4.0, "**no**")]
)
def test_the_claim_of_speed(exact: float, speed: float, verdict: str) -> None:
    runs = {"block-1": [run_of("block-1", 95.0, 1.0)], "swd-32": [run_of("swd-32", exact, speed)]}
    for score in (runs["swd-32"][0]["scores"][0],):
        runs["swd-32"][0]["scores"].append(score | {"threshold": 0.5, "exact": exact - 50})
    assert verdict in report.speed_claim(runs)


def test_the_report_shows_seeds_and_names_what_is_missing(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for seed, exact in enumerate((80.0, 90.0)):
        (results / f"warm-32-seed-{seed}.json").write_text(json.dumps(run_of("warm-32", exact, 5.0, seed)))
    (results / "warm-16-seed-0.json").write_text(json.dumps(run_of("warm-16", 95.0, 4.0)))
    text = report.write_report(results, tmp_path).read_text()
    assert "85.0 (80.0-90.0)" in text
    missing = text.rpartition("## Not run yet")[2]
    assert "`direct-32`" in missing
    assert "`warm-32`" not in missing
    assert (tmp_path / "plots" / "block_sizes.png").stat().st_size > 10_000


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert "No cell has been run yet" in report.write_report(tmp_path / "results", tmp_path).read_text()


# A parent of another kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_moves_into_qwen3vl_exactly(tied: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": tiny_model.VOCAB_SIZE}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3}
    llama = LlamaForCausalLM(LlamaConfig(**shape, **heads, rope_theta=1e5, tie_word_embeddings=tied)).eval()
    config = tiny_model.model_config(tiny_model.Shape(hidden=96, vision_hidden=32, vision_layers=1))
    config |= {"text_config": llama_as_qwen3vl.text_config(llama.config), "tie_word_embeddings": tied}
    moved = llama_as_qwen3vl.move(llama, config)
    input_ids = torch.randint(tiny_model.NUM_BASE_TOKENS, (2, 200))
    with torch.no_grad():
        expected, found = llama(input_ids).logits, moved(input_ids=input_ids).logits
    assert expected.abs().max() > 5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    kept = torch.tensor([llama_as_qwen3vl.SPARE, llama_as_qwen3vl.UNDO])
    torch.testing.assert_close(kept.bfloat16().float(), kept, rtol=2e-5, atol=0)


def test_a_llama_with_scaled_frequencies_is_refused() -> None:
    config = LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="'linear'"):
        llama_as_qwen3vl.text_config(config)


def test_agreement_is_asked_for_in_the_states_of_inference() -> None:
    processor = BardVLProcessor.from_pretrained(bard_folder())
    model = BardVLForConditionalGeneration.from_pretrained(bard_folder()).eval()
    encoder = ChatEncoder(processor, model.config, ChatLimits(4, 256))
    chat = {
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A red circle, as ever."}]
    }
    sample = encoder.encode(chat)
    rows = PackingCollator(encoder, needs_vision=False)([sample])
    start, end = sample.responses[0]
    for shown in range(4):
        hidden = rows.noisy & ((rows.place - rows.origin) % 4 >= shown)
        found = agreement.choices(model, rows, rows.input_ids.masked_fill(hidden, MASK))[rows.noisy]
        for first in range(start, end, 4):
            ids = torch.cat([sample.input_ids[: first + shown], torch.full((4 - shown,), MASK)])[None]
            block = torch.cat([torch.arange(first) // 4, torch.full((4,), 99)])[None]
            block[0, start:first] = 50 + torch.arange(first - start) // 4
            logits = model(input_ids=ids, block_ids=block).logits[0, first:]
            logits[:, MASK] = -torch.inf
            assert found[first - start : first - start + 4].tolist() == logits.argmax(-1).tolist()
