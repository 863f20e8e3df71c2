"""Processors of the settings: transformers' own at one token per block, and what holds where tokens commit together.

transformers' processors are the truth. Beyond what they define, plain loops over the tokens that came out look for
banned phrases and repeated n-grams, and whole blocks are compared with transformers' processors run from left to right.
"""

import random
from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from bard_vl.generation_config_bard_vl import BardVLGenerationConfig, DecodingSettings
from bard_vl.processors_bard_vl import TokenProcessors, build_processors
from bard_vl.remasking_bard_vl import REMASKING_RULES, Choice, Chooser, Sampling, in_order
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ragged import MASK, NO_ID, PAD, Row, collate, load
from thorough import cases
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

EOS = 6
MASK_ID = 0  # of the small vocabularies


def transformers_processors(arguments: dict[str, Any], eos: list[int]) -> LogitsProcessorList:
    """The processors of transformers' `generate` for these settings, in its order."""
    made: list[Any] = []
    if arguments.get("sequence_bias"):
        made.append(SequenceBiasLogitsProcessor([[list(ids), float(bias)] for ids, bias in arguments["sequence_bias"]]))
    if arguments.get("repetition_penalty"):
        made.append(RepetitionPenaltyLogitsProcessor(arguments["repetition_penalty"]))
    if arguments.get("no_repeat_ngram_size"):
        made.append(NoRepeatNGramLogitsProcessor(arguments["no_repeat_ngram_size"]))
    if arguments.get("bad_words_ids"):
        made.append(NoBadWordsLogitsProcessor(arguments["bad_words_ids"], eos))
    if arguments.get("suppress_tokens"):
        made.append(SuppressTokensLogitsProcessor(arguments["suppress_tokens"]))
    return LogitsProcessorList(made)


def processors_of(arguments: dict[str, Any], vocab_size: int, mask: int = MASK_ID) -> TokenProcessors:
    config = BardVLGenerationConfig(**arguments)
    resolved = DecodingSettings(
        **dict.fromkeys(DecodingSettings.__dataclass_fields__)  # type: ignore[arg-type]
        | {"mask_token_id": mask, "eos_token_ids": (EOS,)}
    )
    made = build_processors(config, resolved, vocab_size, torch.device("cpu"))
    assert made is not None
    return made


def chooser_of(temperature: float = 0.0, rule: str = "low_confidence_dynamic", mask: int = MASK_ID) -> Chooser:
    return Chooser(mask, Sampling(temperature), REMASKING_RULES[rule].measure, keeps_present=False)


@st.composite
def phrases(draw: st.DrawFn, tokens: list[int], most: int = 4, longest: int = 4) -> list[list[int]]:
    word = st.lists(st.sampled_from(tokens), min_size=2, max_size=longest)
    return draw(st.lists(word, min_size=1, max_size=most))


@st.composite
def arguments_of(draw: st.DrawFn, tokens: list[int]) -> dict[str, Any]:
    """Any of the settings that name a processor, at least one."""
    bias = st.sampled_from([-100.0, -2.5, -0.5, 0.75, 3.0, 100.0])
    biased = st.lists(st.sampled_from(tokens), min_size=1, max_size=3).map(tuple)
    found = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "bad_words_ids": phrases(tokens),
                "no_repeat_ngram_size": st.integers(1, 4),
                "sequence_bias": st.dictionaries(biased, bias, min_size=1, max_size=3).map(
                    lambda biases: [[list(ids), bias] for ids, bias in biases.items()]
                ),
                "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
                "suppress_tokens": st.lists(st.sampled_from(tokens), min_size=1, max_size=2),
            },
        )
    )
    assume(found)
    return found


def holds(tokens: list[int], first: int, phrase: list[int]) -> bool:
    """Whether the phrase ends at index `first` of the tokens or behind it."""
    size = len(phrase)
    return any(tokens[end - size : end] == phrase for end in range(max(size, first + 1), len(tokens) + 1))


