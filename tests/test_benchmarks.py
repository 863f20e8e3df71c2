"""The benchmark compares like with like: its plain decoder is the reference's, every rung gives the engine's tokens."""

import copy
import json
import runpy
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration
from bard_vl.remasking_bard_vl import REMASKING_RULES, pick_tokens, probability_of
from convert_cases import convert, write_source
from golden_models import last_block_logits
from ragged import MASK, NO_ID, Row, collate
from ragged import load as load_ragged
from test_golden import VISUAL, cases_of, load, tensors_of
from tiny import draw_scene

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import batches  # noqa: E402
import decoding  # noqa: E402
import gpu  # noqa: E402
import gpu_run  # noqa: E402
import speculation  # noqa: E402
from contenders import MOST_OFFSET, Decoded, EngineContender, Task, make_prompts, rounds_of_prompts  # noqa: E402
from decoding import contenders  # noqa: E402
from measuring import Result, measure  # noqa: E402
from plain_decoder import LADDER, InPlaceLayer, LadderDecoder, Rung  # noqa: E402
from shapes import SHAPES, build_model, config_of, num_parameters, stock_twin  # noqa: E402

import serving  # noqa: E402

CPU = torch.device("cpu")
FIGURES = ("ms_per_forward", "ms_to_first_block", "decode_tokens_per_second", "tokens_per_second")


def golden_decoder(folder: str, case: str, rung: Rung) -> tuple[LadderDecoder, list[int], torch.Tensor]:
    """A decoder set on a golden case, and the tokens and steps that are expected."""
    model, tensors, cases = load(folder)
    golden, task = tensors_of(tensors, case), Task(**cases[case]["arguments"])
    inputs = {name: golden[name] for name in ("input_ids", *VISUAL) if name in golden}
    positions = model.get_position_ids(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    twin = stock_twin(model, rung.attention)
    expected = golden["output_ids"][0, : task.max_new_tokens].tolist()
    if task.eos_token_id in expected:
        expected = expected[: expected.index(task.eos_token_id) + 1]
    return LadderDecoder(twin, rung, task, inputs, positions), expected, golden["block_step_counts"]


@pytest.mark.thorough(every=27)
@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name)
@pytest.mark.parametrize(("folder", "case"), cases_of("generate"))
def test_every_rung_reproduces_the_golden_cases(folder: str, case: str, rung: Rung) -> None:
    decoder, expected, steps = golden_decoder(folder, case, rung)
    assert decoder.run() == expected
    assert [decoder.steps] == steps.tolist()


TINY = SHAPES["tiny"]
MODEL = build_model(TINY, CPU, torch.float32, seed=1)


def task_of(steps: int, block_size: int = 8, max_new_tokens: int = 28, **changes: Any) -> Task:
    """Four blocks, the last one cut."""
    ids = {"mask_token_id": TINY.mask_token_id, "eos_token_id": TINY.eos_token_id}
    settings = {"remasking_strategy": "low_confidence_static", **ids, **changes}
    return Task(max_new_tokens, block_size, steps, **settings)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_every_rung_gives_the_engines_tokens_one_by_one_and_in_a_batch(steps: int) -> None:
    prompts, task = make_prompts([5, 16, 23], TINY, 0, CPU), task_of(steps)
    compared = [c for batch in (1, 3) for c in contenders(MODEL, ["plain", "ladder", "engine"], batch, False)]
    decoded = [contender.decode(prompts, task).tokens for contender in compared]
    assert len(decoded) == len(LADDER) + 1 + 3
    assert all(tokens == decoded[0] for tokens in decoded)
    assert [len(tokens) for tokens in decoded[0]] == [28, 28, 28]
    assert len({token for tokens in decoded[0] for token in tokens}) > 10  # a text of one token would agree by chance


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_forwards_of_every_rung_are_its_formula(steps: int) -> None:
    prompts, task, blocks = make_prompts([13], TINY, 0, CPU), task_of(steps), 4
    denoise = {"denoise": blocks * steps}
    expected = [{"prefill": 1, **denoise, "commit": blocks - 1}] * 5
    fused = {"prefill+denoise": 1, "denoise": blocks * steps - 1, "commit": blocks - 1}
    expected.append(fused)
    fused = {"prefill+denoise": 1, "denoise": blocks * (steps - 1), "commit+denoise": blocks - 1}
    expected += [fused] * 3
    compared = contenders(MODEL, ["plain", "ladder", "engine"], 1, False)
    for contender, forwards in zip(compared, expected, strict=True):
        assert +contender.decode(prompts, task).forwards == +Counter(forwards), contender.name
        first = contender.decode(prompts, task.first_block)
        assert sum(first.forwards.values()) == steps + ("prefill" in forwards), contender.name


