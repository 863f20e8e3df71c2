"""Own answers: their states are those of inference, a kill loses none, and training goes on from them to the bit."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.app.checkpoints import EMBEDDED
from bard_vl.evaluation import own_answers as trial
from bard_vl.evaluation.grounding import write_chats
from bard_vl.training import self_distill
from bard_vl.training.arguments import RecipeError, SelfDistillArguments
from bard_vl.training.chats import ChatEncoder, ChatLimits
from bard_vl.training.data import ChatSamples, open_chats
from bard_vl.training.noise import corrupt_rows
from bard_vl.training.own_answers import AnswerFiles, OwnAnswers, Writer, order_of, prompt_inputs
from bard_vl.training.packing import NEVER, dense_mask, pack
from bard_vl.training.trainer import BlockDiffusionTrainer, model_inputs
from safetensors.torch import load_file
from training_cases import qwen_folder, settings, write_recipe

ASKED = SelfDistillArguments(answer_max_new_tokens=96, answer_confidence_threshold=0.999, answer_batch_size=3)
MASK = 511


@cache
def words() -> Path:
    """Chats about three scenes, which the small checkpoint answers well; the first has two turns."""
    folder = Path(training_cases._session_folder.name) / "words"
    write_chats(folder, 3, about="words")
    first, second, *others = (json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines())
    asked, told = second["messages"]
    both = {"messages": [*first["messages"], {**asked, "content": asked["content"][1:]}, told]}
    lines = [json.dumps(chat) for chat in (both, *others)]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chats.jsonl"


@cache
def model() -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(EMBEDDED).eval()


@cache
def chats() -> ChatSamples:
    processor = BardVLProcessor.from_pretrained(EMBEDDED)
    encoder = ChatEncoder(processor, model().config, ChatLimits(32, 512), words().parent)
    return ChatSamples(open_chats(words()), encoder)


@cache
def writer() -> Writer:
    return Writer(model(), chats().encoder.tokenizer, 32, ASKED)


@cache
def answers() -> dict[int, list[Any]]:
    return writer().answers([chats()[number] for number in range(len(chats()))])


def recipe_of(output: Path, **changes: Any) -> str:
    shape = {"model_name_or_path": str(EMBEDDED), "train_data": str(words()), "max_length": 512, **vars(ASKED)}
    given = settings(output, **{**shape, "accept": "all", "learning_rate": 1e-4, **changes})
    return str(write_recipe(output.with_suffix(".yaml"), given))


def history_of(sample: Any) -> list[Any]:
    """The steps of a sample's answer, decoded alone."""
    output = model().generate(
        **prompt_inputs([sample], 480),
        confidence_threshold=ASKED.answer_confidence_threshold,
        max_new_tokens=96,
        output_history=True,
        return_dict_in_generate=True,
    )
    return output.history[0]


