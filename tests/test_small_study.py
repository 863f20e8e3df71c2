"""The small-scale study: its scenes, its measurements, its controls, and all of it at once at minute sizes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.convert_qwen3vl_to_bard import convert
from bard_vl.evaluation import (
    agreement,
    cells,
    experiment,
    llama_as_qwen3vl,
    report,
    scenes,
    small_study,
    smollm2,
    tiny_model,
)
from bard_vl.training.chats import ChatEncoder, ChatLimits
from bard_vl.training.data import PackingCollator
from bard_vl.training.packing import Sample, pack
from bard_vl.training.trainer import BlockDiffusionTrainer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from training_cases import MASK, bard_folder
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLForConditionalGeneration

pytestmark = pytest.mark.xdist_group("test_small_study")  # one worker runs the study that they look at

SPLITS = {"train": False, "held-out": True}
SMOKE = ("--smoke", "--threads", "1")
DECODING = ("threshold", "revision", "tokens_per_step")


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


FREE = "There are three shapes: at b1 a large red star, a small blue cross at d1 and at a2 a large red star."
WORD = " The word moon is written in row 3, in black."


def test_free_captions_are_valid_and_say_what_is_shown() -> None:
    told = scenes.free_captions(True, 0, 60)
    assert told == scenes.free_captions(True, 0, 60)
    for shown, _, caption in told:
        expected = {(thing.cell, thing.size, thing.colour, thing.shape) for thing in shown.things}
        if shown.word is not None:
            expected.add((str(shown.word.row + 1), shown.word.colour, shown.word.text))
        assert scenes.is_valid(caption)
        assert scenes.facts(caption) == expected
        assert all((thing.phrase in caption) != (thing.phrase_place_last in caption) for thing in shown.things)
    both = [thing.phrase in caption for shown, _, caption in told for thing in shown.things]
    assert 0.3 < sum(both) / len(both) < 0.7


def test_the_parser_reads_only_whole_captions() -> None:
    assert scenes.is_valid(FREE)
    assert scenes.is_valid(FREE + WORD)
    for wrong in (
        *("", WORD, FREE + WORD + WORD, FREE + " ", FREE[:-1], FREE.replace("three", "four"), WORD + FREE),
        *(FREE.replace(" at d1", " d1"), FREE.replace("a small blue cross at d1", "at d1 a small blue cross at d1")),
        *(FREE.replace(" and at", ", at"), FREE.replace("large red star,", "large star,"), FREE + "."),
    ):
        assert not scenes.is_valid(wrong), wrong


def test_f1_counts_facts() -> None:
    assert scenes.facts_f1(FREE + WORD, FREE + WORD) == 1
    assert scenes.facts_f1(FREE + WORD, FREE) == pytest.approx(2 * 3 / 7)
    assert scenes.facts_f1(FREE.replace("blue", "green"), FREE) == pytest.approx(2 / 3)
    assert scenes.facts_f1("a small blue cross at d1 at", FREE) == pytest.approx(2 / 4)
    assert scenes.facts_f1("", FREE) == 0


# Cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", small_study.SCALES.values(), ids=small_study.SCALES)
def test_cells_have_names_of_their_own(scale: small_study.Scale) -> None:
    names = [cell.name for cell in scale.cells]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scale", [small_study.PILOT, small_study.LARGER], ids=lambda scale: scale.name)
def test_arms_that_are_compared_have_equal_steps(scale: small_study.Scale) -> None:
    units = {cell.name: cell.units for cell in scale.cells}
    compared = [pair for pair in report.CLAIMS.values() if set(pair) <= units.keys()]
    assert len(compared) >= 6
    assert all(units[better] == units[worse] for better, worse in compared)
    if scale is small_study.LARGER:
        assert units["plain"] * scale.unit == units["fair-swd"] * scale.unit == 1200
    elif scale is small_study.PILOT:
        assert (units["plain"] * scale.unit, units["fair-swd"] * scale.unit) == (200, 350)


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
    small_study.main([*SMOKE, "--work", str(work), "--results", str(work / "results")])
    return work


@pytest.mark.thorough
def test_every_cell_leaves_its_figures(work: Path) -> None:
    for cell in small_study.SMOKE.cells:
        run = json.loads((work / "results" / "smoke" / f"{cell.name}-seed-0.json").read_text())
        assert run["cell"] == cell.name
        assert [stage["block_size"] for stage in run["stages"]][-1:] == [32] * bool(cell.stages)
        assert [score["tokens_per_step"] for score in run["scores"]] == [
            each.tokens_per_step for each in cell.decodings
        ]
        for score in run["scores"]:
            assert len(score["is_valid"]) == run["answers"] == 2
            assert score["valid"] == 100 * score["is_valid"].count("1") / 2 >= score["right"]
            assert score["tokens_per_forward"] > 0
        if cell.stages:
            assert run["cross_entropy"] > 0
            assert 0 < run["right_context"] < 1


@pytest.mark.thorough
def test_finished_cells_and_shared_stages_are_kept(work: Path, capsys: pytest.CaptureFixture) -> None:
    folders = sorted(path.name for path in (work / "smoke" / "stages").iterdir() if path.is_dir())
    assert [name.rpartition("-")[0] for name in folders] == ["block-32"] * 3 + ["block-4"]
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    results = str(work / "results")
    small_study.main([*SMOKE, "--work", str(work), "--results", results, "--cells", "fair-swd"])
    assert "fair-swd, seed" not in capsys.readouterr().out
    assert not [path for path in before if path.stat().st_mtime_ns != before[path]]


@pytest.mark.thorough
def test_other_seeds_share_the_parent_and_the_anchor(work: Path, capsys: pytest.CaptureFixture) -> None:
    cells = ["--cells", "parent", "--seeds", "1"]
    small_study.main([*SMOKE, "--work", str(work), "--results", str(work / "results"), *cells])
    assert "seed 1" not in capsys.readouterr().out


def test_a_cell_that_a_scale_has_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: the scale smoke has no cell block-1, swd"):
        small_study.main([*SMOKE, "--work", str(tmp_path / "work"), "--cells", "swd", "plain", "block-1"])
    assert not (tmp_path / "work").exists()


@pytest.mark.process
@pytest.mark.thorough
def test_what_is_damaged_is_named_and_made_again(work: Path, capsys: pytest.CaptureFixture) -> None:
    folder = small_study.Study(small_study.SMOKE, 0, work).stage_folder(small_study.SMOKE.cells[0].stages)
    weights, how = folder / "model.safetensors", folder / "how.json"
    weights.write_bytes(weights.read_bytes()[:-9])
    how.write_bytes(b"\0" * 40)
    results = work / "results"
    result = results / "smoke" / "fair-swd-seed-0.json"
    before = json.loads(result.read_text())
    result.write_text(result.read_text()[:50])
    with pytest.raises(SystemExit, match=r"error: .*fair-swd-seed-0.json is damaged: JSONDecodeError"):
        small_study.main(["--work", str(work), "--results", str(results), "--report"])
    small_study.main([*SMOKE, "--work", str(work), "--results", str(results), "--cells", "fair-swd"])
    told = capsys.readouterr().err
    assert f"{result} is damaged: JSONDecodeError" in told
    assert f"{folder} is damaged and made again: how.json is damaged" in told
    after = json.loads(result.read_text())
    assert [score["f1"] for score in after["scores"]] == [score["f1"] for score in before["scores"]]


@pytest.mark.thorough
def test_figures_are_written_as_they_come(work: Path, tmp_path: Path) -> None:
    cell, name = small_study.SMOKE.cells[0], "plain-seed-0.json"
    before = json.loads((work / "results" / "smoke" / name).read_text())
    study = small_study.Study(small_study.SMOKE, 0, work)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / name).write_text(json.dumps(next(study.run(cell, before["scores"][:4]))))
    assert len(json.loads((tmp_path / "smoke" / name).read_text())["scores"]) == 5
    small_study.main([*SMOKE, "--work", str(work), "--results", str(tmp_path), "--cells", "plain"])
    after = json.loads((tmp_path / "smoke" / name).read_text())
    assert after["scores"][:4] == before["scores"][:4]
    assert [score["f1"] for score in after["scores"]] == [score["f1"] for score in before["scores"]]


@pytest.mark.thorough
def test_a_cell_that_another_process_runs_is_left_to_it(work: Path) -> None:
    results = work / "other"
    with small_study.locked(work / "smoke" / "parent-seed-0.json"):
        small_study.main([*SMOKE, "--work", str(work), "--results", str(results), "--cells", "parent"])
    assert not list(results.rglob("*.json"))


@pytest.mark.thorough
def test_the_parent_is_measured_as_it_decodes(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    model = Qwen3VLForConditionalGeneration.from_pretrained(study.parent()).eval()
    samples, (written, _) = study.held_out[:2], experiment.decode(model, study.held_out[:2], cells.Decoding())
    for sample, response in zip(samples, written, strict=True):
        start, ids = sample.responses[0][0], sample.input_ids.clone()
        for place in range(start, start + 4):
            inputs = {"input_ids": ids[None, :place], **experiment.pictures([sample])}
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
            assert model(**inputs).logits[0, -1].argmax() == response[place - start]
            ids[place] = response[place - start]
    found = experiment.measure(model, samples, cells.Decoding(), experiment.exactness(*scenes.WORDS_ASKED))
    assert (found["exact"], found["tokens_per_forward"]) == (0.0, 1.0)


@pytest.mark.thorough
def test_answers_are_read_up_to_their_end(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    judge, samples = experiment.reading(study.processor.tokenizer), study.held_out
    answers = [experiment.answer(sample) for sample in samples]
    endless = [torch.cat([answers[0], answers[1]]), answers[1][:-1].repeat(2)]
    wrong = [answers[1], answers[1]]
    assert judge(samples, answers) == {"valid": 100, "right": 100, "f1": 100, "is_valid": "11"}
    assert judge(samples, endless)["is_valid"] == "10"
    assert judge(samples, wrong) | {"f1": 0} == {"valid": 100, "right": 50, "f1": 0, "is_valid": "11"}


@pytest.mark.thorough
def test_the_probe_masks_what_the_right_decides(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    tokenizer = study.processor.tokenizer
    for sample in study.held_out:
        places = experiment.masked_phrase(sample, tokenizer, 32)
        text = tokenizer.decode(sample.input_ids[places[0] : places[-1] + 1 + experiment.SHOWN]).strip()
        assert [(0, len(text))] == scenes.phrase_spans(text)
        assert places[0] // 32 == (places[-1] + experiment.SHOWN) // 32
        assert experiment.masked_phrase(sample, tokenizer, 2) == []


@pytest.mark.thorough
def test_held_out_noise_never_changes(work: Path, tmp_path: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    model, _ = study.trained(small_study.SMOKE.cells[0].stages)
    assert small_study.load(study.start()).config.trained is False
    assert getattr(model.config, "trained", None) is None, "no seed is left once it is trained"
    entropies = {experiment.held_out_cross_entropy(model, study.held_out, study.processor, tmp_path) for _ in range(2)}
    run = json.loads((work / "results" / "smoke" / "plain-seed-0.json").read_text())
    assert entropies == {run["cross_entropy"]}


@pytest.mark.thorough
def test_answers_are_long_enough_for_large_blocks(work: Path) -> None:
    study = small_study.Study(small_study.SMOKE, 0, work)
    assert min(len(experiment.answer(sample)) for sample in study.held_out) > 32


@pytest.mark.thorough
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


@pytest.mark.thorough
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


def run_of(name: str, valid: str, speed: float, seed: int = 0, **others: Any) -> dict[str, Any]:
    """Figures of a cell: `valid` has a digit for each answer, of all ways of decoding alike but for their speed."""
    figures = {part: 100 * valid.count("1") / len(valid) for part in ("valid", "right", "f1", "exact")}
    scores = [
        {"revision": None, **way, **figures, "is_valid": valid, "tokens_per_forward": rate, "seconds": 1.0}
        for way, rate in (
            ({"threshold": 0.9, "tokens_per_step": None}, speed),
            ({"threshold": 0.7, "tokens_per_step": None}, 2 * speed),
            ({"threshold": None, "tokens_per_step": 2}, 1.9),
        )
    ]
    stages = [{"block_size": 32, "loss": 0.5, "seconds": 60.0}]
    sizes = {"parent_steps": 10, "scenes": 8, "batch_size": 4, "rate": 1e-3, "parameters": 1_500_000}
    return {"cell": name, "seed": seed, "block_size": 32, "steps": 10, "stages": stages, "scores": scores, **sizes} | {
        "answers": len(valid),
        "answer_length": 30.0,
        **others,
    }


def digits(share: float, count: int = 100) -> str:
    return "1" * round(share * count) + "0" * (count - round(share * count))


def test_gains_are_paired_by_seed() -> None:
    better = [run_of("swd", digits(share), 2.0, seed) for seed, share in enumerate((0.95, 0.80, 0.90))]
    worse = [run_of("plain", digits(share), 2.0, seed) for seed, share in enumerate((0.80, 0.85, 0.84))]
    at = {"threshold": 0.9}
    # 15, -5 and 6: mean 16 / 3, deviation 10.02, times 4.303 / sqrt(3); 21 answers to 5 that one has alone.
    assert report.verdict(better, worse, at) == "**undecided**: +5.3 ± 24.9, p 0.0025"
    near = [run_of("swd", digits(share + 0.1), 2.0, seed) for seed, share in enumerate((0.81, 0.85, 0.83))]
    assert report.verdict(near, worse, at).startswith("**yes**: +10.0 ± 2.5")
    assert report.verdict(worse, near, at).startswith("**no**: -10.0 ± 2.5")
    assert report.verdict(better, [run_of("plain", digits(0.5), 2.0, 7)], at) == "-"


def test_one_seed_is_judged_by_its_answers() -> None:
    at = {"threshold": 0.9}
    pair = [run_of("swd", digits(0.9), 2.0)], [run_of("plain", digits(0.8), 2.0)]
    assert report.verdict(*pair, at) == "**yes**: +10.0, p 0.002"
    assert report.verdict(*pair, None) == "**undecided**: +10.0"
    assert report.verdict([run_of("swd", digits(0.82), 2.0)], pair[1], at) == "**undecided**: +2.0, p 0.5"


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, 1), (5, 0, 2 / 32), (5, 5, 1), (8, 2, 2 * 56 / 1024)])
def test_mcnemar_counts_what_one_has_alone(wins: int, losses: int, p: float) -> None:
    first = "1" * wins + "0" * losses + "1100"
    second = "0" * wins + "1" * losses + "1100"
    assert report.mcnemar([(first, second)]) == pytest.approx(p)
    assert report.mcnemar([(first, second), (first, None)]) is None
    assert report.chance_of([(first, second), (first, None)]) == pytest.approx(p)  # a gain leaves that seed out, too
    assert report.chance_of([(first, None)]) is None


def test_validity_at_a_speed_lies_between_thresholds() -> None:
    run = run_of("plain", digits(0.9), 2.0)
    run["scores"][1]["valid"] = 50.0
    assert report.at_speed(run) == pytest.approx(70.0)
    assert report.at_speed(run, speed=4.5) is None
    assert report.at_speed(run, speed=1.9) is None
    assert report.at_speed(run, revision="remask") is None


@pytest.mark.parametrize(("exact", "speed", "told"), [(0.93, 4.0, "yes"), (0.93, 1.2, "no"), (0.80, 4.0, "no")])
def test_the_claim_of_speed(exact: float, speed: float, told: str) -> None:
    runs = {"block-1": [run_of("block-1", digits(0.95), 1.0)], "block-4": [run_of("block-4", digits(exact), speed)]}
    runs["block-4"][0]["scores"][1]["exact"] = 0.0
    assert f"**{told}**" in report.speed_claim(runs)
    assert report.speed_claim({}).endswith("not run yet.")


def test_the_report_shows_seeds_and_names_what_is_missing(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "pilot").mkdir(parents=True)
    for name, seed, share in (("plain", 0, 0.8), ("plain", 1, 0.9), ("complementary", 0, 0.95)):
        run = run_of(name, digits(share), 2.0, seed, cross_entropy=0.25, right_context=0.5)
        (results / "pilot" / f"{name}-seed-{seed}.json").write_text(json.dumps(run))
    text = report.write_report(results, tmp_path).read_text()
    assert "| plain | 10 | 85.0 (80.0, 90.0) |" in text
    assert "| **yes**: +15.0, p < 0.001 |" in text
    missing = text.rpartition("## Not run yet")[2]
    assert "`swd`" in missing
    assert "`complementary` with seed 1" in missing
    assert "some ways of decoding `plain` with seed 1" in missing
    assert "`plain` with" not in missing.replace("decoding `plain`", "")
    assert "- `larger`: all of it" in missing
    assert (tmp_path / "plots" / "trade_off_pilot.png").stat().st_size > 10_000


def test_the_committed_page_is_that_of_its_figures(tmp_path: Path) -> None:
    folder = Path(report.__file__).parent
    text = report.write_report(folder / "results", tmp_path).read_text()
    findings = report.FINDINGS.read_text().strip() + "\n\n"
    assert (folder / "SMALL_STUDY.md").read_text().replace(findings, "") == text


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert "No cell has been run yet" in report.write_report(tmp_path / "results", tmp_path).read_text()


# A parent of another kind ---------------------------------------------------------------------------------------------


def tiny_llama(vocab_size: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": vocab_size}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, rope_theta=1e5, tie_word_embeddings=tied)).eval()


@torch.no_grad()
def assert_same_logits(found: Any, llama: Any) -> None:
    input_ids = torch.randint(20, llama.config.vocab_size, (2, 200))  # behind the ids of pictures
    expected, moved = llama(input_ids).logits, found(input_ids=input_ids).logits
    assert expected.abs().max() > 5
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3)
    assert torch.equal(moved.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_moves_into_qwen3vl_exactly(tied: bool) -> None:
    llama = tiny_llama(64, tied)
    config = tiny_model.model_config(tiny_model.Shape(hidden=96, vision_hidden=32, vision_layers=1))
    config |= {"text_config": llama_as_qwen3vl.text_config(llama.config), "tie_word_embeddings": tied}
    assert_same_logits(llama_as_qwen3vl.move(llama, config), llama)
    kept = torch.tensor([llama_as_qwen3vl.SPARE, llama_as_qwen3vl.UNDO])
    torch.testing.assert_close(kept.bfloat16().float(), kept, rtol=2e-5, atol=0)


def test_the_folder_of_a_moved_llama_becomes_a_seed(tmp_path: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *smollm2.RENAMED]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    llama = tiny_llama(len(words), tied=True)
    smollm2.write_folder(tmp_path / "parent", llama, smollm2.renamed(json.loads(tokenizer.to_str())))
    assert_same_logits(Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "parent").eval(), llama)
    seed = convert(tmp_path / "parent", tmp_path / "seed", 4, progress=False)
    processor = BardVLProcessor.from_pretrained(seed)
    assert processor.tokenizer.convert_ids_to_tokens(BardVLConfig.from_pretrained(seed).mask_token_id) == "<|mask|>"
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    (ids,) = processor(text=[text], images=[Image.new("RGB", (64, 64))])["input_ids"]
    assert ids.count(words.index("<file_sep>")) == 16
    assert processor.tokenizer.decode(ids[-len("assistant\n") :]) == "assistant\n"


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


def test_decoded_answers_are_compared_token_by_token() -> None:
    model = BardVLForConditionalGeneration.from_pretrained(bard_folder()).eval()
    prompt = torch.arange(20, 27)
    own = model.generate(input_ids=prompt[None], max_new_tokens=8)[0, 7:]
    place = next(number for number in range(2, 8) if own[number] not in own[:number])
    model.generation_config.eos_token_id = int(own[place])  # all answers of the batch end here
    ended = own[: place + 1]

    def sample(answer: torch.Tensor) -> Sample:
        whole = plain_sample(7, len(answer))
        whole.input_ids = torch.cat([prompt, answer])
        return whole

    longer, other = torch.cat([ended, ended]), torch.cat([ended[:1], 1 - ended[1:]])
    found = agreement.decoded(model, [sample(answer) for answer in (ended, longer, other)], 0.9)
    assert found["equal_answers"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["equal_prefix"] == pytest.approx((1 + 0.5 + 1 / len(ended)) / 3, abs=1e-4)
    assert 0.25 <= found["tokens_per_forward"] <= 4