def test_a_rung_does_what_it_says() -> None:
    """Rows that reach the head, and forwards with a mask, of a prompt of 13 tokens and two blocks of two steps."""
    prompt, task = make_prompts([13], TINY, 0, CPU)[0], task_of(2, max_new_tokens=16)
    rows, masked = [], []
    for rung in LADDER:
        twin = stock_twin(MODEL, rung.attention)
        heads: list[int] = []
        masks: list[bool] = []
        twin.lm_head.register_forward_hook(lambda _, args, __, heads=heads: heads.append(args[0].shape[1]))
        twin.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs, masks=masks: masks.append(kwargs["attention_mask"] is not None), with_kwargs=True
        )
        decoder = LadderDecoder(twin, rung, task, {"input_ids": prompt[None]}, torch.arange(13).expand(4, 1, -1))
        decoder.run()
        rows.append(sum(heads))
        masked.append(sum(masks))
        assert all(isinstance(layer, InPlaceLayer) == rung.in_place for layer in decoder.cache.layers)
    assert rows == [13 + 5 * 8] * 3 + [4 * 8] * 5
    assert masked == [6, 6, 1, 1, 1, 1, 2, 1]


def test_autoregressive_forwards_are_counted() -> None:
    prompts, task = make_prompts([5, 9], TINY, 0, CPU), task_of(8)
    (qwen,) = contenders(MODEL, ["qwen"], 2, False)
    calls: list[int] = []
    qwen.model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    decoded = qwen.decode(prompts, task)
    assert [len(tokens) for tokens in decoded.tokens] == [28, 28]
    assert decoded.forwards == {"prefill": 1, "decode": 27}
    assert len(calls) == 28
    assert [len(tokens) for tokens in qwen.decode(prompts, task.first_block).tokens] == [8, 8]


def test_another_decoders_tokens_are_an_error() -> None:
    engine, plain = contenders(MODEL, ["engine"], 1, False)[0], contenders(MODEL, ["plain"], 1, False)[0]
    plain.model = stock_twin(build_model(TINY, CPU, torch.float32, seed=2), "sdpa")
    prompts = rounds_of_prompts([5], TINY, 0, CPU)
    with pytest.raises(ValueError, match=r"plain baseline agrees with this engine on .* of the tokens only"):
        measure([plain, engine], prompts, task_of(2), 1)


def test_what_cannot_run_here_is_said_and_left_out() -> None:
    engine = contenders(MODEL, ["engine"], 1, False)[0]
    impossible = EngineContender("no such cache", MODEL, True, cache_implementation="moebius")
    results = measure([engine, impossible], rounds_of_prompts([5], TINY, 0, CPU), task_of(2), 1)
    assert [bool(result.error) for result in results] == [False, True]
    assert "moebius" in str(results[1].error)
    assert not results[1].seconds