def likelihoods(rows: Any, ids: torch.Tensor) -> torch.Tensor:
    """The probability of the likeliest token at every column of packed rows."""
    found = []

    def keep(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        found.append(head(hidden).softmax(-1).amax(-1))
        return hidden.new_zeros(())

    model()(**model_inputs(rows, ids, dense_mask(rows.layout())[:, None]), objective=keep)
    return found[0]


@torch.no_grad()
def test_states_are_those_of_inference_with_its_confidences():
    own = OwnAnswers(chats(), answers(), lambda *_: True, with_order=True)
    assert len(own) == 6
    compared = set()
    for number in range(len(own)):
        sample, steps = own[number], history_of(own[number])
        last = {step.block: step.ids for step in steps}
        if ((sample.orders[0] == NEVER) & (torch.cat([*last.values()]) != MASK)).any():
            continue  # something else than padding stood behind the end: no state shows that
        rows = pack([sample, sample], 32, 512, pad_token_id=480, response_padding_id=482)
        rows.sample_ids[1] += 100
        for seed in range(4):
            noise = corrupt_rows(rows, 32, "mixed", "sample", MASK, torch.arange(9), seed, 0)
            assert not noise.replaced.any()
            found = likelihoods(rows, noise.ids)
            for block in range(steps[-1].block + 1):
                of_block = [step for step in steps if step.block == block]
                before = [torch.full((32,), MASK), *(step.ids for step in of_block[:-1])]
                in_block = rows.noisy & ((rows.place - rows.origin) // 32 == block)
                for here in (in_block & (rows.sample == 0), in_block & (rows.sample == 1)):
                    (at,) = [step for step, ids in enumerate(before) if torch.equal(ids, noise.ids[here])]
                    masked = noise.masked[here]
                    assert noise.t[here].unique().item() == pytest.approx((~masked).float().mean().item())
                    torch.testing.assert_close(found[here][masked], of_block[at].confidence[masked], atol=1e-4, rtol=0)
                    compared.add(at)
    assert compared >= {0, 1}, "answers took too few steps to tell states apart"


def test_what_was_never_decided_is_never_shown():
    (turn,), sample = answers()[1], chats()[1]
    history = history_of(sample)
    assert len(turn.order) == 32 * (history[-1].block + 1)
    for step in history:
        if step.block == history[-1].block:  # behind the end: one place undecided, one with something else than padding
            step.committed[-1], step.ids[-1] = False, MASK
            step.ids[-2] = torch.where(step.ids[-2] == MASK, MASK, 7)
    changed = writer().own_answer(sample, torch.tensor(turn.ids), order_of(history))
    assert changed.order == [*turn.order[:-2], None, None]


def kill_at(monkeypatch: Any, call: int) -> None:
    """End the run before a batch is decoded, as Ctrl-C does."""
    calls, decode = [], Writer.decode

    def dying(self: Writer, samples: Any) -> Any:
        calls.append(samples)
        if len(calls) == call:
            raise KeyboardInterrupt
        return decode(self, samples)

    monkeypatch.setattr(Writer, "decode", dying)


@pytest.mark.thorough
def test_a_kill_loses_and_doubles_nothing_and_training_repeats_to_the_bit(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shape = {"max_steps": 3, "save_steps": 1, "certainty_weight": 0.5}
    assert self_distill.main([recipe_of(whole, **shape)]) == 0
    assert "6 own answers learnt, 0 left out" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        kill_at(patch, 3)  # the first three chats have four turns, which are two batches
        assert self_distill.main([recipe_of(cut, **shape)]) == 130
    file = cut / "answers" / "process-0.jsonl"
    assert len(file.read_text().splitlines()) == 3
    with file.open("a") as opened:
        opened.write(file.read_text()[:100])  # of a line
    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionTrainer, "training_step", dying_step(BlockDiffusionTrainer.training_step))
        assert self_distill.main([recipe_of(cut, **shape)]) == 130
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # nothing is asked again
        assert self_distill.main([recipe_of(cut, **shape)]) == 0
    lines = [(run / "answers" / "process-0.jsonl").read_text() for run in (whole, cut)]
    assert lines[0] == lines[1]
    assert [json.loads(line)["chat"] for line in lines[0].splitlines()] == [0, 1, 2, 3, 4]
    weights = [load_file(run / "block-32" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    before = load_file(EMBEDDED / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in weights[0].items())


def dying_step(step: Any) -> Any:
    """A training step that is Ctrl-C in the second one of a run."""

    def dying(self: BlockDiffusionTrainer, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *given, **named)

    return dying


def is_caption(chat: dict[str, Any], own: str, told: str) -> bool:
    """For `accept`."""
    assert isinstance(own, str)
    assert told.endswith(".")
    return chat["messages"][0]["content"][-1]["text"] == "Describe the picture."


def fails(chat: dict[str, Any], own: str, told: str) -> bool:
    """For `accept`."""
    raise OverflowError(f"{len(own)} letters")


def test_a_check_says_what_is_learnt():
    found = {number: list(turns) for number, turns in answers().items()}
    text = found[1][0].text
    found[1] = [type(found[1][0])(**{**vars(found[1][0]), "text": text[:-1]})]
    found[2] = [type(found[2][0])(**{**vars(found[2][0]), "ended": False})]
    exact = sum(turn.text == turn.told and turn.ended for turns in found.values() for turn in turns)
    assert 0 < exact < 5
    names = {"all": 5, "exact": exact, "test_self_distill:is_caption": 4}
    for name, count in names.items():
        own = OwnAnswers(chats(), found, SelfDistillArguments(accept=name).judge(), with_order=False)
        assert len(own) == count
        assert own.left_out == {"unfinished": 1} | ({"not accepted": 5 - count} if count < 5 else {})
        assert not own[0].orders
    assert len({own[number].sample_id for number in range(len(own))}) == len(own)
    judge = SelfDistillArguments(accept="test_self_distill:fails").judge()
    with pytest.raises(RecipeError, match=r"`accept` failed on chat 0: OverflowError: .* letters"):
        OwnAnswers(chats(), found, judge, with_order=False)
    with pytest.raises(RecipeError, match=r"no own answer can be learnt: .*6 not accepted"):
        OwnAnswers(chats(), answers(), lambda *_: False, with_order=True)


BAD = {
    "no function": ({"accept": "json:nothing"}, "`accept` 'json:nothing' names no function"),
    "no module": ({"accept": "nowhere:f"}, "No module named 'nowhere'"),
    "no check": ({"accept": "some"}, "`accept` must be exact, all or module:function, got 'some'"),
    "no callable": ({"accept": "json:__name__"}, "`accept` 'json:__name__' is no function"),
    "length": ({"answer_max_new_tokens": 0}, "`answer_max_new_tokens` must be at least 1, got 0"),
    "threshold": ({"answer_confidence_threshold": 2.0}, "must lie between 0 and 1, got 2.0"),
    "certainty": ({"certainty_weight": -1.0}, "`certainty_weight` must be at least 0, got -1.0"),
    "temperature": ({"certainty_temperature": 0.0}, "`certainty_temperature` must be above 0, got 0.0"),
    "stream": ({"streaming": True}, "leave `streaming` out"),
    "inverse time": ({"loss_form": "inverse_time"}, "which `states: recorded` has not"),
}


@pytest.mark.parametrize("case", [*BAD, "autoregressive"])
def test_bad_recipes(tmp_path, capsys, case):
    changes, told = BAD.get(case, ({"model_name_or_path": str(qwen_folder())}, "is autoregressive"))
    assert self_distill.main([recipe_of(tmp_path / "run", **changes)]) == 1
    assert told in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_answers_of_other_settings_are_not_taken(tmp_path):
    files = AnswerFiles(tmp_path / "answers")
    files.begin({"block_size": 32})
    files.append(answers())
    again = AnswerFiles(tmp_path / "answers", process=1)
    again.begin({"block_size": 32})
    assert again.read() == answers()
    with pytest.raises(RecipeError, match="was begun with `block_size` 32, now it is 16"):
        again.begin({"block_size": 16})


@pytest.mark.thorough
def test_the_trial_keeps_what_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "ARMS", {"own answers": trial.ARMS["own answers"]})
    flags = [str(tmp_path / "trial"), "--scenes", "2", "--held-out", "1", "--steps", "1"]
    trial.main(flags)
    scores = json.loads((tmp_path / "trial" / "scores.json").read_text())["scores"]
    assert [[each["threshold"] for each in of_arm] for of_arm in scores.values()] == [[0.5, 0.7, 0.9]] * 2
    assert all(each["exact"] in (0, 50, 100) and each["tokens_per_forward"] > 2 for each in scores["before"])
    monkeypatch.setattr(trial, "score", lambda *_: pytest.fail("scored again"))
    trial.main(flags)
    with pytest.raises(SystemExit):
        trial.main([*flags[:-1], "2"])
    assert "scores.json has the scores of another trial" in capsys.readouterr().err
