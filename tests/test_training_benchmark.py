"""The training benchmark compares steps that do the same: one loss, one set of tokens, in every form."""

import json
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from shapes import SHAPES, build_model  # noqa: E402
from training_steps import Batch, Form, Step, conversations, forms, make_batch  # noqa: E402

from training import Result, main, measure, to_markdown  # noqa: E402

CPU, TINY, BLOCK = torch.device("cpu"), SHAPES["tiny"], 4
FORMS = forms(["dense"])
SAMPLES = conversations(200, BLOCK, TINY.num_prompt_ids, seed=1)


def new_step() -> Step:
    return Step(build_model(TINY, CPU, torch.float32, seed=1), chunk_size=8, with_optimizer=True)


def batch_of(packed: bool) -> Batch:
    return make_batch(SAMPLES, packed, BLOCK, 8, TINY, CPU)


def result_of(form: Form) -> Result:
    return Result(form.name, 200, 1, 1, 1, 1)


@pytest.mark.parametrize(("columns", "block_size", "seed"), [(128, 4, 0), (512, 16, 1), (1024, 32, 2), (8192, 16, 3)])
def test_conversations_fill_a_row_and_no_more(columns: int, block_size: int, seed: int) -> None:
    samples = conversations(columns, block_size, TINY.num_prompt_ids, seed)
    rows = make_batch(samples, True, block_size, 1, TINY, CPU).rows
    assert rows.input_ids.shape[0] == 1
    assert 0.6 * columns < rows.input_ids.shape[1] <= columns
    assert len(samples) >= 2


def test_unpacked_rows_hold_the_same_samples_under_the_same_noise() -> None:
    packed, unpacked = batch_of(True), batch_of(False)
    assert packed.noisy_ids.shape[0] == 1
    assert unpacked.noisy_ids.shape[0] == len(SAMPLES)
    assert unpacked.normaliser == packed.normaliser > 1
    for number in range(len(SAMPLES)):
        mine, other = (batch.noisy_ids[batch.rows.sample == number] for batch in (packed, unpacked))
        assert torch.equal(mine, other)
        assert (unpacked.rows.sample[number] == number).sum() == len(mine)


def test_every_form_has_the_same_gradients() -> None:
    step = new_step()
    step.with_optimizer = False
    step.clear = lambda: None
    gradients = []
    for form in FORMS:
        step.run(form, batch_of(form.packed))
        gradients.append([parameter.grad for parameter in step.model.model.language_model.parameters()])
        step.optimizer.zero_grad(set_to_none=True)
    for name, others in zip((form.name for form in FORMS), gradients, strict=True):
        for mine, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_form_does_what_it_says() -> None:
    """Columns that reach the head at once, how often layers run, and what the optimizer does."""
    step = new_step()
    heads: list[int] = []
    layers: list[int] = []
    step.model.lm_head.register_forward_hook(lambda _, args, __: heads.append(args[0].shape[:-1].numel()))
    # Before the call: a recomputation stops as soon as it has what it needs, inside of the last module.
    step.model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    learnt = int((batch_of(True).weights > 0).sum())
    for form in FORMS:
        heads.clear(), layers.clear()
        batch = batch_of(form.packed)
        before = [parameter.clone() for parameter in step.model.parameters()]
        step.run(form, batch)
        expected = {"chunked": 8, "selected": learnt, "full": batch.noisy_ids.numel()}[form.loss]
        assert max(heads) == expected
        assert len(layers) == (2 if form.checkpointing else 1)
        assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
        assert all(parameter.grad is None for parameter in step.model.parameters())
    moments = [state["step"].item() for state in step.optimizer.state.values()]
    assert set(moments) == {len(FORMS)}


def test_another_loss_is_an_error() -> None:
    step = new_step()
    right, wrong = batch_of(True), batch_of(True)
    wrong = replace(wrong, weights=2 * wrong.weights)
    compared = [(FORMS[0], right, result_of(FORMS[0])), (FORMS[2], wrong, result_of(FORMS[2]))]
    with pytest.raises(ValueError, match=r"'loss of selected positions at once' has the loss .*, 'packed, .*' has"):
        measure(step, compared, CPU, 1, 1e-4, lambda message: None)


class OutOfMemoryStep(Step):
    """Has no memory for full logits, as a small GPU would."""

    def run(self, form: Form, batch: Batch) -> float:
        if form.loss == "full":
            raise torch.cuda.OutOfMemoryError("2.00 GiB of 1.00 GiB")
        return super().run(form, batch)


@pytest.mark.thorough
def test_a_form_without_memory_is_said_and_left_out() -> None:
    step = OutOfMemoryStep(build_model(TINY, CPU, torch.float32, seed=1), 8, True)
    compared = [(form, batch_of(form.packed), result_of(form)) for form in FORMS]
    results = measure(step, compared, CPU, 1, 1e-4, lambda message: None)
    failed = [form.loss == "full" for form in FORMS]
    assert [result.error == "out of memory" for result in results] == failed
    assert [not result.seconds for result in results] == failed


@pytest.mark.thorough
def test_script_writes_numbers_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, tables = tmp_path / "run.json", tmp_path / "run.md"
    command = "training.py --shape tiny --device cpu --block-size 4 --lengths 128 256 --repetitions 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(numbers), "--markdown", str(tables)])
    runpy.run_path(str(BENCHMARKS / "training.py"), run_name="__main__")
    run = json.loads(numbers.read_text())
    assert {"torch", "transformers", "bard_vl", "processor", "threads"} <= set(run["environment"])
    assert [(result["length"], result["name"]) for result in run["results"]] == [
        (length, form.name) for length in (128, 256) for form in FORMS
    ]
    for result in run["results"]:
        assert set(result) == {each.name for each in fields(Result)} | {"summary"}
        assert len(result["seconds"]) == 2
        assert result["peak_memory_bytes"] > result["memory_growth_bytes"] >= 0
        speed = result["num_tokens"] / result["summary"]["seconds"]["min"]
        assert result["summary"]["tokens_per_second"]["max"] == pytest.approx(speed)
        assert f"| {result['name']} | {result['rows']} x {result['columns']} |" in tables.read_text()
    assert tables.read_text() in capsys.readouterr().out
    run["results"][0]["error"] = "out of memory"
    assert "| out of memory |" in to_markdown(run)


@pytest.mark.thorough
def test_half_precision_without_optimizer(tmp_path: Path) -> None:
    numbers = tmp_path / "run.json"
    command = "--shape tiny --device cpu --dtype bfloat16 --block-size 4 --lengths 128 --repetitions 1 --quiet"
    main([*command.split(), "--without-optimizer", "--only", "unpacked", "full", "--json", str(numbers)])
    names = [result["name"] for result in json.loads(numbers.read_text())["results"]]
    assert names == ["unpacked", "full logits", "unpacked, full logits, dense mask"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--lengths 511", "at least 512, 32 blocks, got 511"),
        ("--repetitions 0", "at least 1"),
        ("--masks flex", "FlexAttention has no backward on a CPU"),
        ("--only nothing", "leaves nothing of 'packed"),
    ],
)
def test_wrong_arguments_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", *wrong.split()])
    assert message in capsys.readouterr().err