@pytest.mark.thorough
def test_nobody_is_timed_on_prompts_or_lengths_that_warmed_up() -> None:
    """Three contenders, one of which warms up twice; results are kept after each piece of work."""
    seen: dict[str, list[list[int]]] = {}

    class Recorder(EngineContender):
        def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
            seen.setdefault(self.name, []).extend(prompt.tolist() for prompt in prompts)
            return super().decode(prompts, task)

    compared = [Recorder(f"this engine, {number}", MODEL, True) for number in range(3)]
    compared[1].num_warm_ups = 2
    kept: list[int] = []
    results = measure(
        compared,
        rounds_of_prompts([40], TINY, 0, CPU),
        task_of(2),
        3,
        keep=lambda results: kept.append(sum(len(result.seconds) for result in results)),
    )
    assert kept == [0, 0, 0, *range(1, 10)]
    for contender, result in zip(compared, results, strict=True):
        assert len(result.warm_up_seconds) == 2 * contender.num_warm_ups
        assert result.forwards_after_first_block == [6, 6, 6]
        first, whole = seen[contender.name][::2], seen[contender.name][1::2]
        assert first == whole
        assert len({tuple(prompt) for prompt in whole}) == len(whole)
        assert len({len(prompt) for prompt in whole}) == len(whole)
        assert all(abs(len(prompt) - 40) <= MOST_OFFSET for prompt in whole)
        assert whole[-3:] == seen["this engine, 0"][-5::2]  # every contender has the same rounds


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.1), ("100m", 101), ("2b", 1721), ("4b", 4022), ("8b", 8191)])
def test_presets_are_the_real_sizes(name: str, millions: float) -> None:
    """Text parameters of Qwen3-VL 2B, 4B and 8B."""
    with torch.device("meta"):
        model = BardVLForConditionalGeneration(BardVLConfig(**config_of(SHAPES[name])))
        assert num_parameters(model) / 1e6 == pytest.approx(millions, rel=0.01, abs=0.05)


@pytest.mark.thorough
def test_script_writes_numbers_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, tables = tmp_path / "run.json", tmp_path / "run.md"
    command = "decoding.py --shape tiny --device cpu --prompt-length 40 --new-tokens 32 --steps 4 2 --repetitions 1"
    files = ["--json", str(numbers), "--markdown", str(tables)]
    monkeypatch.setattr(sys, "argv", [*command.split(), *files])
    runpy.run_path(str(BENCHMARKS / "decoding.py"), run_name="__main__")
    printed = capsys.readouterr().out
    run = json.loads(numbers.read_text())
    assert {"torch", "transformers", "bard_vl", "processor", "threads"} <= set(run["environment"])
    assert run["weight_read_ms"] > 0
    assert run["prompt_lengths"] == [40]
    for steps in (4, 2):
        results = [result for result in run["results"] if result["steps"] == steps]
        names = [result["name"] for result in results]
        assert names == [*(rung.name for rung in LADDER), "this engine", "Qwen3-VL, eager"]
        for result in results:
            assert set(result) == {field.name for field in fields(Result)} | {"figures", "summary"}
            assert len(result["seconds"]) == len(result["first_block_seconds"]) == 1
            assert set(result["summary"]) == set(FIGURES)
            assert result["agreement"] == (None if "Qwen" in result["name"] else 1)
            assert result["peak_memory_bytes"] > result["memory_growth_bytes"] >= 0
            assert f"| {result['name']} |" in tables.read_text()
    assert tables.read_text() in printed


@pytest.mark.thorough
def test_a_ragged_batch_in_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "run.json"
    command = (
        "--shape tiny --device cpu --dtype bfloat16 --batch 3 --ragged 6 20 --new-tokens 20 --block-size 4 --steps 2"
    )
    decoding.main([*command.split(), "--repetitions", "1", "--quiet", "--json", str(numbers)])
    run = json.loads(numbers.read_text())
    assert run["prompt_lengths"] == [6, 13, 20]
    engine = {result["is_batched"]: result for result in run["results"] if result["name"].startswith("this engine")}
    assert sum(engine[True]["forwards"].values()) == 10
    assert sum(engine[False]["forwards"].values()) == 30
    assert engine[True]["num_tokens"] == engine[False]["num_tokens"] == 60
    assert "plain baseline, one by one" in capsys.readouterr().out


