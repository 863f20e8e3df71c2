"""A row in a padded batch gives what it gives alone (invariant 3), and a block decoded against the cache has the logits
of one forward over the whole sequence (invariant 2): for random ragged batches with images and videos."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ragged
import torch
from bard_vl import BardVLGenerationOutput, DenoisingStep
from bard_vl.masking_bard_vl import block_visibility, partition_prompt, to_attention_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Row, generate, load, partition_sequence
from thorough import cases, stride


@dataclass
class Alone:
    """One row's run by itself, with the (block, vocabulary) logits that each of its steps decided on."""

    output: BardVLGenerationOutput
    logits: list[torch.Tensor]
    arguments: dict[str, Any]

    @classmethod
    def run(cls, model: Any, row: Any, arguments: dict[str, Any], **more: Any) -> "Alone":
        logits: list[torch.Tensor] = []
        hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0].clone()))
        try:
            return cls(generate(model, [row], **arguments, **more), logits, arguments)
        finally:
            hook.remove()

    @property
    def history(self) -> list[DenoisingStep]:
        return self.output.history[0]

    def ids_before(self, step: int) -> torch.Tensor:
        """State of the block (block size,) that a step decided on."""
        same_block = step > 0 and self.history[step - 1].block == self.history[step].block
        return self.history[step - 1].ids if same_block else torch.full_like(self.history[step].ids, ragged.MASK)

    def margin(self, step: int, committed: torch.Tensor) -> float:
        """The margin of a step's decision: in logits for the tokens, in probability for the places."""
        arguments, rest = self.arguments, self.logits[step].index_fill(-1, torch.tensor(ragged.MASK), -torch.inf)
        first, second = rest[committed | self.history[step].committed].topk(2, dim=-1).values.unbind(-1)
        masked = self.ids_before(step) == ragged.MASK
        confidence = (rest.max(-1).values - self.logits[step].logsumexp(-1)).exp()[masked].sort(descending=True).values
        of_block = sum(other.block == self.history[step].block for other in self.history[:step])
        size, steps = arguments["block_size"], arguments["denoising_steps"]
        quota, threshold = size // steps + (of_block < size % steps), arguments["confidence_threshold"]
        margins = [(first - second).min().item()]
        dynamic = arguments["remasking_strategy"] == "low_confidence_dynamic"
        if dynamic:
            margins.append((confidence - threshold).abs().min().item())
        if quota < len(confidence) and not (dynamic and confidence[quota - 1] > threshold):
            margins.append((confidence[quota - 1] - confidence[quota]).item())
        return min(margins)


