"""The best completion of a block within a form, by every step's logits.

Left of a block everything is committed, so the state of the form's automaton in front of it is known. A path of the
automaton through the block's B positions takes one token at each. It is *completable* if it agrees with the tokens that
are committed in the block, and ends in a state from which the form can be completed in the tokens that are left. Among
all of them:

- the choice is the path of the largest product of probabilities (the sums of logits, by dynamic programming over states
  in the max-plus semiring), or a path drawn with this product to the power 1 / temperature as its weight;
- the confidence of a token is the share of all completable paths, weighted by their products, that have it at its
  position while the other positions are as committed (the same in the sum semiring, forwards and backwards).

Every step keeps the block completable, whatever the rule commits: the chosen path p is completable. Let C be the
tokens committed before the step, and K any set of p's tokens that commits now. p agrees with C, for only such paths are
looked at, and with K, whose tokens are its own; so p is a completable path for C and K together. A token that is masked
again leaves a subset of C, with which p agrees as well. A token that is overwritten is taken out of C before p is
looked for, and p's own token takes its place. At the first step of a block C is empty, and a completable path exists:
the state in front of a block is the end of such a path through the block before, and is no farther from a complete form
than the tokens that are left. So by induction the answer has the form when it ends, by the EOS or by the limit.

Tokens that lead to the same states from everywhere are a class; a class is reduced once per position, and all that
follows is as large as the automaton, not as the vocabulary. Tokens that lead nowhere are not looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .remasking_bard_vl import Choice, Chooser, probability, scaled
from .spelling_bard_vl import Automaton

FLOOR = -1e3  # the score of what processors or filters exclude: taken where the form leaves nothing else

Reduce = Callable[[torch.Tensor], torch.Tensor]


def largest(values: torch.Tensor) -> torch.Tensor:
    """The sum of the max-plus semiring over the last dimension."""
    return values.amax(-1)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of the semiring of log-probabilities over the last dimension."""
    return values.logsumexp(-1)


