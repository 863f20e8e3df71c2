"""Answers within a form: the search against brute force, automata against expressions, and `generate` as a whole.

Brute force enumerates every sequence of a block. Whole answers are read by the form itself: by Python's `json` and
`regex`, which know nothing of automata.
"""

import itertools
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bard_vl import BardVLForConditionalGeneration, BardVLProcessor
from bard_vl.forms_bard_vl import Form, range_expression
from bard_vl.remasking_bard_vl import GREEDY, REMASKING_RULES, Chooser, Sampling
from bard_vl.spelling_bard_vl import Automaton, Spelling, byte_automaton, minimal, spelling_of
from bard_vl.structured_bard_vl import BlockForm, Groups, Place, largest, total
from bard_vl.viewer import Recording
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thorough import cases

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
MASK, EOS, NUM_TOKENS = 6, 5, 7  # of the small vocabularies
CPU = torch.device("cpu")

OBJECT = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "colour": {"enum": ["red", "blue"]},
        "note": {"type": "string", "maxLength": 3},
    },
    "required": ["count", "colour", "note"],
}
FORMS: dict[str, dict[str, Any]] = {
    "choices": {"choices": ["red", "dark green", "blue circle", "blue square"]},
    "regex": {"regex": r"[0-9]{1,3}( kg| g)"},
    "json_schema": {"json_schema": OBJECT},
    "template": {
        "template": "Colour: {colour}, {{size}}: {size}.",
        "slots": {"colour": {"choices": ["red", "blue"]}, "size": {"max_length": 8}},
    },
}


# --- the search ----------------------------------------------------------------------------------------------------


@st.composite
def automata(draw: st.DrawFn) -> Automaton:
    """An automaton of up to four states over five tokens, in which some answer is possible."""
    num_states = draw(st.integers(1, 4))
    after = st.integers(-2, num_states - 1).map(lambda state: max(state, -1))
    steps = draw(st.lists(st.lists(after, min_size=5, max_size=5), min_size=num_states, max_size=num_states))
    accepts = draw(st.lists(st.booleans(), min_size=num_states, max_size=num_states).filter(any))
    class_of = np.array([*range(5), 5, 5])
    try:
        return Automaton.of(np.column_stack([steps, [-1] * num_states]), np.array(accepts), class_of, EOS)
    except ValueError:
        assume(False)
        raise


def completable(automaton: Automaton, state: int, size: int, room: int, left: int) -> dict[tuple[int, ...], int]:
    """Every sequence of a block that leaves the form completable, with the state behind it."""
    found, end = {}, automaton.num_states - 1
    for sequence in itertools.product(range(NUM_TOKENS), repeat=size):
        here = state
        for place, token in enumerate(sequence):
            if place >= room:
                here = end if automaton.accepts[here] and token == EOS else -1
            else:
                here = int(automaton.table[here, automaton.class_of[token]])
            if here < 0:
                break
        if here >= 0 and (automaton.distance[here] <= max(left, 0)):
            found[sequence] = here
    return found


