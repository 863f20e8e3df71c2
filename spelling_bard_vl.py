"""Automata of forms over a tokenizer's tokens.

outlines-core turns the expression of a form into an automaton over bytes; walked by the bytes of every token it becomes
one over tokens. What only one text can continue is spelt as the tokenizer spells it, so that it can be written without
a look at the model.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .forms_bard_vl import Form, library

MOST_STATES = 4096
NUM_KEPT = 16  # automata kept per tokenizer


@dataclass(frozen=True)
class Automaton:
    """The answers of a form as sequences of tokens. States count from 0, the start; the last is behind the EOS.

    Attributes:
        table: (states, classes) the state that a token leads to, -1 for none.
        class_of: (vocabulary,) the class of each token; tokens of a class lead to the same states from everywhere.
        eos: the token that ends an answer, and pads what is behind it.
    """

    table: np.ndarray
    class_of: np.ndarray
    eos: int

    @classmethod
    def of(cls, steps: np.ndarray, accepts: np.ndarray, class_of: np.ndarray, eos: int) -> "Automaton":
        """Of states (states, classes) without an end, of which those that accept may be followed by the EOS.

        States that are never reached, and tokens after which no answer can be completed, are left out.
        """
        steps, place = alike(steps)
        class_of = place[class_of]
        num_states, num_classes = steps.shape
        end = num_states
        table = np.full((num_states + 1, num_classes + 1), -1, dtype=np.int64)
        table[:-1, :-1] = steps
        table[np.flatnonzero(accepts), -1] = end
        table[end, -1] = end
        class_of[eos] = num_classes
        can_end = np.append(tokens_to(table, end) >= 0, False)
        if not can_end[0]:
            raise ValueError("`structured`: no answer of these tokens has the form")
        table[~can_end[table]] = -1
        seen, new = np.zeros(num_states + 1, bool), np.array([0])
        while len(new):
            seen[new] = True
            after = table[new]
            new = np.unique(after[(after >= 0) & ~seen[after]])
        seen[end] = True
        number = np.append(seen.cumsum() - 1, -1)
        columns, place = alike(number[table[seen]])
        return cls(columns, place[class_of], eos)

    @property
    def num_states(self) -> int:
        """States, the end included."""
        return len(self.table)

    @cached_property
    def accepts(self) -> np.ndarray:
        """(states,) bool, where the form is complete, the end included."""
        return self.table[:, self.class_of[self.eos]] == self.num_states - 1

    @cached_property
    def distance(self) -> np.ndarray:
        """(states,) least number of tokens, without the EOS, until the form is complete."""
        return np.maximum(tokens_to(self.table, self.num_states - 1) - 1, 0)

    @cached_property
    def dictated(self) -> list[tuple[int, int] | None]:
        """Per state, the only token that may follow and the state behind it; None for a choice, and behind the EOS."""
        size = np.bincount(self.class_of, minlength=self.table.shape[1])
        token = np.zeros(self.table.shape[1], dtype=np.int64)
        token[self.class_of] = np.arange(len(self.class_of))
        found: list[tuple[int, int] | None] = []
        for state, row in enumerate(self.table):
            ways = np.flatnonzero(row >= 0)
            is_only = size[ways].sum() == 1 and state < self.num_states - 1
            found.append((int(token[ways[0]]), int(row[ways[0]])) if is_only else None)
        return found


def tokens_to(table: np.ndarray, end: int) -> np.ndarray:
    """(states,) least number of steps to `end`, -1 where no way leads there."""
    steps = np.full(len(table) + 1, -1)  # a place behind the others for "no state"
    steps[end], count, new = 0, 0, np.array([end])
    while len(new):
        count += 1
        new = np.flatnonzero(np.isin(table, new).any(1) & (steps[:-1] < 0))
        steps[new] = count
    return steps[:-1]


@dataclass
class Spelling:
    """The spelling of texts by a tokenizer.

    Attributes:
        tokenizer: of byte-level pieces, as Qwen's.
        vocab_size: rows of the model's embedding.
        eos: the id that ends an answer.
        kept: automata of forms by key, the last used ones.
    """

    tokenizer: Any
    vocab_size: int
    eos: int
    kept: OrderedDict[str, Automaton] = field(default_factory=OrderedDict)

    @cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes of each token that is text; special tokens are none."""
        added = self.tokenizer.added_tokens_decoder
        found = {}
        for piece, token in self.tokenizer.get_vocab().items():
            if token in added:
                data = None if added[token].special else added[token].content.encode()
            else:
                try:
                    data = piece.translate(_BYTES).encode("latin-1")
                except UnicodeEncodeError as error:
                    raise ValueError(f"`structured` needs a tokenizer of byte-level pieces, not {piece!r}") from error
            if data and token < self.vocab_size and token != self.eos:
                found[token] = data
        return found

    def spell(self, text: str) -> list[int]:
        """The ids of a text; empty where they do not give it back."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids if b"".join(self.pieces.get(token, b"\xff") for token in ids) == text.encode() else []

    def automaton(self, form: Form) -> Automaton:
        """The automaton of a form."""
        if form.key not in self.kept:
            self.kept[form.key] = self._of_choices(form.value) if form.kind == "choices" else self._of_bytes(form)
            while len(self.kept) > NUM_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(form.key)
        return self.kept[form.key]

    def _of_choices(self, texts: list[str]) -> Automaton:
        """A tree of the choices as the tokenizer spells them."""
        tree: list[dict[int, int]] = [{}]
        ends = []
        for text in texts:
            state = 0
            ids = self.spell(text)
            if not ids:
                raise ValueError(f"`choices`: the tokenizer cannot spell {text!r:.80}")
            for token in ids:
                if token not in tree[state]:
                    tree[state][token] = len(tree)
                    tree.append({})
                state = tree[state][token]
            ends.append(state)
        tokens = sorted({token for node in tree for token in node})
        steps = np.full((len(tree), len(tokens) + 1), -1)
        for state, node in enumerate(tree):
            for token, after in node.items():
                steps[state, tokens.index(token)] = after
        class_of = np.full(self.vocab_size, len(tokens))
        class_of[tokens] = np.arange(len(tokens))
        return Automaton.of(steps, np.isin(np.arange(len(tree)), ends), class_of, self.eos)

    def _of_bytes(self, form: Form) -> Automaton:
        """The automaton over bytes, walked by the bytes of every token."""
        delta, accepts = minimal(*byte_automaton(form))
        if len(accepts) > MOST_STATES:
            raise ValueError(f"the form has {len(accepts)} states, {MOST_STATES} at most: shorten its bounds")
        columns, kind = alike(delta)
        kinds = bytes(kind.astype(np.uint8))
        words: dict[bytes, int] = {b"": 0}  # tokens whose bytes are alike to the form are one
        word_of = np.zeros(self.vocab_size, dtype=np.int64)
        for token, data in self.pieces.items():
            word_of[token] = words.setdefault(data.translate(kinds), len(words))
        steps = walk(columns, list(words))
        steps[:, 0] = -1  # ids that are no text lead nowhere
        for state, token in self._spelt(delta, accepts):
            kept = steps[state, word_of[token]]
            steps[state] = -1
            steps[state, word_of[token]] = kept
        return Automaton.of(steps, accepts, word_of, self.eos)

    def _spelt(self, delta: np.ndarray, accepts: np.ndarray) -> list[tuple[int, int]]:
        """(state, token) where the text that must follow begins with the token, as the tokenizer spells it.

        The last token of a text that something else may follow is left open: it may merge with what follows.
        """
        ways = delta >= 0
        single = (ways.sum(1) == 1) & ~accepts
        byte, found = ways.argmax(1), []
        for state in np.flatnonzero(single):
            data, place = bytearray(), int(state)
            while single[place]:
                data.append(int(byte[place]))
                place = int(delta[place, byte[place]])
            is_end = bool(accepts[place] and not ways[place].any())
            try:
                text = data.decode() if is_end else data.decode(errors="ignore")
            except UnicodeDecodeError:
                continue
            ids = self.spell(text) if data.startswith(text.encode()) else []
            if len(ids) > 1 or (ids and is_end):
                found.append((int(state), ids[0]))
        return found


_spellings: weakref.WeakKeyDictionary[Any, Spelling] = weakref.WeakKeyDictionary()


def spelling_of(tokenizer: Any, vocab_size: int, eos: int) -> Spelling:
    """The spelling of a tokenizer, kept as long as it lives."""
    kept = _spellings.get(tokenizer)
    if kept is None or (kept.vocab_size, kept.eos) != (vocab_size, eos):
        kept = _spellings[tokenizer] = Spelling(weakref.proxy(tokenizer), vocab_size, eos)
    return kept


def byte_automaton(form: Form) -> tuple[np.ndarray, np.ndarray]:
    """The answers of a form as bytes: (states, 256) next states, -1 for none, from state 0; (states,) which accept.

    A zero byte, which no answer holds, marks the end: without a mark outlines-core takes the first of two alternatives
    for the end where the second goes on, and does not go on behind a complete answer byte by byte.
    """
    module = library()
    vocabulary = module.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        index = module.Index(rf"(?:{form.expression})\x00", vocabulary)
    except ValueError as error:
        raise ValueError(
            f"`{form.kind}`: {error}; anchors and looks to the side are not supported, an answer is matched as a whole"
        ) from error
    ways = index.get_transitions()
    first = index.get_initial_state()
    states = [first, *sorted({*ways, *index.get_final_states()} - {first})]
    number = {state: place for place, state in enumerate(states)}
    delta = np.full((len(states), 256), -1)
    for state, row in ways.items():
        for byte, after in row.items():
            if byte < 256:
                delta[number[state], byte] = number[after]
    is_end = np.append(np.isin(states, list(index.get_final_states())), False)
    accepts = is_end[delta[:, 0]]
    delta[:, 0] = -1
    return delta, accepts


def minimal(delta: np.ndarray, accepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same automaton with equivalent states as one (Moore's refinement); state 0 stays the start."""
    label = np.append(accepts.astype(np.int64), -1)  # -1: no state
    count = 0
    while True:
        _, first, label_of = np.unique(
            np.column_stack([label[:-1], label[delta]]), axis=0, return_index=True, return_inverse=True
        )
        label[:-1] = label_of.reshape(-1)
        if len(first) == count:
            break
        count = len(first)
    # In the order in which the states appear: the start is first.
    order = np.argsort(first)
    rank = np.append(np.argsort(order), -1)
    return rank[label[delta[first[order]]]], accepts[first[order]]