class Groups:
    """Items in groups, to be reduced group by group: a tree of padded lists, the same at every run.

    Args:
        group_of: (items,) the group of each; -1 for an item of no group, which is never looked at.
        num_groups: groups, of which some may be empty.
        device: of the lists.
        width: items that are reduced together; None for all.
    """

    def __init__(self, group_of: np.ndarray, num_groups: int, device: torch.device, width: int | None = 64):
        self.levels: list[torch.Tensor] = []
        self.num_items = len(group_of)
        items, num_items = np.argsort(group_of, kind="stable"), len(group_of)
        items = items[np.asarray(group_of)[items] >= 0]
        groups = np.asarray(group_of)[items]
        most = num_items if width is None else width
        while True:
            counts = np.bincount(groups, minlength=num_groups)
            starts = counts.cumsum() - counts
            place = np.arange(len(groups)) - starts[groups]
            is_last = bool(counts.max(initial=0) <= most)
            if is_last:
                lists, line, column = num_groups, groups, place
            else:
                parts = -(-counts // most)
                lists, column = int(parts.sum()), place % most
                line = (parts.cumsum() - parts)[groups] + place // most
            index = np.full((lists, max(1, column.max(initial=0) + 1)), num_items)
            index[line, column] = items
            self.levels.append(torch.from_numpy(index).to(device))
            if is_last:
                return
            groups = np.repeat(np.arange(num_groups), parts)
            items, num_items = np.arange(lists), lists

    @property
    def members(self) -> torch.Tensor:
        """(groups, most) items of each, padded with the number of items; where one level holds all."""
        return self.levels[-1]

    def lists(self, values: torch.Tensor) -> torch.Tensor:
        """(..., items) as the tree's lowest lists (..., lists, width), -inf where they are padded."""
        return take(padded(values), self.levels[0])

    def climb(self, lists: torch.Tensor, how: Reduce) -> list[torch.Tensor]:
        """The lists of every level, those that are given first; the last level has one list (..., groups, width)."""
        levels = [lists]
        for index in self.levels[1:]:
            levels.append(take(padded(how(levels[-1])), index))
        return levels

    def reduce(self, values: torch.Tensor, how: Reduce) -> torch.Tensor:
        """(..., items) to (..., groups); -inf for an empty one."""
        return how(self.climb(self.lists(values), how)[-1])

    def descend(self, levels: list[torch.Tensor], group: torch.Tensor, draw: Reduce) -> torch.Tensor:
        """(...,) an item of each `group`: the largest of what `draw` makes of the values, level by level.

        Args:
            levels: of `climb`.
            group: (...,) none of them empty; of an empty one the last item is told.
            draw: gives values of the shape that it gets.
        """
        found = group
        for index, lists in zip(reversed(self.levels), reversed(levels), strict=True):
            own = lists.take_along_dim(found[..., None, None], -2)[..., 0, :]
            found = index[found, draw(own).argmax(-1)]
        return found.clamp(max=self.num_items - 1)


def padded(values: torch.Tensor) -> torch.Tensor:
    """With -inf behind the last dimension, for padding to refer to."""
    return torch.nn.functional.pad(values, [0, 1], value=float("-inf"))


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[..., index]`; several times faster so on a CPU."""
    flat = index.flatten().expand(*values.shape[:-1], -1)
    return values.gather(-1, flat).unflatten(-1, index.shape)


@dataclass(frozen=True)
class Place:
    """The progress of n rows in their forms.

    Attributes:
        state: (n,) in front of the block.
        room: (n,) positions of the block that the answer may take.
        left: (n,) tokens that it may take behind the block.
    """

    state: torch.Tensor
    room: torch.Tensor
    left: torch.Tensor


@dataclass(frozen=True)
class Ways:
    """Steps of an automaton, each from a state to a state.

    Attributes:
        source, target: (ways,) states.
        ends: (ways,) bool, whether the form is complete behind it.
    """

    source: torch.Tensor
    target: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class Edges(Ways):
    """One way for each class of tokens that leads from a state to another.

    Attributes:
        of_class: (edges,) the class.
        by_class, by_pair: the edges of each class, and of each pair of states.
    """

    of_class: torch.Tensor
    by_class: Groups
    by_pair: Groups


@dataclass(frozen=True)
class Pairs(Ways):
    """One way for each pair of states with an edge between them.

    Attributes:
        into, out_of: the pairs that lead to each state, and from each.
    """

    into: Groups
    out_of: Groups


@dataclass(frozen=True)
class Classes:
    """Classes of tokens that lead to the same states from everywhere.

    Attributes:
        of: (vocabulary,) the class of each token.
        token: (classes,) a token of each.
        size: (classes,) tokens of each.
        tokens: the tokens of each that leads anywhere.
    """

    of: torch.Tensor
    token: torch.Tensor
    size: torch.Tensor
    tokens: Groups


class BlockForm:
    """The forms of a batch as one automaton on a device.

    Args:
        automata: a form of each row, the same object where rows share one.
        device: of the rows.
    """

    def __init__(self, automata: list[Automaton], device: torch.device):
        different = list({id(each): each for each in automata}.values())
        table, class_of, starts = joined(different)
        self.eos = automata[0].eos
        self.starts = [starts[[each is other for other in different].index(True)] for each in automata]
        self.dictated_tokens = [
            None if way is None else (way[0], way[1] + start)
            for each, start in zip(different, starts, strict=True)
            for way in each.dictated
        ]
        num_states, num_classes = table.shape
        is_end = np.concatenate([np.arange(each.num_states) == each.num_states - 1 for each in different])

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).long().to(device)

        def ways(source: np.ndarray, target: np.ndarray) -> dict[str, torch.Tensor]:
            return {"source": on_device(source), "target": on_device(target), "ends": on_device(is_end[target]).bool()}

        def groups(group_of: np.ndarray, num_groups: int, width: int | None = 64) -> Groups:
            return Groups(group_of, num_groups, device, width)

        self.table = on_device(table)
        self.distance = on_device(np.concatenate([each.distance for each in different]))
        leads = np.logical_or.reduce(table >= 0, axis=0)
        token = np.zeros(num_classes, dtype=np.int64)
        token[class_of] = np.arange(len(class_of))
        self.classes = Classes(
            of=on_device(class_of),
            token=on_device(token),
            size=on_device(np.bincount(class_of, minlength=num_classes)),
            tokens=groups(np.where(leads[class_of], class_of, -1), num_classes),
        )
        source, edge_class = np.nonzero(table >= 0)
        target = table[source, edge_class]
        pairs, pair_of = np.unique(source * num_states + target, return_inverse=True)
        self.edges = Edges(
            **ways(source, target),
            of_class=on_device(edge_class),
            by_class=groups(edge_class, num_classes),
            by_pair=groups(pair_of.reshape(-1), len(pairs)),
        )
        source, target = pairs // num_states, pairs % num_states
        self.pairs = Pairs(
            **ways(source, target),
            into=groups(target, num_states, width=None),
            out_of=groups(source, num_states, width=None),
        )

    def check_limits(self, limits: list[int]) -> None:
        """Raise `ValueError` where a row's form cannot be completed within its limit of tokens."""
        for least, limit in zip(self.distance[self.starts].tolist(), limits, strict=True):
            if least > limit:
                raise ValueError(
                    f"the form that `structured` asks for needs {least} tokens at least, there is room for {limit}: "
                    "raise `max_new_tokens`"
                )

    def dictated(self, state: int, room: int) -> tuple[list[int], list[int]]:
        """The tokens that must follow a state, `room` at most and up to the EOS, and the states behind each."""
        tokens: list[int] = []
        states: list[int] = []
        while len(tokens) < room and (way := self.dictated_tokens[state]) is not None:
            state = way[1]
            tokens.append(way[0])
            states.append(state)
        return tokens, states

    def choose(
        self,
        scores: torch.Tensor,
        held: torch.Tensor,
        place: Place,
        chooser: Chooser,
        generator: torch.Generator | None = None,
        overwrite_threshold: float | None = None,
    ) -> Choice:
        """Choose a completable path by the scores (n, block, vocabulary) of every position.

        Args:
            scores: logits, processed ones where there are processors; they are floored in place.
            held: (n, block) tokens, the mask id where undecided.
            place: of the blocks.
            chooser: says how.
            generator: source of randomness.
            overwrite_threshold: a committed token is open for another that is more probable; None for none.
        """
        scores = scores.clamp_(min=FLOOR)
        is_open = held == chooser.mask_token_id
        lists = self.classes.tokens.lists(scores)
        by_class = total(self.classes.tokens.climb(lists, total)[-1])
        around = self._around(by_class, held, is_open, place)
        if overwrite_threshold is not None:
            rival, sure = self._rivals(scores, by_class, around)
            reopened = ~is_open & (rival != held) & (sure > overwrite_threshold)
            around = self._around(by_class, held, is_open | reopened, place)
            ids, after = self._path(scores, lists, held, is_open | reopened, place, chooser, generator)
            confidence = torch.where(reopened, sure, self._share(scores, by_class, around, ids))
        else:
            ids, after = self._path(scores, lists, held, is_open, place, chooser, generator)
            confidence = self._share(scores, by_class, around, ids)
        measure = confidence
        if chooser.measure is not probability:
            measure = chooser.measure(scores + take(around, self.classes.of), confidence)
        present = self._share(scores, by_class, around, held) if chooser.keeps_present else None
        return Choice(ids, confidence, measure, present, form_state=after)

    def dictates(self, held: torch.Tensor, place: Place, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The open positions (n, block) at which every completable path has the same token, and that token."""
        is_open = held == mask_token_id
        free = self.classes.of.new_zeros(*held.shape, len(self.classes.size), dtype=torch.float32)
        by_class = self._committed(free, held, is_open)
        ways = self._through(by_class, held, place, largest) + by_class > float("-inf")
        return is_open & ((ways * self.classes.size).sum(-1) == 1), self.classes.token[ways.int().argmax(-1)]

    # --- the parts -------------------------------------------------------------------------------------------------

    def _committed(self, by_class: torch.Tensor, held: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
        """Scores (n, block, classes) with only the held token's class where a position is not open."""
        classes = torch.arange(by_class.shape[-1], device=held.device)
        is_held = classes == self.classes.of[held][..., None]
        known = torch.where(is_held, 0.0, float("-inf")).to(by_class.dtype)
        return torch.where(is_open[..., None], by_class, known)

    def _behind(self, held: torch.Tensor, place: Place) -> torch.Tensor:
        """(n, block) bool, positions that the answer may not take: the form must be complete there."""
        return torch.arange(held.shape[1], device=held.device) >= place.room[:, None]

    def _pairs(self, by_class: torch.Tensor, place: Place, how: Reduce) -> torch.Tensor:
        """(n, block, pairs) scores of the steps from state to state."""
        pairs = self.edges.by_pair.reduce(take(by_class, self.edges.of_class), how)
        behind = self._behind(by_class[..., 0], place)[..., None]
        return torch.where(behind, torch.where(self.pairs.ends, 0.0, float("-inf")).to(pairs.dtype), pairs)

    def _forwards(self, pairs: torch.Tensor, place: Place, how: Reduce) -> torch.Tensor:
        """(n, block + 1, states) scores of the ways from the block's begin."""
        states = torch.arange(len(self.table), device=pairs.device)
        here = torch.where(states == place.state[:, None], 0.0, float("-inf")).to(pairs.dtype)
        found = [here]
        for step in pairs.unbind(1):
            found.append(self.pairs.into.reduce(take(found[-1], self.pairs.source) + step, how))
        return torch.stack(found, 1)

    def _backwards(self, pairs: torch.Tensor, place: Place, how: Reduce) -> torch.Tensor:
        """(n, block + 1, states) scores of the ways to the block's end."""
        can_end = self.distance <= place.left.clamp(min=0)[:, None]
        found = [torch.where(can_end, 0.0, float("-inf")).to(pairs.dtype)]
        for step in reversed(pairs.unbind(1)):
            found.append(self.pairs.out_of.reduce(take(found[-1], self.pairs.target) + step, how))
        return torch.stack(found[::-1], 1)

    def _around(self, by_class: torch.Tensor, held: torch.Tensor, is_open: torch.Tensor, place: Place) -> torch.Tensor:
        """(n, block, classes) scores of all ways around a position of which a token of the class is there."""
        return self._through(self._committed(by_class, held, is_open), held, place, total)

    def _through(self, by_class: torch.Tensor, held: torch.Tensor, place: Place, how: Reduce) -> torch.Tensor:
        """The same by the scores (n, block, classes) that the positions beside it have."""
        pairs = self._pairs(by_class, place, how)
        forwards, backwards = self._forwards(pairs, place, how), self._backwards(pairs, place, how)
        through = take(forwards[:, :-1], self.edges.source) + take(backwards[:, 1:], self.edges.target)
        through = through.masked_fill(self._behind(held, place)[..., None] & ~self.edges.ends, float("-inf"))
        return self.edges.by_class.reduce(through, how)

    def _share(
        self, scores: torch.Tensor, by_class: torch.Tensor, around: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """(n, block) share of the paths that have the tokens `ids`, each while the others are as committed."""
        ways = scores.gather(-1, ids[..., None]) + around.gather(-1, self.classes.of[ids][..., None])
        return (ways[..., 0] - (by_class + around).logsumexp(-1)).exp().nan_to_num(0.0).clamp(max=1.0)

    def _rivals(
        self, scores: torch.Tensor, by_class: torch.Tensor, around: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, block) the token of the largest share at each position, and its share."""
        rival = (scores + take(around, self.classes.of)).argmax(-1)
        return rival, self._share(scores, by_class, around, rival)

    def _path(
        self,
        scores: torch.Tensor,
        lists: torch.Tensor,
        held: torch.Tensor,
        is_open: torch.Tensor,
        place: Place,
        chooser: Chooser,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, block) tokens of the best completable path, or of one that is drawn, and the state behind it (n,)."""
        samples = chooser.sampling.temperature > 0
        how = total if samples else largest
        if samples:
            scores = scaled(scores - scores.amax(-1, keepdim=True), chooser.sampling)
            lists = self.classes.tokens.lists(scores.clamp(min=FLOOR))
        levels = self.classes.tokens.climb(lists, how)
        by_class = self._committed(how(levels[-1]), held, is_open)
        pairs = self._pairs(by_class, place, how)
        backwards = self._backwards(pairs, place, how)
        draw: Reduce = partial(_noisy, generator=generator) if samples else _as_they_are
        steps, targets = padded(pairs), torch.nn.functional.pad(self.pairs.target, [0, 1])
        states = [place.state]
        for position in range(held.shape[1]):
            ways = self.pairs.out_of.members[states[-1]]
            behind = backwards[:, position + 1].gather(1, targets[ways])
            best = draw(steps[:, position].gather(1, ways) + behind).argmax(-1, keepdim=True)
            states.append(targets[ways.gather(1, best)[:, 0]])
        path = torch.stack(states, 1)
        leads = self.table[path[:, :-1]] == path[:, 1:, None]
        chosen = draw(by_class.masked_fill(~leads, float("-inf"))).argmax(-1)
        ids = self.classes.tokens.descend(levels, chosen, draw)
        ids = torch.where(self._behind(held, place), self.eos, ids)
        return torch.where(is_open, ids, held), path[:, -1]


def _noisy(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Values whose largest along the last dimension is a draw with their exponentials as weights."""
    return values - torch.empty_like(values).exponential_(generator=generator).clamp_(min=1e-30).log()


def _as_they_are(values: torch.Tensor) -> torch.Tensor:
    return values


def joined(automata: list[Automaton]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Automata side by side: the table (states, classes), the class of each token, and the start of each."""
    if len(automata) == 1:
        return automata[0].table, automata[0].class_of, [0]
    classes, class_of = np.unique(np.stack([each.class_of for each in automata]), axis=1, return_inverse=True)
    tables, starts, count = [], [], 0
    for each, own in zip(automata, classes, strict=True):
        tables.append(np.where(each.table < 0, -1, each.table + count)[:, own])
        starts.append(count)
        count += each.num_states
    return np.concatenate(tables), class_of.reshape(-1), starts


def build_forms(forms: list[Any], spelling: Any, device: torch.device) -> BlockForm:
    """The forms of a batch's rows on a device; kept with the last of their automata, for the next call."""
    automata = [spelling.automaton(form) for form in forms]
    last = automata[-1].__dict__.setdefault("_joined", {})
    key = (*map(id, automata), device)
    if key not in last:
        last.clear()
        last[key] = (automata, BlockForm(automata, device))
    return last[key][1]