@pytest.mark.thorough
def test_plot_is_drawn(tmp_path: Path) -> None:
    command = (
        "--shape tiny --device cpu --prompt-length 6 --new-tokens 20 --steps 4 2 --repetitions 1 --only plain --quiet"
    )
    decoding.main([*command.split(), "--plot", str(tmp_path / "run.png")])
    assert (tmp_path / "run.png").stat().st_size > 5000


def test_plot_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        decoding.main(["--plot", "run.png"])
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [("--new-tokens 16", "more than one block"), ("--steps 17", "between 1 and"), ("--batch 0", "at least 1")],
)
def test_wrong_arguments_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decoding.main(wrong.split())
    assert message in capsys.readouterr().err


@pytest.mark.thorough(every=4)
@pytest.mark.parametrize("rule", ["low_confidence_static", "low_confidence_dynamic", "factor", "entropy_bounded"])
def test_speculation_counts_what_real_forwards_accept(rule: str) -> None:
    """Every draft is decided again by a forward of its own state, which takes the place of the recorded one."""
    model, row, size = copy.deepcopy(load_ragged()), Row().add_text(11, 2), 8
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.data *= 0.3  # the less a token sees of the others, the more drafts are right
    bounds = {"confidence_threshold": 0.1, "factor": 1.5, "entropy_bound": 3.0}
    settings = {"block_size": size, "denoising_steps": 6, "remasking_strategy": rule, "max_new_tokens": 24, **bounds}
    states, decision = speculation.record(model, collate([row]), eos_token_id=NO_ID, **settings)
    plain = model.generate(**collate([row]), eos_token_id=NO_ID, return_dict_in_generate=True, **settings)
    assert len(states) == sum(plain.num_forwards.values())
    for state in states:
        assert torch.equal(next(speculation.drafts(state, decision, 1)), state.after)
    count = speculation.speculate(states, decision, 1)
    assert (count.forwards, count.tokens) == (len(states), (len(states) + 2) * size)
    response, saved = plain.sequences[0, len(row.ids) :], []
    for depth in (2, 3, 8):
        count = speculation.speculate(states, decision, depth)
        assert count.forwards == forwards_by_redeciding(model, row, response, states, decision, depth)
        assert count.tokens >= count.forwards * size
        saved.append(len(states) - count.forwards)
    assert saved == sorted(saved)
    assert 0 < saved[-1] < len(states) - 3  # some drafts are right, and some are not


def forwards_by_redeciding(
    model: BardVLForConditionalGeneration,
    row: Row,
    response: torch.Tensor,
    states: list[Any],
    decision: speculation.Decision,
    depth: int,
) -> int:
    """Forwards of draft-and-verify, each draft's successor decided on a forward of the draft without a cache."""
    size, forwards, place = len(states[0].ids), 1, 0
    while place < len(states) - 1:
        origin = states[place]
        prefix = response[: origin.block * size].tolist()
        chain = list(speculation.drafts(origin, decision, depth))
        accepted = 1
        for number in range(1, len(chain)):
            before = chain[number - 1]
            logits = last_block_logits(model, row, prefix + before.tolist(), size)[None]
            ids = pick_tokens(logits, MASK)
            measure = REMASKING_RULES[decision.rule].measure(logits, probability_of(logits, ids))
            right = decision.after(before, origin.step + number, ids[0], measure[0])
            if not torch.equal(right, chain[number]):
                break
            accepted += 1
        forwards, place = forwards + 1, place + accepted
    return forwards