@settings(max_examples=cases(75), deadline=None)
@given(automata(), st.integers(1, 3), st.integers(0, 4), st.integers(0, 9999), st.booleans(), st.data())
def test_the_choice_is_the_best_completion_and_its_confidence_the_share(
    automaton: Automaton, size: int, ahead: int, seed: int, overwrites: bool, data: st.DataObject
) -> None:
    room, left = min(size, ahead + 1), ahead + 1 - size
    state = data.draw(st.integers(0, automaton.num_states - 1))
    assume(automaton.distance[state] <= ahead + 1)
    ways = completable(automaton, state, size, room, left)
    assert ways, "a form that is near enough can be completed"
    known = data.draw(st.sampled_from(sorted(ways)))
    is_open = torch.tensor([data.draw(st.lists(st.booleans(), min_size=size, max_size=size))])
    held = torch.tensor([known]).masked_fill(is_open, MASK)
    logits = torch.randn(1, size, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 2
    scores = logits.masked_fill((torch.arange(size) >= room)[None, :, None], 0.0)
    form = BlockForm([automaton], CPU)
    place = Place(torch.tensor([state]), torch.tensor([room]), torch.tensor([left]))

    dictated, tokens = form.dictates(held, place, MASK)
    chooser = Chooser(MASK, GREEDY, REMASKING_RULES["margin"].measure, keeps_present=True)
    choice = form.choose(logits.clone(), held, place, chooser, overwrite_threshold=0.4 if overwrites else None)

    def weight(sequence: tuple[int, ...], places: Any) -> float:
        return sum(float(scores[0, place, sequence[place]]) for place in places)

    def shares(place: int) -> list[float]:
        """Of each token at a position, the others as they are."""
        fits = [w for w in ways if all(o or w[i] == held[0, i] for i, o in enumerate(is_open[0]) if i != place)]
        free = [i for i in range(size) if is_open[0, i] or i == place]
        weights = torch.tensor([weight(w, free) for w in fits], dtype=torch.float64).softmax(0)
        return [float(sum(p for p, w in zip(weights, fits, strict=True) if w[place] == t)) for t in range(NUM_TOKENS)]

    share = [shares(place) for place in range(size)]
    reopened = [
        overwrites and not is_open[0, i] and max(row) > 0.4 + 1e-4 and row.index(max(row)) != held[0, i]
        for i, row in enumerate(share)
    ]
    assume(not overwrites or all(abs(max(row) - 0.4) > 1e-3 for row in share))
    free = [i for i in range(size) if is_open[0, i] or reopened[i]]
    fits = [w for w in ways if all(i in free or w[i] == held[0, i] for i in range(size))]
    best = max(weight(w, free) for w in fits)
    chosen = tuple(choice.ids[0].tolist())
    assert chosen in fits
    assert weight(chosen, free) == pytest.approx(best, abs=1e-3)
    assert choice.form_state is not None
    assert choice.form_state.item() == ways[chosen]
    for i in range(size):
        if reopened[i]:
            assert choice.confidence[0, i].item() == pytest.approx(max(share[i]), abs=1e-4)
        elif not any(reopened):
            assert choice.confidence[0, i].item() == pytest.approx(share[i][chosen[i]], abs=1e-4)
            assert choice.present is not None
            assert (
                i >= room or is_open[0, i] or choice.present[0, i].item() == pytest.approx(share[i][known[i]], abs=1e-4)
            )
            first, second = sorted(share[i])[:-3:-1]
            assert i >= room or choice.measure[0, i].item() == pytest.approx(first - second, abs=1e-4)
    fits = [w for w in ways if all(is_open[0, i] or w[i] == held[0, i] for i in range(size))]
    alone = [bool(is_open[0, i]) and len({w[i] for w in fits}) == 1 for i in range(size)]
    assert dictated[0].tolist() == alone
    assert all(tokens[0, i].item() == fits[0][i] for i in range(size) if alone[i])


@settings(max_examples=cases(12), deadline=None)
@given(automata(), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 99))
def test_paths_are_drawn_by_their_weights(automaton: Automaton, temperature: float, seed: int) -> None:
    size, left, draws = 2, 3, 4000
    assume(automaton.distance[0] <= size + left)
    ways = completable(automaton, 0, size, size, left)
    logits = torch.randn(1, size, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)).expand(draws, -1, -1)
    place = Place(*(torch.full((draws,), n) for n in (0, size, left)))
    chooser = Chooser(MASK, Sampling(temperature), REMASKING_RULES["low_confidence_dynamic"].measure, False)
    generator = torch.Generator().manual_seed(seed)
    ids = (
        BlockForm([automaton], CPU)
        .choose(logits.clone(), torch.full((draws, size), MASK), place, chooser, generator)
        .ids
    )
    weights = torch.tensor([sum(float(logits[0, i, t]) for i, t in enumerate(w)) for w in ways]) / temperature
    counts = {tuple(w): 0 for w in ways}
    for row in ids.tolist():
        counts[tuple(row)] += 1
    expected = weights.softmax(0)
    seen = torch.tensor(list(counts.values())) / draws
    assert (seen - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


def test_rows_of_different_forms_are_solved_as_if_alone() -> None:
    automata = [spelling().automaton(Form.read(form)) for form in (*FORMS.values(), FORMS["regex"])]
    size, vocab_size = 6, spelling().vocab_size
    logits = torch.randn(len(automata), size, vocab_size, generator=torch.Generator().manual_seed(1))
    held = torch.full((len(automata), size), model().config.mask_token_id)
    chooser = Chooser(model().config.mask_token_id, GREEDY, REMASKING_RULES["entropy_bounded"].measure, True)

    def solve(rows: list[int]) -> Any:
        form = BlockForm([automata[row] for row in rows], CPU)
        n = len(rows)
        place = Place(torch.tensor(form.starts), torch.full((n,), size), torch.full((n,), 60))
        return form, form.choose(logits[rows], held[rows], place, chooser)

    together, choice = solve(list(range(len(automata))))
    for row in range(len(automata)):
        alone, single = solve([row])
        assert torch.equal(choice.ids[row], single.ids[0])
        assert torch.allclose(choice.confidence[row], single.confidence[0], atol=1e-5)
        assert torch.allclose(choice.measure[row], single.measure[0], atol=1e-4)
        start = together.starts[row]
        assert choice.form_state[row] - start == single.form_state[0]
        assert together.dictated(start, 99)[0] == alone.dictated(0, 99)[0]


@settings(max_examples=cases(25), deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.sampled_from([2, 3, None]), st.integers(0, 99))
def test_groups_reduce_what_is_in_them(group_of: list[int], width: int | None, seed: int) -> None:
    groups = Groups(np.array(group_of, dtype=np.int64), 6, CPU, width)
    values = torch.randn(2, len(group_of), generator=torch.Generator().manual_seed(seed))
    for how in (largest, total):
        found = groups.reduce(values, how)
        for group in range(6):
            own = values[:, [place for place, number in enumerate(group_of) if number == group]]
            expected = how(own) if own.shape[1] else torch.full((2,), -math.inf)
            assert torch.allclose(found[:, group], expected)


# --- the automata --------------------------------------------------------------------------------------------------


@cache
def processor() -> BardVLProcessor:
    return BardVLProcessor.from_pretrained(CHECKPOINT)


@cache
def model() -> BardVLForConditionalGeneration:
    """Untrained, with the tokenizer of the small example."""
    torch.manual_seed(0)
    config = BardVLForConditionalGeneration.config_class.from_pretrained(CHECKPOINT)
    return BardVLForConditionalGeneration._from_config(config, dtype=torch.float32).eval()


@cache
def spelling() -> Spelling:
    vocab_size = model().config.text_config.vocab_size
    return spelling_of(processor().tokenizer, vocab_size, processor().tokenizer.convert_tokens_to_ids("<|im_end|>"))


def walk(automaton: Automaton, ids: list[int]) -> int:
    """The state behind the tokens, -1 for none."""
    state = 0
    for token in ids:
        state = int(automaton.table[state, automaton.class_of[token]]) if state >= 0 else -1
    return state


@pytest.mark.parametrize("name", FORMS)
def test_random_ways_through_a_form_are_its_answers(name: str) -> None:
    form, rng = Form.read(FORMS[name]), random.Random(0)
    automaton = spelling().automaton(form)
    by_class = [np.flatnonzero(automaton.class_of == number) for number in range(automaton.table.shape[1])]
    for _ in range(200):
        state, ids = 0, []
        while state < automaton.num_states - 1:
            chosen = rng.choice(np.flatnonzero(automaton.table[state] >= 0))
            ids.append(int(rng.choice(by_class[chosen])))
            state = int(automaton.table[state, chosen])
        form.parse(b"".join(spelling().pieces[token] for token in ids[:-1]).decode())


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("choices", FORMS["choices"]["choices"]),
        ("regex", ["7 g", "120 kg"]),
        (
            "json_schema",
            [f'{{"count": 20, "colour": "blue", "note": "{note}"}}' for note in ("", "a\\n", "é €")],
        ),
        ("template", ["Colour: blue, {size}: very big.", "Colour: red, {size}: 7."]),
    ],
)
def test_answers_as_the_tokenizer_spells_them_are_accepted(name: str, texts: list[str]) -> None:
    automaton = spelling().automaton(Form.read(FORMS[name]))
    for text in texts:
        ids = spelling().spell(text)
        assert walk(automaton, [*ids, spelling().eos]) == automaton.num_states - 1
        assert walk(automaton, [*ids[:-1], spelling().eos]) == -1
        assert automaton.distance[0] <= len(ids)