def repeats(tokens: list[int], first: int, n: int) -> bool:
    """Whether an n-gram that ends at index `first` or behind it has been there before."""
    grams = [tuple(tokens[end - n : end]) for end in range(n, len(tokens) + 1)]
    return any(gram in grams[:place] for place, gram in enumerate(grams) if place + n > first)


# One position: what transformers defines ------------------------------------------------------------------------------


@settings(max_examples=cases(75))
@given(arguments=arguments_of([1, 2, 3, 4]), seed=st.integers(0, 10**6), num_rows=st.integers(1, 3))
def test_one_position_has_transformers_own_scores(arguments: dict[str, Any], seed: int, num_rows: int) -> None:
    rng, generator, vocab_size = random.Random(seed), torch.Generator().manual_seed(seed), 12
    lengths = [rng.randint(4, 14) for _ in range(num_rows)]
    ids = torch.full((num_rows, 20), MASK_ID)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor(rng.choices([1, 2, 3, 4], k=length))
    logits = torch.randn(num_rows, 1, vocab_size, generator=generator) * 2
    seen: list[torch.Tensor] = []

    def record(scores: torch.Tensor, first: int) -> torch.Tensor:
        seen.append(scores)
        return scores

    processors = processors_of(arguments, vocab_size)
    choice = processors.choose(logits.clone(), ids, torch.tensor(lengths), chooser_of(), then=record)
    theirs = transformers_processors(arguments, [EOS])
    for row, length in enumerate(lengths):
        expected = theirs(ids[row : row + 1, :length], logits[row].clone())
        torch.testing.assert_close(seen[0][row], expected, atol=1e-6, rtol=1e-6)
        expected[:, MASK_ID] = -torch.inf
        assert choice.ids[row, 0] == expected[0].argmax()


# A block, by brute force ----------------------------------------------------------------------------------------------