def agrees(alone: Alone, history: list[DenoisingStep]) -> bool:
    """Compare a row's steps with those alone; False where the first difference is a close decision, else an error."""
    for step, (mine, other) in enumerate(itertools.zip_longest(alone.history, history)):
        if mine is None or other is None:
            raise AssertionError(
                f"{len(alone.history)} steps alone, {len(history)} otherwise, all the same until there"
            )
        if not (torch.equal(mine.committed, other.committed) and torch.equal(mine.ids, other.ids)):
            margin = alone.margin(step, other.committed)
            assert margin < ragged.EXCUSED_MARGIN, f"step {step} differs at a margin of {margin}: {mine} {other}"
            return False
        torch.testing.assert_close(other.confidence, mine.confidence, atol=1e-4, rtol=1e-3)
    return True


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Rows compared and rows excused; the excused ones stay under 0.1 %."""
    tally: Counter[str] = Counter()
    yield tally
    assert tally["compared"] > 0
    assert tally["excused"] < 1e-3 * tally["compared"], tally


def compare(tally: Counter[str], alone: Alone, output: BardVLGenerationOutput, row: int) -> bool:
    """Whether a row of `output` is the run alone in all that `generate` reports; False if it is excused."""
    tally["compared"] += 1
    if not agrees(alone, output.history[row]):
        tally["excused"] += 1
        return False
    length = (alone.output.confidences[0] > 0).sum().item()
    mine, theirs = alone.output.sequences[0], output.sequences[row]
    tokens = mine[len(mine) - length :]
    tail = theirs[len(theirs) - output.confidences.shape[1] :]
    assert tail.tolist() == tokens.tolist() + [ragged.PAD] * (len(tail) - length)
    torch.testing.assert_close(output.confidences[row, :length], alone.output.confidences[0], atol=1e-4, rtol=1e-3)
    assert not output.confidences[row, length:].any()
    counts = alone.output.block_step_counts[0].tolist()
    padded = output.block_step_counts[row].tolist()
    assert padded == counts + [0] * (len(padded) - len(counts))
    assert output.tokens_per_forward[row] == alone.output.tokens_per_forward[0]
    return True


def tokens_seen(model: Any) -> tuple[list[int], Any]:
    """The tokens in every forward of the language model from now on, padding included, and the hook to remove."""
    seen: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"][..., 0].numel()), with_kwargs=True
    )
    return seen, hook


def tokens_needed(batch: list[Any], step_counts: torch.Tensor, size: int, is_padded: bool) -> list[int]:
    """The tokens of every forward: prompts and first blocks, then blocks of running rows, finished ones with the next.

    With `is_padded` all windows of a forward are as wide as the widest of them.
    """
    forwards = [[len(row.ids) + size for row in batch]]
    totals, begins = step_counts.sum(-1).tolist(), step_counts.cumsum(-1).tolist()
    for number in range(1, max(totals)):
        running = [row for row, total in enumerate(totals) if total > number]
        forwards.append([2 * size if number in begins[row] else size for row in running])
    return [max(widths) * len(widths) if is_padded else sum(widths) for widths in forwards]


@pytest.mark.parametrize("attention", ["bard_vl", "eager"])
@settings(max_examples=cases(25))
@given(batch=st.lists(ragged.rows(), min_size=1, max_size=5), arguments=ragged.settings())
def test_a_row_in_a_padded_batch_is_the_row_alone(
    attention: str, tally: Counter[str], batch: list[Any], arguments: dict[str, Any]
) -> None:
    model = load(attention)
    seen, hook = tokens_seen(model)
    try:
        output = generate(model, batch, **arguments)
    finally:
        hook.remove()
    same = [compare(tally, Alone.run(model, row, arguments), output, place) for place, row in enumerate(batch)]
    assert output.num_encoded_tokens.tolist() == [len(row.ids) for row in batch]
    assert ragged.MASK not in output.sequences
    if all(same):  # rows advance at their own pace and leave the computation when they end
        size = arguments["block_size"]
        assert seen == tokens_needed(batch, output.block_step_counts, size, is_padded=attention == "eager")
        assert sum(output.num_forwards.values()) == len(seen)


def test_the_comparison_refuses_a_wide_difference() -> None:
    arguments = {"block_size": 4, "denoising_steps": 4, "max_new_tokens": 8, "eos_token_id": ragged.NO_ID}
    arguments |= {"confidence_threshold": 0.9, "remasking_strategy": "low_confidence_dynamic"}
    model = load()
    first, second = (Alone.run(model, Row().add_text(9, seed), arguments) for seed in (1, 2))
    with pytest.raises(AssertionError, match="step 0 differs"):
        agrees(first, second.history)
    with pytest.raises(AssertionError, match="8 steps alone, 7 otherwise"):
        agrees(first, first.history[:-1])


def mixed_batch() -> list[Any]:
    return [
        Row().add_text(5, 1).add_image((1, 4, 4), 2).add_text(3, 3),
        Row().add_text(1, 4),
        Row().add_video((2, 4, 4), 5).add_text(2, 6).add_image((1, 2, 6), 7),
        Row().add_text(22, 8),
    ]


FIXED = {"block_size": 4, "max_new_tokens": 14, "confidence_threshold": 0.1, "pad_token_id": ragged.PAD}


def test_the_order_of_the_rows_permutes_the_outputs() -> None:
    batch, model = mixed_batch(), load()
    eos = list(range(0, 500, 12))
    expected = generate(model, batch, **FIXED, eos_token_id=eos)
    lengths = {len(ragged.response(expected, batch, row, eos)) for row in range(4)}
    assert len(lengths) > 1  # rows end at different places
    for order in itertools.islice(itertools.permutations(range(4)), 0, None, stride()):
        output = generate(model, [batch[row] for row in order], **FIXED, eos_token_id=eos)
        assert torch.equal(output.sequences, expected.sequences[list(order)])
        assert torch.equal(output.block_step_counts, expected.block_step_counts[list(order)])


@pytest.mark.parametrize("visual", ["image", "video"])
def test_a_shorter_row_may_end_within_an_image(visual: str) -> None:
    batch, model = (
        [getattr(Row().add_text(2, 1), f"add_{visual}")((1, 4, 4), 2, closed=False), Row().add_text(30, 3)],
        load(),
    )
    assert batch[0].ids[-1] in (ragged.IMAGE, ragged.VIDEO)
    output = generate(model, batch, **FIXED)
    for place, row in enumerate(batch):
        assert torch.equal(output.sequences[place, -14:], generate(model, [row], **FIXED).sequences[0, -14:])


@pytest.mark.parametrize("place", range(5))
def test_a_row_that_ends_at_once_changes_nothing_for_the_others(place: int) -> None:
    batch, model, short = mixed_batch(), load(), Row().add_image((1, 4, 4), 9).add_text(30, 9)
    first_token = generate(model, [short], **FIXED).sequences[0, len(short.ids)].item()
    expected = generate(model, batch, **FIXED, eos_token_id=first_token)
    output = generate(model, [*batch[:place], short, *batch[place:]], **FIXED, eos_token_id=first_token)
    others = [row for row in range(5) if row != place]
    new = expected.confidences.shape[1]
    assert output.block_step_counts[place].count_nonzero() == 1
    assert torch.equal(output.sequences[others, -new:], expected.sequences[:, -new:])
    assert torch.equal(output.block_step_counts[others], expected.block_step_counts)


def test_greedy_returned_sequences_are_all_the_same_and_the_prompt_is_encoded_once() -> None:
    batch, model = mixed_batch(), load()
    eos = list(range(0, 500, 12))
    single = generate(model, batch, **FIXED, eos_token_id=eos)
    seen, hook = tokens_seen(model)
    try:
        output = generate(model, batch, **FIXED, eos_token_id=eos, num_return_sequences=3)
    finally:
        hook.remove()
    assert seen[0] == sum(len(row.ids) + FIXED["block_size"] for row in batch)
    assert torch.equal(output.sequences, single.sequences.repeat_interleave(3, dim=0))
    assert torch.equal(output.block_step_counts, single.block_step_counts.repeat_interleave(3, dim=0))


@settings(max_examples=cases(12))
@given(
    batch=st.lists(ragged.rows(), min_size=1, max_size=4),
    arguments=ragged.settings(max_new_tokens=12),
    texts=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_a_second_turn_on_a_batch_cache_is_each_rows_own_second_turn(
    tally: Counter[str], batch: list[Any], arguments: dict[str, Any], texts: list[int]
) -> None:
    model, eos = load(), arguments["eos_token_id"]
    first = generate(model, batch, **arguments)
    turns = []
    for place, (row, length) in enumerate(zip(batch, texts, strict=False)):
        turn = row.then(ragged.response(first, batch, place, eos)).add_text(length, place)
        turns.append(turn.add_image((1, 4, 4), place) if length % 3 == 0 else turn)
    output = generate(model, turns, **arguments, past_key_values=first.past_key_values)
    for place, (row, turn) in enumerate(zip(batch, turns, strict=True)):
        own = generate(model, [row], **arguments).past_key_values
        compare(tally, Alone.run(model, turn, arguments, past_key_values=own), output, place)
        compare(tally, Alone.run(model, turn, arguments), output, place)
        reused = len(turn.ids) - output.num_encoded_tokens[place].item()
        assert reused % arguments["block_size"] == 0
        assert reused <= min(len(row.ids) + arguments["max_new_tokens"] for row in batch)


@settings(max_examples=cases(12))
@given(row=ragged.rows(), arguments=ragged.settings())
def test_every_attention_gives_the_same_tokens(tally: Counter[str], row: Any, arguments: dict[str, Any]) -> None:
    alone = Alone.run(load("sdpa"), row, arguments)
    for attention in ("bard_vl", "eager"):
        compare(tally, alone, generate(load(attention), [row], **arguments), 0)


def block_of(place: int, prompt_length: int, size: int) -> int:
    """Number of a token's block: the prompt's blocks from 0, its last one short, then the response's."""
    if place < prompt_length:
        return place // size
    return (prompt_length + size - 1) // size + (place - prompt_length) // size