def test_speculation_by_hand() -> None:
    """Two tokens per step; the second step takes what the first predicts in the first block, and not in the second."""
    decision = speculation.Decision("low_confidence_static", 0.0, torch.tensor([2, 2]), MASK)

    def state(block: int, step: int, ids: list[int], after: list[int], predicted: list[int]) -> speculation.State:
        return speculation.State(block, step, *map(torch.tensor, (ids, after, predicted, [0.9, 0.8, 0.2, 0.1])))

    open_block, half = [MASK] * 4, [1, 2, MASK, MASK]
    states = [
        state(0, 0, open_block, half, [1, 2, 3, 4]),
        state(0, 1, half, [1, 2, 3, 4], [1, 2, 3, 4]),
        state(1, 0, open_block, half, [1, 2, 3, 4]),
        state(1, 1, half, [1, 2, 5, 5], [1, 2, 5, 5]),
    ]
    # Plain: four forwards, the third two blocks wide.
    assert speculation.speculate(states, decision, 1) == speculation.Count(4, 20)
    # The second forward holds the first block's next state and its end with the next block, both right; the third the
    # second block's next state, right and the last one that needs a forward, and a wrong end.
    assert speculation.speculate(states, decision, 2) == speculation.Count(3, 4 + (4 + 8) + (4 + 8))


@pytest.mark.thorough
def test_speculation_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convert(write_source(tmp_path / "qwen"), tmp_path / "bard", block_size=4)
    draw_scene(tmp_path / "scene.png")
    numbers = tmp_path / "counts.json"
    command = [str(path), "--image", str(tmp_path / "scene.png"), "--ask", "What?", "How many?", "--depth", "2", "4"]
    speculation.main([*command, "--block-size", "4", "--new-tokens", "12", "--bound", "0.1", "--json", str(numbers)])
    counts = json.loads(numbers.read_text())["counts"]
    assert set(counts) == {"1", "2", "4"}
    assert counts["4"]["forwards"] <= counts["2"]["forwards"] <= counts["1"]["forwards"]
    assert f"| 1 | {counts['1']['forwards']} | 1.00 |" in capsys.readouterr().out
    batches.main([*command[:-3], "--block-size", "4", "--new-tokens", "12", "--bound", "0.1", "--batch", "2", "9"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 2", way] for way in ("lock step", "padded cursors", "cursors")
    ]
    with pytest.raises(SystemExit):
        speculation.main([*command, "--depth", "0"])
    assert "--depth must be at least 1, got 0" in capsys.readouterr().err


def test_cursors_are_counted_as_the_engine_runs_them() -> None:
    model, size = load_ragged(), 4
    batch = [Row().add_text(3 + seed, seed) for seed in range(5)]
    calls: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["inputs_embeds"][..., 0].numel()), with_kwargs=True
    )
    try:
        output = model.generate(
            **collate(batch),
            block_size=size,
            confidence_threshold=0.1,
            max_new_tokens=24,
            eos_token_id=list(range(0, 500, 12)),
            return_dict_in_generate=True,
        )
    finally:
        hook.remove()
    ways = batches.compare(output.block_step_counts, size)
    assert ways.cursors.forwards == len(calls) == sum(output.num_forwards.values())
    assert ways.cursors.tokens == sum(calls) - sum(len(row.ids) for row in batch)
    assert ways.cursors.tokens < ways.padded_cursors.tokens
    assert ways.cursors.forwards < ways.lock_step.forwards


def test_lock_step_and_cursors_by_hand() -> None:
    """Two rows of two blocks, one and three steps, then three and one; a third row ends with its first block."""
    ways = batches.compare(torch.tensor([[1, 3], [3, 1], [2, 0]]), 4)
    # Three steps for each block: three rows, then two, whose finished blocks run along once.
    assert ways.lock_step == speculation.Count(6, 4 * (3 * 3 + 2 * 3 + 2))
    # Three, three (the first row's finished block along), two, two (the second row's along).
    assert ways.cursors == speculation.Count(4, 4 * (3 + 4 + 2 + 3))
    assert ways.padded_cursors == speculation.Count(4, 4 * (3 + 6 + 2 + 4))