def test_what_a_form_dictates_is_spelt_as_the_tokenizer_spells_it() -> None:
    automaton = spelling().automaton(Form.read({"json_schema": OBJECT}))
    tokens, _ = BlockForm([automaton], CPU).dictated(0, 99)
    ids = spelling().spell('{"count": 7')
    assert tokens == ids[: len(tokens)]
    assert len(tokens) >= len(spelling().spell('{"count":'))
    single = spelling().automaton(Form.read({"template": "No.", "slots": {}}))
    assert BlockForm([single], CPU).dictated(0, 99)[0] == [*spelling().spell("No."), spelling().eos]


@pytest.mark.parametrize(
    "expression",
    [
        "a|ab",
        "ab|a",
        "a( b)?",
        "(a|ab)(c|bcb)?",
        "a{1,3}( b| a)?",
        "(a b|a)*",
        "[ab]*( |b)",
        "((a|b)( b)?){2}",
        "a?",
        "é|[^a]b",
    ],
)
def test_an_automaton_accepts_what_the_expression_matches(expression: str) -> None:
    import regex

    delta, accepts = minimal(*byte_automaton(Form("regex", expression)))
    for length in range(6):
        for letters in itertools.product("ab cé", repeat=length):
            state, text = 0, "".join(letters)
            for byte in text.encode():
                state = int(delta[state, byte]) if state >= 0 else -1
            assert (state >= 0 and bool(accepts[state])) == bool(regex.fullmatch(expression, text)), text