@settings(max_examples=cases(75))
@given(
    arguments=arguments_of([1, 2, 3, 4]),
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 3),
    size=st.integers(1, 7),
)
def test_a_block_is_chosen_as_by_transformers_from_left_to_right(
    arguments: dict[str, Any], seed: int, num_rows: int, size: int
) -> None:
    arguments.pop("repetition_penalty", None)  # which counts committed tokens alone
    assume(arguments)
    rng, vocab_size = random.Random(seed), 40
    lengths = [rng.randint(4, 14) for _ in range(num_rows)]
    ids = torch.full((num_rows, 24), MASK_ID)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor(rng.choices([1, 2, 3, 4], k=length))
    logits = torch.randn(num_rows, size, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[..., 1:5] += 3
    choice = processors_of(arguments, vocab_size).choose(logits.clone(), ids, torch.tensor(lengths), chooser_of())
    theirs = transformers_processors(arguments, [EOS])
    for row, length in enumerate(lengths):
        tokens = ids[row, :length].tolist()
        for place in range(size):
            scores = theirs(torch.tensor([tokens]), logits[row, place][None].clone())
            scores[:, MASK_ID] = -torch.inf
            tokens.append(int(scores.argmax()))
        assert choice.ids[row].tolist() == tokens[length:]


@settings(max_examples=cases(100))
@given(
    words=st.none() | phrases([1, 2, 3]),
    n=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    size=st.integers(2, 6),
)
def test_open_places_between_committed_tokens_are_filled_clean(
    words: list[list[int]] | None, n: int, seed: int, size: int
) -> None:
    """At every position exactly the tokens are banned that would complete something among the known tokens."""
    assume(words or n)
    rng, vocab_size, length = random.Random(seed), 40, 6
    tokens = [rng.randint(1, 3) for _ in range(length)]
    block = [rng.choice([MASK_ID, MASK_ID, rng.randint(1, 8)]) for _ in range(size)]
    words = words or []
    arguments = {"no_repeat_ngram_size": n} | ({"bad_words_ids": words} if words else {})
    seen: list[torch.Tensor] = []
    processors = processors_of(arguments, vocab_size)

    def record(scores: torch.Tensor, first: int) -> torch.Tensor:
        seen.append(scores)
        return scores

    ids = torch.tensor([[*tokens, *block, MASK_ID, MASK_ID]])
    logits = torch.randn(1, size, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[..., 1:4] += 3
    choice = processors.choose(logits, ids, torch.tensor([length]), chooser_of(), then=record)

    def complete(known: list[int], place: int) -> bool:
        """Whether a phrase or a repeated n-gram is around a place, by its known tokens."""
        spans = [(start, word) for word in words for start in range(place - len(word) + 1, place + 1) if start >= 0]
        if any(known[start : start + len(word)] == word for start, word in spans):
            return True
        grams = {start: tuple(known[start : start + n]) for start in range(len(known) - n + 1)} if n else {}
        grams = {start: gram for start, gram in grams.items() if MASK_ID not in gram}
        return any(
            gram == other and start != place_of
            for start, gram in grams.items()
            if start <= place < start + n
            for place_of, other in grams.items()
        )

    known = ids[0].tolist()
    for place in range(size):
        if block[place] != MASK_ID:
            continue
        for token in range(1, vocab_size):
            tried = [*known[: length + place], token, *known[length + place + 1 :]]
            assert (seen[place][0, 0, token] == -torch.inf) == complete(tried, length + place), (place, token)
        known[length + place] = int(choice.ids[0, place])


# What may commit before its left neighbours ---------------------------------------------------------------------------


@settings(max_examples=cases(50))
@given(
    biases=st.dictionaries(
        st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=3).map(tuple),
        st.sampled_from([-100.0, -1.5, 1.0, 4.0, 100.0]),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 10**6),
    size=st.integers(2, 4),
)
def test_a_choice_that_reads_nothing_open_is_transformers_whatever_comes(
    biases: dict[tuple[int, ...], float], seed: int, size: int
) -> None:
    """Every filling of the open positions that a choice does not read gives the same token by transformers."""
    rng, vocab_size = random.Random(seed), 5
    ids = torch.tensor([[*rng.choices([1, 2, 3], k=4), *[rng.choice([0, 0, 1, 2, 3]) for _ in range(size)]]])
    logits = torch.randn(1, size, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    arguments = {"sequence_bias": [[list(word), bias] for word, bias in biases.items()]}
    choice = processors_of(arguments, vocab_size).choose(logits.clone(), ids, torch.tensor([4]), chooser_of())
    assert choice.reads is not None
    theirs = transformers_processors(arguments, [EOS])
    held = ids[0].tolist()
    chosen = [token or int(choice.ids[0, place]) for place, token in enumerate(held[4:])]
    for place in range(size):
        undecided = [left for left in range(place) if held[4 + left] == MASK_ID]
        unread = [left for left in undecided if not choice.reads[0, place, left]]
        for filling in product(range(1, vocab_size), repeat=len(unread)):
            left = [*held[:4], *chosen[:place]]
            for index, token in zip(unread, filling, strict=True):
                left[4 + index] = token
            scores = theirs(torch.tensor([left]), logits[0, place][None].clone())
            scores[:, MASK_ID] = -torch.inf
            assert held[4 + place] or int(scores.argmax()) == chosen[place]


@given(seed=st.integers(0, 10**6), size=st.integers(1, 8))
def test_waiting_keeps_the_order_and_the_quota(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(4, size, generator=generator) < 0.7
    commit = masked & (torch.rand(4, size, generator=generator) < 0.5)
    reads = (torch.rand(4, size, size, generator=generator) < 0.3).tril(-1)
    quota = torch.randint(1, size + 1, (4,), generator=generator)
    found = in_order(commit, masked, quota, reads)
    assert not (found & ~masked).any()
    for row in range(4):
        still_open = masked[row] & ~found[row]
        assert found[row].sum() >= min(int(quota[row]), int(masked[row].sum()))
        assert not (found[row][:, None] & reads[row] & still_open).any(), "what commits reads nothing that stays open"
        if int((commit[row] & found[row]).sum()) >= quota[row]:
            assert not (found[row] & ~commit[row]).any(), "nothing commits in another's stead without need"


# Through `generate` ---------------------------------------------------------------------------------------------------


def run(batch: list[Row], **arguments: Any) -> Any:
    base = {"pad_token_id": PAD, "eos_token_id": [NO_ID], "mask_token_id": MASK}
    return load().generate(**collate(batch), return_dict_in_generate=True, **{**base, **arguments})


def responses(output: Any, batch: list[Row]) -> list[tuple[list[int], int]]:
    """Prompt and response of every row up to its length, and the length of the prompt."""
    width, copies = output.confidences.shape[1], len(output.sequences) // len(batch)
    lengths = [int((row != 0).sum()) for row in output.confidences]
    prompts = [row.ids for row in batch for _ in range(copies)]
    answers = [row[-width:][:length].tolist() for row, length in zip(output.sequences, lengths, strict=True)]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


@st.composite
def decoding(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of decoding: any rule, schedule, block, revision, sampling, mode."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    return {
        "block_size": size,
        "denoising_steps": draw(st.integers(1, size)),
        "remasking_strategy": draw(st.sampled_from(sorted(REMASKING_RULES))),
        "confidence_threshold": draw(st.sampled_from([0.0, 0.05, 0.2, 1.0])),
        "entropy_bound": draw(st.sampled_from([0.0, 6.0, 40.0])),
        "factor": draw(st.sampled_from([0.5, 8.0])),
        "revision": draw(st.sampled_from([None, "overwrite", "remask"])),
        "revision_threshold": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "temperature": draw(st.sampled_from([0.0, 0.0, 1.0])),
        "seed": draw(st.integers(0, 99)),
        "max_new_tokens": draw(st.integers(1, 24)),
        "num_return_sequences": draw(st.sampled_from([1, 1, 2])),
        "check_interval": draw(st.sampled_from([1, 3])),
        "eos_token_id": draw(st.sampled_from([[NO_ID], [NO_ID, 11, 12]])),
    }


FEW = list(range(10, 22))  # tokens that the model is held to, so that phrases and n-grams are common
ALL_BUT_FEW = [token for token in range(512) if token not in FEW]


def prompts(draw: st.DrawFn) -> list[Row]:
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    return [
        Row().then(random.Random(length * 7 + place).choices(FEW, k=length)) for place, length in enumerate(lengths)
    ]


@settings(max_examples=cases(40))
@given(data=st.data(), how=decoding(), words=phrases(FEW, most=12), held=st.booleans())
def test_a_banned_phrase_never_comes_out(data: Any, how: dict[str, Any], words: list[list[int]], held: bool) -> None:
    assume(all(len({word[-1] for word in words if word[:-1] == front}) < 10 for front in (w[:-1] for w in words)))
    batch = prompts(data.draw)
    assume(len({word[-1] for word in words}) < len(FEW))  # one is always left
    output = run(batch, bad_words_ids=words, **how, **({"suppress_tokens": ALL_BUT_FEW} if held else {}))
    for tokens, length in responses(output, batch):
        assert not held or set(tokens[length:]) <= set(FEW)
        assert not any(holds(tokens, length, word) for word in words)
    assert (output.block_step_counts <= how["denoising_steps"]).all()


@settings(max_examples=cases(40))
@given(data=st.data(), how=decoding(), n=st.integers(1, 4), held=st.booleans())
def test_a_repeated_ngram_never_comes_out(data: Any, how: dict[str, Any], n: int, held: bool) -> None:
    batch = prompts(data.draw)
    few = range(10, 10 + 80)  # more than a response and a prompt have: there is always a way
    allowed = {"suppress_tokens": [token for token in range(512) if token not in few]} if held else {}
    output = run(batch, no_repeat_ngram_size=n, **how, **allowed)
    for tokens, length in responses(output, batch):
        assert not repeats(tokens, length, n)
    assert (output.block_step_counts <= how["denoising_steps"]).all()


@settings(max_examples=cases(40))
@given(data=st.data(), how=decoding(), pairs=st.dictionaries(st.sampled_from(FEW), st.sampled_from(FEW), min_size=1))
def test_a_strong_bias_comes_out_as_from_left_to_right(data: Any, how: dict[str, Any], pairs: dict[int, int]) -> None:
    """Required successors of a token follow it, and banned ones never: +-1000 leaves transformers no other choice."""
    batch, negative = prompts(data.draw), data.draw(st.booleans())
    biases = [[list(pair), -1000.0 if negative else 1000.0] for pair in pairs.items()]
    output = run(batch, sequence_bias=biases, suppress_tokens=ALL_BUT_FEW, **how)
    for tokens, length in responses(output, batch):
        for place in range(length, len(tokens)):
            wanted = pairs.get(tokens[place - 1])
            assert wanted is None or (tokens[place] == wanted) != negative
    assert (output.block_step_counts <= how["denoising_steps"]).all()


@pytest.mark.thorough
def test_neighbours_that_commit_together_formed_the_phrase() -> None:
    """The pairs of a free response, banned one by one where all tokens of a block commit together."""
    row = Row().add_text(9, 1)
    how = {"block_size": 8, "denoising_steps": 1, "max_new_tokens": 40}
    free = responses(run([row], **how), [row])[0][0]
    for place in range(9, len(free) - 1):
        tokens, length = responses(run([row], bad_words_ids=[free[place : place + 2]], **how), [row])[0]
        assert not holds(tokens, length, free[place : place + 2])


@pytest.mark.parametrize("mode", ["static", "cache"])
def test_modes_decide_alike(mode: str) -> None:
    row = Row().add_text(16, 3)
    how = {
        "block_size": 8,
        "confidence_threshold": 0.05,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5, 6], [7, 8, 9]],
    }
    expected = run([row], **how, max_new_tokens=32)
    if mode == "static":
        with torch.compiler.set_stance("force_eager"):
            output = run([row], **how, max_new_tokens=32, cache_implementation="static")
    else:
        first = run([row], **how, max_new_tokens=16)
        tokens = first.sequences[0].tolist()
        output = run([Row().then(tokens)], **how, max_new_tokens=16, past_key_values=first.past_key_values)
    assert torch.equal(output.sequences, expected.sequences)


@settings(max_examples=cases(20))
@given(seed=st.integers(0, 999), arguments=arguments_of(FEW), temperature=st.sampled_from([0.0, 1.0]))
def test_block_size_one_is_transformers_own_loop(seed: int, arguments: dict[str, Any], temperature: float) -> None:
    row = Row().then(random.Random(seed).choices(FEW, k=6))
    how = {"block_size": 1, "max_new_tokens": 12, "temperature": temperature, "seed": seed}
    theirs = transformers_processors(arguments, [NO_ID])
    output = run([row], **how, **arguments)
    assert torch.equal(output.sequences, run([row], **how, logits_processor=list(theirs)).sequences)


def test_where_every_token_is_banned_the_first_comes_out_and_never_the_mask() -> None:
    logits = torch.randn(1, 4, 5)
    for mask, first in ((0, 1), (4, 0)):
        ids = torch.tensor([[1, 2, 3, 4 - mask, mask, mask, mask, mask]])
        found = processors_of({"no_repeat_ngram_size": 1}, 5, mask=mask).choose(
            logits, ids, torch.tensor([4]), chooser_of(mask=mask)
        )
        assert found.ids.tolist() == [[first] * 4]
        assert found.confidence.tolist() == [[0.0] * 4]


# What a step costs ----------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and among them those for which the host waits."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts["waits"] += name.startswith(self.WAITS)
        self.counts["operations"] += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ({"repetition_penalty": 1.3}, 30),
        ({"suppress_tokens": [3], "bad_words_ids": [[4]], "sequence_bias": [[[5], 1.0]]}, 15),
        ({"bad_words_ids": [[4, 5], [6, 7, 8]]}, 400),
        ({"no_repeat_ngram_size": 3}, 650),
        ({"sequence_bias": [[[4, 5], 1.0], [[6, 7, 8], -1.0]]}, 500),
        (
            {
                "repetition_penalty": 1.3,
                "suppress_tokens": [3],
                "bad_words_ids": [[4, 5], [9]],
                "no_repeat_ngram_size": 3,
                "sequence_bias": [[[6, 7], 1.0], [[8], 1.0]],
            },
            1100,
        ),
    ],
)
def test_a_step_of_eight_rows_waits_for_nothing(arguments: dict[str, Any], most: int) -> None:
    size, vocab_size = 16, 300
    ids = torch.full((8, 120), MASK_ID)
    for row in range(8):
        ids[row, : 40 + row] = torch.randint(1, vocab_size, (40 + row,))
    start, logits = torch.arange(40, 48), torch.randn(8, size, vocab_size)
    processors, chooser = processors_of(arguments, vocab_size), chooser_of()
    masked, quota = torch.ones(8, size, dtype=torch.bool), torch.ones(8, dtype=torch.long)
    with Operations() as seen:
        choice: Choice = processors.choose(logits, ids, start, chooser)
        if choice.reads is not None:
            in_order(masked, masked, quota, choice.reads)
    assert seen.counts["waits"] == 0
    assert seen.counts["operations"] <= most