def visible_by_rule(length: int, prompt_length: int, size: int, padding: int) -> torch.Tensor:
    """(padding + length, the same) visibility by reading the rules token by token."""
    visible = torch.zeros(padding + length, padding + length, dtype=torch.bool)
    for query in range(padding + length):
        for key in range(padding + length):
            if query < padding or key < padding:
                visible[query, key] = query == key
            else:
                own, other = (block_of(place - padding, prompt_length, size) for place in (query, key))
                visible[query, key] = other <= own
    return visible


def state_at(row: Any, alone: Alone, step: int) -> list[int]:
    """The whole sequence that a step decided on: prompt, committed blocks, the block's state."""
    done = alone.history[step].block * alone.arguments["block_size"]
    start = len(row.ids)
    committed = alone.output.sequences[0, start : start + done].tolist()
    return row.ids + committed + alone.ids_before(step).tolist()


@pytest.mark.parametrize("attention", ["bard_vl", "eager"])
@settings(max_examples=cases(10))
@given(batch=st.lists(ragged.rows(), min_size=1, max_size=3), arguments=ragged.settings(), data=st.data())
def test_a_blocks_logits_against_the_cache_are_those_of_one_full_forward(
    attention: str, batch: list[Any], arguments: dict[str, Any], data: st.DataObject
) -> None:
    model, size = load(attention), arguments["block_size"]
    runs = [Alone.run(model, row, arguments) for row in batch]
    steps = [data.draw(st.integers(0, len(run.history) - 1)) for run in runs]
    states = [state_at(*parts) for parts in zip(batch, runs, steps, strict=True)]
    whole = [Row(state, row.images, row.videos) for state, row in zip(states, batch, strict=True)]
    inputs = ragged.collate(whole)
    length = inputs["input_ids"].shape[1]
    mask, positions = [], []
    for row, state in zip(batch, states, strict=True):
        padding = length - len(state)
        mask.append(visible_by_rule(len(state), len(row.ids), size, padding))
        prompt = ragged.collate([row])
        grids = {name: prompt.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        known = model.get_position_ids(prompt["input_ids"], **grids)
        behind = torch.arange(len(state) - len(row.ids))
        response = torch.stack([len(row.ids) + behind, *[known[1:].max() + 1 + behind] * 3])[:, None]
        positions.append(torch.cat([torch.zeros(4, 1, padding, dtype=torch.long), known, response], dim=-1))
    inputs["attention_mask"] = torch.stack(mask)[:, None]
    with torch.no_grad():
        logits = model(**inputs, position_ids=torch.cat(positions, dim=1), logits_to_keep=size).logits
    expected = torch.stack([run.logits[step] for run, step in zip(runs, steps, strict=True)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@settings(max_examples=cases(20))
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), size=st.integers(1, 8), behind=st.integers(1, 12))
def test_masks_are_a_token_by_token_reading_of_the_rules(lengths: list[int], size: int, behind: int) -> None:
    longest = max(lengths)
    padding = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    blocks = partition_prompt(padding, size)
    assert blocks.tolist() == [[-1] * (longest - n) + [place // size for place in range(n)] for n in lengths]
    visible = block_visibility(blocks, blocks)
    assert visible.tolist() == [visible_by_rule(n, n, size, longest - n).tolist() for n in lengths]
    assert torch.equal(block_visibility(blocks[:, -1:], blocks), visible[:, -1:])

    sequence = partition_sequence(torch.tensor(lengths), longest + behind, size)
    assert sequence.tolist() == [[block_of(place, n, size) for place in range(longest + behind)] for n in lengths]
    by_blocks = sequence[:, None, :] <= sequence[:, :, None]
    assert by_blocks.tolist() == [visible_by_rule(longest + behind, n, size, 0).tolist() for n in lengths]

    assert torch.equal(to_attention_mask(visible, "sdpa", torch.float32)[:, 0], visible)
    added = to_attention_mask(visible, "eager", torch.float16)[:, 0]
    assert added.dtype == torch.float16
    assert torch.equal(added, torch.where(visible, 0.0, torch.finfo(torch.float16).min).half())


@settings(max_examples=cases(10))
@given(batch=st.lists(ragged.rows(), min_size=1, max_size=4), size=st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_a_padded_forward_is_each_rows_forward_alone(batch: list[Any], size: int) -> None:
    model, inputs = load(), ragged.collate(batch)
    with torch.no_grad():
        logits = model(**inputs, block_size=size).logits
        for row, found in zip(batch, logits, strict=True):
            alone = ragged.collate([row])
            explicit = visible_by_rule(len(row.ids), len(row.ids), size, 0)[None, None]
            alone["attention_mask"] = explicit
            torch.testing.assert_close(found[-len(row.ids) :], model(**alone).logits[0], atol=1e-4, rtol=0)