@given(st.integers(-300, 1200), st.integers(0, 1500))
@settings(max_examples=cases(30), deadline=None)
def test_ranges_hold_their_integers(low: int, more: int) -> None:
    import regex

    high, expression = low + more, range_expression(low, low + more)
    for number in {low - 1, low, low + 1, (low + high) // 2, high - 1, high, high + 1, 0, 9, 10, 99, 100, 1000}:
        assert bool(regex.fullmatch(expression, str(number))) == (low <= number <= high)
    assert regex.fullmatch(expression, f"0{high}") is None


# --- generate ------------------------------------------------------------------------------------------------------


def prompts(num_rows: int, length: int = 9) -> torch.Tensor:
    return torch.randint(20, 380, (num_rows, length), generator=torch.Generator().manual_seed(num_rows))


def answers(output: Any, prompt: torch.Tensor) -> list[str]:
    rows = output.sequences[:, prompt.shape[1] :].tolist()
    return [processor().decode(row, skip_special_tokens=True) for row in rows]


def ask(prompt: torch.Tensor, structured: Any, **arguments: Any) -> Any:
    named = {"max_new_tokens": 48, "return_dict_in_generate": True, "tokenizer": processor(), **arguments}
    return model().generate(prompt, structured=structured, **named)


@pytest.mark.thorough(every=9)
@pytest.mark.parametrize("rule", REMASKING_RULES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_answer_has_its_form(rule: str, block_size: int) -> None:
    forms = [Form.read(form) for form in FORMS.values()]
    prompt = prompts(len(forms))
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.5}, {"temperature": 1.5, "top_k": 5, "revision": "remask"}]
    for seed, arguments in enumerate(ways[:1] + ways[1 + len(rule) % 2 :][:1]):
        output = ask(
            prompt, list(FORMS.values()), block_size=block_size, remasking_strategy=rule, confidence_threshold=0.3,
            denoising_steps=max(1, block_size // 4), seed=seed, **arguments,
        )  # fmt: skip
        for form, text in zip(forms, answers(output, prompt), strict=True):
            form.parse(text)


@pytest.mark.parametrize("revision", ["overwrite", "remask"])
def test_revised_answers_have_their_form(revision: str) -> None:
    prompt, form = prompts(3), Form.read(FORMS["json_schema"])
    how = {"revision": revision, "revision_threshold": {"overwrite": 0.02, "remask": 0.6}[revision]}
    output = ask(prompt, FORMS["json_schema"], block_size=8, temperature=1.5, seed=1, output_history=True, **how)
    for text in answers(output, prompt):
        form.parse(text)
    assert any(step.revised.any() for steps in output.history for step in steps)


@pytest.mark.thorough
def test_the_answer_ends_in_time_and_is_complete() -> None:
    form, prompt = (
        Form.read({"json_schema": {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}}),
        prompts(2),
    )
    needed = int(spelling().automaton(form).distance[0])
    for length in range(needed, needed + 6):
        for block_size in (1, 4, 8):
            output = ask(prompt, form, block_size=block_size, max_new_tokens=length, temperature=1.5, seed=length)
            assert output.sequences.shape[1] - prompt.shape[1] <= length
            assert all("s" in form.parse(text) for text in answers(output, prompt))
    with pytest.raises(ValueError, match=f"needs {needed} tokens at least, there is room for {needed - 1}"):
        ask(prompt, form, max_new_tokens=needed - 1)


@pytest.mark.parametrize(
    "arguments", [{}, {"attn_implementation": "eager"}, {"streamed": True}, {"num_return_sequences": 2}]
)
def test_what_is_dictated_takes_no_forwards(arguments: dict[str, Any]) -> None:
    """The same text in front of and behind a choice, whatever the block's edges."""
    front, behind, prompt = "There are three shapes: ", " in the picture and nothing else.", prompts(1)
    text = front + "{c}" + behind
    form = {"template": text, "slots": {"c": {"choices": ["one", "five"]}}}
    shown: list[int] = []

    class Streamer:
        put = staticmethod(lambda value: shown.extend(value.flatten().tolist()))
        end = staticmethod(lambda: None)

    arguments = dict(arguments)
    if (attention := arguments.pop("attn_implementation", None)) is not None:
        other = BardVLForConditionalGeneration._from_config(model().config, attn_implementation=attention)
        other.load_state_dict(model().state_dict())
    streamer = Streamer() if arguments.pop("streamed", False) else None
    answering = other.eval() if attention else model()
    for size in (4, 8):
        output = answering.generate(
            prompt, structured=form, tokenizer=processor(), block_size=size, max_new_tokens=64, streamer=streamer,
            return_dict_in_generate=True, **arguments,
        )  # fmt: skip
        told = processor().decode(output.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
        assert told in {front + choice + behind for choice in ("one", "five")}
        num_open = int((~output.dictated[0]).sum())
        assert 1 <= num_open <= 3
        assert (output.confidences[output.dictated] == 1).all()
        steps = output.block_step_counts
        assert steps.sum(-1).max() <= num_open + 1, "and the prompt's own forward, where the first block is dictated"
        assert (steps == 0).any()
        assert sum(output.num_forwards.values()) == steps.sum(-1).max()
        if streamer is not None:
            assert shown == output.sequences[0].tolist()
            shown.clear()
        # The cache holds what a fresh prefill would.
        longer = torch.cat([output.sequences[:1], prompts(1, 3)], 1)
        if attention is None and not arguments:
            again = answering.generate(
                longer, past_key_values=output.past_key_values, block_size=size, max_new_tokens=8
            )
            assert torch.equal(again, answering.generate(longer, block_size=size, max_new_tokens=8))


@pytest.mark.parametrize("copies", [1, 2])
def test_the_history_tells_of_dictated_blocks(copies: int) -> None:
    text = "There are three shapes: {c} in the picture and nothing else."
    form = {"template": text, "slots": {"c": {"choices": ["one", "five"]}}}
    prompt = prompts(1)
    output = ask(prompt, form, block_size=4, output_history=True, num_return_sequences=copies, temperature=1.5, seed=3)
    for row, steps in enumerate(output.history):
        blocks = {step.block: step.ids for step in steps}
        assert list(blocks) == list(range(len(blocks)))
        told = torch.cat([*blocks.values()])
        length = int((output.confidences[row] > 0).sum())
        assert told[:length].tolist() == output.sequences[row, prompt.shape[1] :][:length].tolist()
        committed = torch.stack([step.committed.long() for step in steps if step.block == 0]).sum(0)
        assert committed.tolist() == [1] * 4
        assert len(steps) - int(output.block_step_counts[row].sum()) == int((output.block_step_counts[row] == 0).sum())
        recording = Recording.of(output, processor(), row)
        front = spelling().spell("There are three shapes: ")[:-1]
        assert recording.dictated >= set(range(len(front)))
        assert recording.num_tokens - len(recording.dictated) == int((~output.dictated[row][:length]).sum()) > 0


@pytest.mark.compiled
def test_compiled_layers_and_a_static_cache_keep_to_the_form() -> None:
    prompt, forms = prompts(2), [FORMS["json_schema"], FORMS["template"]]
    plain, compiled = (ask(prompt, forms, block_size=4, cache_implementation=name) for name in ("dynamic", "static"))
    assert answers(compiled, prompt) == answers(plain, prompt)
    assert torch.equal(compiled.dictated, plain.dictated)
    for form, text in zip(forms, answers(compiled, prompt), strict=True):
        Form.read(form).parse(text)


def test_an_answer_without_alternatives_takes_the_prompts_forward_alone() -> None:
    output = ask(prompts(2), {"choices": ["There are three shapes in the picture and nothing else."]}, block_size=4)
    assert sum(output.num_forwards.values()) == 1
    assert output.dictated.all()


def test_processors_come_first_and_the_form_last() -> None:
    prompt, colours = prompts(1), ["red", "blue"]
    tokens = {colour: spelling().spell(colour)[0] for colour in colours}
    for colour, other in (colours, colours[::-1]):
        banned = ask(prompt, {"choices": colours}, suppress_tokens=[tokens[other]])
        assert answers(banned, prompt) == [colour]

        def prefer(ids: torch.Tensor, scores: torch.Tensor, wanted: int = tokens[colour]) -> torch.Tensor:
            return scores.index_fill(1, torch.tensor([wanted]), 50.0)

        assert answers(ask(prompt, {"choices": colours}, logits_processor=[prefer]), prompt) == [colour]
    everything = ask(prompt, {"choices": colours}, suppress_tokens=list(tokens.values()))
    assert answers(everything, prompt)[0] in colours


def test_a_stop_string_ends_an_answer_within_its_form() -> None:
    prompt, form = prompts(1), {"choices": ["There are three shapes in the picture and nothing else."]}
    output = ask(prompt, form, stop_strings=["shapes"], block_size=4)
    assert answers(output, prompt)[0].startswith("There are three shapes")
    assert len(answers(output, prompt)[0]) < 40


@pytest.mark.parametrize(
    ("structured", "named"),
    [
        ("red", "`structured` must be a mapping"),
        ({}, "must have one of"),
        ({"choices": ["a"], "regex": "b"}, "must have one of"),
        ({"grammar": "root"}, "'grammar'"),
        ({"choices": []}, "`choices` must be a non-empty list"),
        ({"choices": [1]}, "`choices` must be"),
        ({"regex": "("}, "`regex`: "),
        ({"regex": "a(?=b)"}, "`regex`: "),
        ({"regex": ""}, "`regex` must be a non-empty text"),
        ({"json_schema": "{"}, "`json_schema` must be a schema"),
        ({"json_schema": {"type": "number", "multipleOf": 2}}, "`multipleOf` cannot be kept to"),
        ({"json_schema": {"type": "integer", "minimum": 1}}, "bounds need"),
        ({"json_schema": {"type": "colour"}}, "Unsupported type: colour"),
        ({"template": "{a}"}, "with its `slots` beside it"),
        ({"template": "{a}", "slots": {}}, "slot 'a' without a form"),
        ({"template": "{a} {a}", "slots": {"a": {"max_length": 3}}}, "slot 'a' twice"),
        ({"template": "{a}", "slots": {"a": {"max_length": 3}, "b": {"max_length": 3}}}, "`slots` has 'b'"),
        ({"template": "{a!r}", "slots": {"a": {"max_length": 3}}}, "identifier"),
        ({"template": "{a}", "slots": {"a": {"max_length": -3}}}, "lengths"),
        ({"choices": ["a"], "slots": {}}, "they belong to `template`"),
        ([{"choices": ["a"]}] * 2, "2 forms for 1 prompts"),
    ],
)
def test_forms_that_cannot_be_kept_to_are_refused_by_name(structured: Any, named: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ask(prompts(1), structured)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_combined_with_a_form_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"choices": ["red"]}
    for arguments, named in (
        ({"tokenizer": None}, "`structured` needs `tokenizer=`"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"bad_words_ids": [[3, 4]]}, "bad_words_ids"),
    ):
        with pytest.raises(ValueError, match=named):
            ask(prompts(1), form, **arguments)
    monkeypatch.setattr("bard_vl.forms_bard_vl.outlines_core", None)
    assert answers(ask(prompts(1), form), prompts(1)) == ["red"], "choices need no library"
    with pytest.raises(ValueError, match=r"pip install 'bard-vl\[structured\]'"):
        ask(prompts(1), {"regex": "[0-9]{7}"})


def test_parsed_answers_are_values() -> None:
    assert Form.read(FORMS["json_schema"]).parse('{"count": 3, "colour": "red", "note": "x"}')["count"] == 3
    template = {"template": "{n}: {o}", "slots": {"n": {"regex": "[0-9]+"}, "o": {"json_schema": OBJECT}}}
    told = Form.read(template).parse('12: {"count": 3, "colour": "red", "note": "x"}')
    assert told == {"n": "12", "o": {"count": 3, "colour": "red", "note": "x"}}
    assert Form.read({"choice": ["a"]}).parse("a") == "a"
    nested = Form.read({"json": {"type": "object"}}).parse('{"a": [1, "x", null], "b": {"c": -1.5e+3}}')
    assert nested == {"a": [1, "x", None], "b": {"c": -1500}}
    with pytest.raises(ValueError, match="does not have the form"):
        Form.read(FORMS["json_schema"]).parse('{"count": 3, "col')


@pytest.mark.thorough
def test_the_command_line_gives_forms(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from bard_vl_cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["run", "--prompt", "What is at b4?", "--model", str(CHECKPOINT), *arguments])
        told = capsys.readouterr()
        return code, told.out.strip(), told.err.strip()

    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(OBJECT))
    assert run("--choices", "red|dark green")[:2] in [(0, "red"), (0, "dark green")]
    assert Form.read({"json": OBJECT}).parse(run("--json-schema", str(schema))[1])["count"] <= 20
    code, out, _ = run("--template", "{a}: {b}", "--slot", "a=x|y", "--slot", 'b={"regex": "[0-9]"}')
    assert code == 0
    assert json.loads(out).keys() == {"a", "b"}
    code, out, _ = run("--json", "--json-schema", json.dumps(OBJECT))
    assert json.loads(out)["value"] == json.loads(json.loads(out)["response"])
    picture = str(CHECKPOINT.parent / "images" / "1.png")
    code, out, _ = run(
        picture, "--json-schema", "points", "--draw", str(tmp_path / "drawn.png"), "--max-new-tokens", "40"
    )
    assert code == 0
    assert all(thing["point_2d"] for thing in json.loads(out))
    assert (tmp_path / "drawn.png").is_file()
    for arguments, named in (
        (("--draw", str(tmp_path / "a.png")), "--draw needs a picture"),
        (("--regex", "("), "`regex`: "),
        (("--regex", "a", "--choices", "b"), "give one of"),
        (("--slot", "a=b"), "give one of"),
        (("--json-schema", "nowhere.json"), "nowhere.json cannot be read"),
        (("--template", "{a}", "--slot", "a={"), "--slot a"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert named in err
        assert len(err.splitlines()) == 1
    code, _, err = run("--choices", "There are three shapes", "--max-new-tokens", "2")
    assert (code, "needs 4 tokens at least" in err) == (1, True)