# What the list of a caller says --------------------------------------------------------------------------------------


def held_as_settings(processors: list[Any], **how: Any) -> list[int]:
    row = Row().add_text(9, 1)
    return responses(run([row], logits_processor=processors, **{"max_new_tokens": 40, **how}), [row])[0][0]


@pytest.mark.thorough(every=2)
@pytest.mark.parametrize("others", [[], [TemperatureLogitsWarper(0.9)]])
def test_transformers_own_processors_hold_where_tokens_commit_together(others: list[Any]) -> None:
    how: dict[str, Any] = {"block_size": 8, "denoising_steps": 1}
    free = held_as_settings(others, **how)
    for place in range(9, 17):
        pair = free[place : place + 2]
        assert not holds(held_as_settings([*others, NoBadWordsLogitsProcessor([pair])], **how), 9, pair)
    few = {"suppress_tokens": [token for token in range(512) if not 10 <= token < 90]}
    assert not repeats(held_as_settings([*others, NoRepeatNGramLogitsProcessor(2)], **how, **few), 9, 2)
    wanted = held_as_settings([SequenceBiasLogitsProcessor([[[free[9], 55], 1000.0]]), *others], **how)
    assert all(then == 55 for first, then in pairwise(wanted[9:]) if first == free[9])
    assert wanted == held_as_settings(others, **how, sequence_bias=[[[free[9], 55], 1000.0]])


@pytest.mark.parametrize(
    "processors",
    [
        [TemperatureLogitsWarper(0.9), SequenceBiasLogitsProcessor([[[4, 5], 1.0]])],
        [EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([[1, 2]]))],
        [PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)],
    ],
    ids=lambda processors: type(processors[-1]).__name__,
)
def test_what_cannot_hold_where_tokens_commit_together_is_refused(processors: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"{type(processors[-1]).__name__}, which cannot hold where several tokens"):
        held_as_settings(processors, block_size=8)


@pytest.mark.thorough
def test_what_is_longer_than_a_row_costs_nothing() -> None:
    longest: list[dict[str, Any]] = [
        {"no_repeat_ngram_size": 10**9},
        {"bad_words_ids": [[5] * 10**5]},
        {"sequence_bias": [[[5] * 10**5, 3.0]]},
    ]
    free = held_as_settings([], block_size=8)
    assert all(held_as_settings([], block_size=8, **one) == free for one in longest)