def walk(columns: np.ndarray, words: list[bytes]) -> np.ndarray:
    """(states, words) the state that each word of kinds of bytes leads to by `columns` (states, kinds); -1 for none."""
    lengths = np.array([len(word) for word in words])
    letters = np.zeros((len(words), lengths.max() + 1), dtype=np.uint8)
    for row, word in enumerate(words):
        letters[row, : len(word)] = np.frombuffer(word, dtype=np.uint8)
    steps = np.full((len(columns), len(words)), -1, dtype=np.int32)
    for state in range(len(columns)):
        live = np.arange(len(words))
        here = np.full(len(words), state, dtype=np.int32)
        for place in range(letters.shape[1]):
            ends = lengths[live] == place
            steps[state, live[ends]] = here[ends]
            here = np.where(ends, -1, columns[here, letters[live, place]])
            live, here = live[here >= 0], here[here >= 0]
    return steps


def alike(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different columns of a table (rows, n), and which of them each of the n is."""
    weights = np.random.default_rng(0).integers(1, 2**62, len(table))
    _, first, place = np.unique(weights @ table.astype(np.int64), return_index=True, return_inverse=True)
    place = place.reshape(-1)
    if not np.array_equal(table[:, first[place]], table):  # two columns with one sum, as good as never
        _, first, place = np.unique(table, axis=1, return_index=True, return_inverse=True)
    return table[:, first], place.reshape(-1)


def _byte_letters() -> dict[int, str]:
    """For `str.translate`: the byte, as a letter of Latin-1, for each letter of a byte-level piece (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    unknown = dict.fromkeys(others, "\uffff")
    return unknown | {256 + place: chr(byte) for place, byte in enumerate(others)}


_BYTES = _byte_letters()
