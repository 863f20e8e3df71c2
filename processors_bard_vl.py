"""transformers' logits processors on the device, for every position of every row's block, without waiting for it.

transformers chooses one token after another, and its processors look at those on the left. A block is open in many
places, and several tokens commit together. So the choice walks through the block from left to right: a position sees
its row, the tokens just chosen on its left, and those committed on its right. A block chosen so holds no banned phrase
and no repeated n-gram, and no part of it does: none comes out, however many tokens commit together.

A biased phrase is another matter: where its bias depends on a position that is still open, the token must wait.
`Choice.reads` says for which positions it waits, and `in_order` makes it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .generation_config_bard_vl import BardVLGenerationConfig, DecodingSettings
from .remasking_bard_vl import Choice, Chooser, probability_of

OPEN, OUTSIDE, NO_ID = -1, -2, -3  # in place of ids: undecided, beyond the table, equal to nothing in it

Then = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Patterns:
    """The tokens around a position with which a token there would complete a phrase.

    Attributes:
        want: (patterns, 2 * radius + 1) ids around the position, which is in the middle.
        free: the same shape, bool: any id will do.
        token: (patterns,) the token that completes the phrase.
    """

    want: torch.Tensor
    free: torch.Tensor
    token: torch.Tensor

    @classmethod
    def lay_out(cls, phrases: list[tuple[tuple[int, ...], int]], radius: int, device: torch.device) -> "Patterns":
        """Patterns of pairs (phrase, index of the token that completes it)."""
        rows = []
        for phrase, place in phrases:
            left, right = [NO_ID] * (radius - place), [NO_ID] * (radius + 1 + place - len(phrase))
            rows.append([*left, *phrase[:place], NO_ID, *phrase[place + 1 :], *right])
        want = torch.tensor(rows, dtype=torch.long).view(-1, 2 * radius + 1).to(device)
        token = torch.tensor([phrase[place] for phrase, place in phrases], dtype=torch.long, device=device)
        return cls(want, want == NO_ID, token)

    def __len__(self) -> int:
        """Number of patterns."""
        return len(self.token)

    def match(self, near: torch.Tensor, open_fits: bool = False) -> torch.Tensor:
        """(..., patterns) bool for ids `near` (..., 2 * radius + 1); with `open_fits` an open position fits any id."""
        fits = (near[..., None, :] == self.want) | self.free
        if open_fits:
            fits = fits | (near == OPEN)[..., None, :]
        return fits.all(-1)


@dataclass(frozen=True)
class BiasedPhrases:
    """Phrases of several tokens that have a bias, each completed by its last token.

    Attributes:
        patterns: of the phrases.
        bias, length: (phrases,) of each.
        reach: how many tokens to its left the longest of them looks.
    """

    patterns: Patterns
    bias: torch.Tensor
    length: torch.Tensor
    reach: int

    @classmethod
    def lay_out(cls, biases: dict[tuple[int, ...], float], radius: int, device: torch.device) -> "BiasedPhrases":
        """Of biases by phrase."""
        lengths = [len(ids) for ids in biases]
        return cls(
            Patterns.lay_out([(ids, len(ids) - 1) for ids in biases], radius, device),
            torch.tensor(list(biases.values()), device=device, dtype=torch.float32),
            torch.tensor(lengths, device=device, dtype=torch.long),
            max(lengths, default=1) - 1,
        )

    def __len__(self) -> int:
        """Number of phrases."""
        return len(self.patterns)


@dataclass(frozen=True)
class TokenProcessors:
    """The settings that name a processor of transformers, as tensors; `build_processors` makes them.

    Attributes:
        mask_token_id: never chosen.
        penalty: for tokens of the prompt and committed tokens left of a position; 1 for none.
        bias: (vocabulary,) for single tokens, or None.
        banned: (vocabulary,) bool, single tokens that are never chosen, or None.
        phrases: banned phrases of several tokens, of which any may be the one that completes it.
        sequences: phrases that have a bias.
        ngram_size: tokens of the n-grams that appear only once; 0 for no limit.
        radius: how many tokens away the farthest of them looks.
        num_free: tokens of the vocabulary that neither a ban nor a banned phrase names.
        overwrite_threshold: probability above which a committed token is replaced, None where it stays.
        made_of: the settings in it; equal ones do the same.
    """

    mask_token_id: int
    penalty: float
    bias: torch.Tensor | None
    banned: torch.Tensor | None
    phrases: Patterns
    sequences: BiasedPhrases
    ngram_size: int
    radius: int
    num_free: int
    overwrite_threshold: float | None
    made_of: tuple

    @property
    def looks_beside(self) -> bool:
        """Whether a choice depends on the tokens chosen beside it."""
        return bool(self.ngram_size or len(self.phrases) or len(self.sequences))

    def process(self, logits: torch.Tensor, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Scores of logits (rows, block, vocabulary) at columns (rows, block), if no choice looks beside itself."""
        logits = logits.float()
        return self._process(logits, self._seen(ids, columns, logits.shape[-1]), self.bias, None)

    def choose(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        start: torch.Tensor,
        chooser: Chooser,
        generator: torch.Generator | None = None,
        then: Then | None = None,
    ) -> Choice:
        """Choose a token for every position of every row's block by processed logits.

        Args:
            logits: (rows, block, vocabulary).
            ids: (rows, columns) table of tokens, the mask id where undecided.
            start: (rows,) first column of each row's block.
            chooser: makes the choice.
            generator: source of randomness.
            then: the caller's own processors: (scores (rows, n, vocabulary) of n positions of the blocks, index of the
                first) to the scores that count.

        Returns:
            the choice; where it has `reads`, `in_order` must have a say in what commits.
        """
        columns = start[:, None] + torch.arange(logits.shape[1], device=ids.device)
        if not self.looks_beside:
            scores = self.process(logits, ids, columns)
            return chooser.choose(scores if then is None else then(scores, 0), ids.gather(1, columns), generator)
        logits, seen = logits.float(), self._seen(ids, columns, logits.shape[-1])
        return self._choose_left_to_right(logits, seen, ids, columns, chooser, generator, then)

    def _choose_left_to_right(
        self,
        logits: torch.Tensor,
        seen: torch.Tensor | None,
        ids: torch.Tensor,
        columns: torch.Tensor,
        chooser: Chooser,
        generator: torch.Generator | None,
        then: Then | None,
    ) -> Choice:
        held, pad = ids.gather(1, columns), 2 * self.radius
        undecided = held == self.mask_token_id
        table = torch.nn.functional.pad(ids.masked_fill(ids == self.mask_token_id, OPEN), [pad, pad], value=OUTSIDE)
        windows = columns[..., None] + torch.arange(self.radius, 3 * self.radius + 1, device=ids.device)
        surroundings = table.gather(1, windows.flatten(1)).view(windows.shape)
        strict = self._strict_rows(columns, ids.shape[1], chooser, then)
        # Remasked positions are masked while others commit: every position counts then, not only the decided ones.
        kept = self._kept(~undecided, ~undecided | chooser.keeps_present, strict)
        scores, tokens, sure = torch.empty_like(logits), [], []
        for place in range(logits.shape[1]):
            here = slice(place, place + 1)
            column = columns[:, here] + pad
            table.scatter_(1, column, OPEN)  # while a token is chosen none is there: a decided one may be replaced
            bias, bans = self._beside(table, windows[:, place], logits.shape[-1])
            processed = self._process(logits[:, place], None if seen is None else seen[:, place], bias, bans)[:, None]
            scores[:, here] = processed if then is None else then(processed, place)
            # If everything is banned, the first id comes out, as from transformers, but never the mask.
            token = chooser.pick(scores[:, here], generator)
            tokens.append(token.masked_fill(token == self.mask_token_id, int(self.mask_token_id == 0)))
            taken = undecided[:, here]
            if self.overwrite_threshold is not None:
                sure.append(probability_of(scores[:, here], tokens[-1]))
                taken = taken | ((sure[-1] > self.overwrite_threshold) & ~kept[:, here])
            table.scatter_(1, column, torch.where(taken, tokens[-1], held[:, here]))
        chosen = torch.cat(tokens, 1)
        choice = chooser.weigh(scores, chosen, held)
        return choice._replace(
            ids=torch.where(kept, held, chosen),
            confidence=(torch.cat(sure, 1) if sure else choice.confidence).nan_to_num(0.0),
            present=None if choice.present is None else choice.present.masked_fill(kept, 1.0),
            reads=self._reads(logits, seen, surroundings, chosen, strict),
        )

    def _process(
        self, scores: torch.Tensor, seen: torch.Tensor | None, bias: torch.Tensor | None, bans: torch.Tensor | None
    ) -> torch.Tensor:
        """Bias, penalty and bans, in transformers' order."""
        scores = scores if bias is None else scores + bias
        if seen is not None:
            scores = torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)
        for banned in (bans, self.banned):
            scores = scores if banned is None else scores.masked_fill(banned, float("-inf"))
        return scores

    def _seen(self, ids: torch.Tensor, columns: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
        """(rows, block, vocabulary) bool, the tokens that the penalty is for; None without a penalty."""
        if self.penalty == 1:
            return None
        size, device = columns.shape[1], ids.device
        known = ids.masked_fill(ids == self.mask_token_id, vocab_size)  # an entry to spare takes what does not count
        in_front = known.masked_fill(torch.arange(ids.shape[1], device=device) >= columns[:, :1], vocab_size)
        is_left = torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)
        left = torch.where(is_left, known.gather(1, columns)[:, None], vocab_size)
        none = torch.zeros(len(ids), size, vocab_size + 1, dtype=torch.bool, device=device)
        seen = none[:, 0].scatter(1, in_front, True)[:, None] | none.scatter(2, left, True)
        return seen[..., :vocab_size]

    def _beside(
        self, table: torch.Tensor, window: torch.Tensor, vocab_size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Bias and bans (rows, vocabulary) at one position of each row, where the table is open.

        Args:
            table: (rows, padded columns) ids.
            window: (rows, 2 * radius + 1) padded columns around the position.
        """
        near, bias, banned = table.gather(1, window), self.bias, []
        if len(self.sequences):
            biases = torch.where(self.sequences.patterns.match(near), self.sequences.bias, 0.0)
            single = torch.zeros(vocab_size, dtype=torch.float32, device=table.device) if bias is None else bias
            bias = single.repeat(len(table), 1).index_add_(1, self.sequences.patterns.token, biases)
        if len(self.phrases):
            banned.append(torch.where(self.phrases.match(near), self.phrases.token, vocab_size))
        if self.ngram_size:
            repeated, token = self._repeating(table, near, window)
            banned.append(torch.where(repeated, token, vocab_size))
        if not banned:
            return bias, None
        bans = torch.zeros(len(table), vocab_size + 1, dtype=torch.bool, device=table.device)
        return bias, bans.scatter_(1, torch.cat(banned, 1), True)[:, :vocab_size]

    def _repeating(
        self, table: torch.Tensor, near: torch.Tensor, window: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns whose token would repeat an n-gram at the position, and these tokens; (rows, columns) both.

        An n-gram around a column appears again around the position if, from both middles, enough neighbours are equal.
        """
        n, skipped = self.ngram_size, self.radius - self.ngram_size + 1
        width = 2 * n - 1
        around = table[:, skipped : table.shape[1] - skipped].unfold(1, width, 1)
        own = near[:, skipped : skipped + width]
        own = own.masked_fill(own < 0, NO_ID)
        equal = (around == own[:, None]).flatten(1)
        # Columns so close that the position is among their neighbours: what is tried there is the column's own token.
        place = torch.arange(width, device=table.device)
        itself = (window[:, :1] + n - 1 - place) * width + place
        equal = equal.scatter(1, itself, own == own.flip(1)).view(around.shape)
        equal[..., n - 1] = True
        token = around[..., n - 1]
        return equal.unfold(2, n, 1).all(-1).any(-1) & (token >= 0), token

    def _strict_rows(
        self, columns: torch.Tensor, num_columns: int, chooser: Chooser, then: Then | None
    ) -> torch.Tensor | None:
        """(rows, 1) bool, where tokens commit from left to right; None for nowhere.

        Where tokens committed on the right and their bans might leave none to choose on the left; and where a biased
        phrase meets chance, for a token kept because it suits every phrase is no sample of any.
        """
        if then is not None or (len(self.sequences) and chooser.sampling.temperature):
            return torch.ones_like(columns[:, :1], dtype=torch.bool)
        # A token banned at a position is in a banned phrase, or in the row.
        if not (len(self.phrases) or self.ngram_size) or self.num_free > num_columns * bool(self.ngram_size):
            return None
        return self.num_free <= (columns[:, -1:] + 1) * bool(self.ngram_size)

    def _kept(self, decided: torch.Tensor, readers: torch.Tensor, strict: torch.Tensor | None) -> torch.Tensor:
        """(rows, block) bool, tokens not to be revised, as one of the `readers` on their right is chosen by them."""
        distance = -_distance(decided.shape[1], decided.device)
        reads = (distance > 0) & (distance <= self.sequences.reach)
        if strict is not None:
            reads = reads | ((distance > 0) & strict[..., None])
        return decided & (reads & readers[:, None]).any(-1)

    def _reads(
        self,
        logits: torch.Tensor,
        seen: torch.Tensor | None,
        surroundings: torch.Tensor,
        chosen: torch.Tensor,
        strict: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`Choice.reads`: an open position counts where a phrase through it has a bias that could change the choice."""
        if strict is None and not len(self.sequences):
            return None
        distance = _distance(logits.shape[1], logits.device)
        reads = torch.zeros_like(distance, dtype=torch.bool).expand(len(logits), -1, -1)
        if strict is not None:
            reads = (distance > 0) & strict[..., None]
        if len(self.sequences):
            last, none = self.sequences.patterns.token, logits.new_zeros(logits.shape[-1])
            single = none if self.bias is None else self.bias
            most = none.index_add(0, last, self.sequences.bias.clamp(min=0))
            least = none.index_add(0, last, self.sequences.bias.clamp(max=0))
            high = self._process(logits, seen, single + most, None)
            high[..., self.mask_token_id] = float("-inf")
            low = self._process(logits, seen, single + least, None).gather(-1, chosen[..., None])
            others = high.scatter(-1, chosen[..., None], float("-inf")).amax(-1, keepdim=True)
            rival = torch.where(last == chosen[..., None], others, high.index_select(-1, last))
            counts = (rival >= low) & self.sequences.patterns.match(surroundings, open_fits=True)
            reach = torch.where(counts, self.sequences.length - 1, 0).amax(-1, keepdim=True)
            reads = reads | ((distance > 0) & (distance <= reach))
        return reads


def _distance(size: int, device: torch.device) -> torch.Tensor:
    """(size, size) how far the second of two positions is left of the first."""
    place = torch.arange(size, device=device)
    return place[:, None] - place


def build_processors(
    config: BardVLGenerationConfig,
    settings: DecodingSettings,
    vocab_size: int,
    device: torch.device,
    longest: float = math.inf,
) -> TokenProcessors | None:
    """The processors that the settings ask for, on `device`; None if they ask for none.

    What is longer than `longest`, the tokens of a whole row, cannot come out and costs nothing.
    """
    words = {tuple(word) for word in config.bad_words_ids or [] if len(word) <= longest}
    phrases = sorted(word for word in words if len(word) > 1)
    # As in transformers, a bad word that is an EOS bans nothing.
    single = {word[0] for word in words if len(word) == 1} - set(settings.eos_token_ids)
    banned = single | set(config.suppress_tokens or [])
    biases = {tuple(ids): float(bias) for ids, bias in config.sequence_bias or [] if len(ids) <= longest}
    sequences = {ids: bias for ids, bias in biases.items() if len(ids) > 1}
    single_biases = {ids[0]: bias for ids, bias in biases.items() if len(ids) == 1}
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    ngram_size = config.no_repeat_ngram_size or 0
    ngram_size = ngram_size if ngram_size < longest else 0
    if not (words or banned or biases or ngram_size) and penalty == 1:
        return None
    radius = max([1, ngram_size, *map(len, [*phrases, *sequences])]) - 1
    named = {token for phrase in phrases for token in phrase}
    places = [(phrase, place) for phrase in phrases for place in range(len(phrase))]
    return TokenProcessors(
        mask_token_id=settings.mask_token_id,
        penalty=penalty,
        bias=_by_token(single_biases, vocab_size, 0.0).to(device) if single_biases else None,
        banned=_by_token(dict.fromkeys(banned, True), vocab_size, False).to(device) if banned else None,
        phrases=Patterns.lay_out(places, radius, device),
        sequences=BiasedPhrases.lay_out(sequences, radius, device),
        ngram_size=ngram_size,
        radius=radius,
        num_free=vocab_size - len({*banned, *named, settings.mask_token_id}),
        overwrite_threshold=settings.overwrite_threshold,
        made_of=(
            settings.mask_token_id, penalty, tuple(phrases), tuple(sorted(banned)), tuple(sorted(biases.items())),
            ngram_size, settings.overwrite_threshold,
        ),
    )  # fmt: skip


def _by_token(values: dict[int, Any], vocab_size: int, default: Any) -> torch.Tensor:
    """(vocabulary,) the value of each token."""
    dtype = torch.bool if default is False else torch.float32
    table = torch.full((vocab_size,), default, dtype=dtype)
    table[list(values)] = torch.tensor(list(values.values()), dtype=dtype)
    return table