def lines_of(folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert lines[0]["piece"] == "environment"
    return {line["piece"]: line["found"] for line in lines}


@pytest.mark.compiled
def test_parts_of_the_gpu_check_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--shape", "tiny", "--device", "cpu", "--out", str(tmp_path), "--seconds", "1000", "--only"]
    gpu.main(["a", *where, "model", "floors", "attention", "slot kernel"])
    gpu.main(["b", *where, "Qwen3-VL", "eager", "default", "profile, eager", "profile, default", "earlier engine"])
    gpu.main(["c", *where, "8 rows, eager", "8 rows, default"])
    found = lines_of(tmp_path)
    assert {"torch", "transformers", "bard_vl", "shape"} <= set(found["environment"])
    assert not any("error" in each and each["error"] for each in found.values())
    assert {name for name, each in found.items() if "skipped" in each} == {"slot kernel", "earlier engine"}
    for way in ("eager", "default"):
        for steps in (4, 2):
            one = found[f"this engine, {way}, {steps} steps"]
            assert one["forwards_after_first_block"] == [2 * steps]
            assert one["num_tokens"] == 48
            assert one["summary"]["ms_per_forward"]["median"] > 0
        assert found[f"8 rows, this engine, {way}, 4 steps"]["num_prompts"] == 8
        assert found[f"profile, {way}"]["forwards"] == [4, 8]
        assert found[f"profile, {way}"]["kernels_per_forward"] > 100
        assert "aten::" in (tmp_path / f"profile_{way}.txt").read_text()
    capsys.readouterr()
    gpu.main(["table", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in (
        "| 16 tokens |",
        "| this engine, eager |",
        "| Qwen3-VL, eager |",
        "### 8 rows, prompts of 8 to 64 tokens",
    ):
        assert row in printed
    assert "- earlier engine: BARD_VL_OLD names no folder" in printed


@pytest.mark.process
def test_a_piece_that_fails_or_takes_too_long_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: gpu_run.Bench) -> gpu_run.Found:
        yield "before", {"value": 1}
        raise ValueError("no such kernel")

    def hangs(bench: gpu_run.Bench) -> gpu_run.Found:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as compilers do
                yield "swallowed", {}

    def waits_for_a_child(bench: gpu_run.Bench) -> gpu_run.Found:
        log = bench.chosen.out / "child.txt"
        returned = gpu_run.run_child(["-c", "import time; print(1); time.sleep(60)"], log, 2)
        yield "child", {"exit_code": returned, "printed": log.read_text()}

    pieces = [gpu_run.Piece(each.__name__, 9, each) for each in (fails, waits_for_a_child)]
    pieces.insert(1, gpu_run.Piece("hangs", 0.2, hangs))
    gpu_run.run(gpu.parse_arguments(["a", "--shape", "tiny", "--device", "cpu", "--out", str(tmp_path)]), pieces)
    found = lines_of(tmp_path)
    assert found["before"] == {"value": 1}
    assert "no such kernel" in found["fails"]["error"]
    assert found["hangs"]["error"].startswith("stopped after")
    assert found["child"] == {"exit_code": "stopped after 2 s", "printed": "1\n"}
    gpu.main(["table", "--out", str(tmp_path)])
    assert "- fails: ValueError: no such kernel" in capsys.readouterr().out


def test_wrong_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["a", "--only", "nonsense"])
    assert "--only 'nonsense' is no piece of part a: 'model'" in capsys.readouterr().err


def test_a_server_is_measured_by_its_parts_and_counters() -> None:
    replies = [serving.Reply("a b", 20, [0.5, 0.6, 0.9]), serving.Reply("c", 16, [0.3])]
    ours = serving.Result("vllm", 2, 2.0, replies, {"forwards": 9, "steps": 12})
    expected = {"tokens": 36, "tokens/s": 18.0, "ms to first block": 400.0, "forwards": 9, "steps per block": 4.0}
    assert ours.figures(16) == pytest.approx({**expected, "ms per block": 200.0})
    theirs = serving.Result("transformers", 2, 3.0, [serving.Reply("a", 8, [1.0]), serving.Reply("d", 8, [1.0])])
    assert serving.agreement([ours, theirs]) == {2: 0.5}  # one goes on behind the other's end
    header, _, first, second = serving.to_markdown([ours, theirs], 16).splitlines()
    assert header.count("|") == first.count("|") == second.count("|") == 9
