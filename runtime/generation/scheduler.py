"""Which sequences run, and which of them advance in the next step. Pure: no clock, no I/O, no tensors.

Every step decodes one token of every running sequence whose prompt is cached, and prefills prompts beside them
under a token budget, so that a long prompt comes in chunks and stalls nobody for its whole length. Where blocks of
the KV cache run out, the least important sequence gives its own up and waits; when it returns, what is still known
of it is taken from the cache and the rest computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..requests import GenerateRequest, TokenLogprob
from .block_pool import BlockPool, extend_hashes, salt_of
from .limits import EngineLimits

# Rows whose logits one step computes for the sake of prompt logprobs: each is as wide as the vocabulary.
_PROMPT_LOGPROB_ROWS = 64


@dataclass(slots=True, eq=False)
class Generation:
    """One generation, running or preempted.

    Attributes:
        rank, key, number: as of the queue item that it was; see `QueueItem`.
        deadline, admitted: on the engine's clock.
        tokens: prompt, then what was generated.
        computed: how many of them are in the KV cache.
        blocks: its block table; the first `published` of them are full, and known to others by their `hashes`.
        cached_tokens: how many of the prompt's tokens were there already when it first ran.
        prompt_logprobs: of the prompt's tokens as far as they are computed, where they are wanted.
    """

    request: GenerateRequest
    rank: int
    key: float
    number: int
    deadline: float
    tokens: list[int]
    admitted: float = 0.0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finished: bool = False
    gave_way: bool = False
    hashes: list[bytes] = field(default_factory=list)
    published: int = 0
    salt: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.salt = salt_of(self.request.tenant, self.request.cache_salt)

    @property
    def order(self) -> tuple[int, float, int]:
        """The smallest is the most important."""
        return -self.rank, self.key, self.number

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not cached yet: 1 while decoding, more while the prompt is prefilled."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of the prompt's tokens are still to be computed, or the first one's None to be
        noted."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class StepItem:
    """`count` tokens of a sequence to be computed in this step.

    Attributes:
        samples: whether the step reaches the sequence's last token, and so chooses the next one.
        outputs: how many of the last of these tokens want logits.
    """

    generation: Generation
    count: int
    samples: bool
    outputs: int


class Scheduler:
    """Sequences and their blocks.

    Attributes:
        running: in order of admission.
        preempted: gave their blocks up and wait to go on.
        preemptions: since start.
    """

    def __init__(self, pool: BlockPool, limits: EngineLimits) -> None:
        self.pool, self.limits = pool, limits
        self.running: list[Generation] = []
        self.preempted: list[Generation] = []
        self.preemptions = 0
        self._fresh: list[int] = []

    def first_preempted(self) -> Generation | None:
        """Which of the preempted goes on first."""
        return min(self.preempted, key=lambda generation: generation.order, default=None)

    def has_seat(self, rank: int) -> bool:
        """Whether one more of that class may run, if need be instead of one of a lower class."""
        return len(self.running) < self.limits.max_sequences or any(self._who_may_give_way(rank))

    def admit(self, generation: Generation) -> bool:
        """Let a new or preempted sequence run, if there are a seat and blocks for all of its tokens so far. Who is
        of a lower class makes room for it."""
        block_tokens = self.pool.block_tokens
        found = self._known(generation)
        needed = -(-len(generation.tokens) // block_tokens) - len(found)
        if not self._make_room(generation.rank, needed, found):
            return False
        self.pool.hold(found)
        generation.blocks = [*found, *self._take(needed)]
        generation.computed = len(found) * block_tokens
        generation.published = len(found)
        if generation.cached_tokens is None:
            generation.cached_tokens = min(generation.computed, len(generation.request.prompt_token_ids))
            self.pool.count_lookup(len(generation.request.prompt_token_ids), generation.cached_tokens)
        if generation in self.preempted:
            self.preempted.remove(generation)
        self.running.append(generation)
        return True

    def to_compute(self, generation: Generation) -> int:
        """Tokens that would have to be computed if a sequence were admitted now."""
        return len(generation.tokens) - len(self._known(generation)) * self.pool.block_tokens

    def _known(self, generation: Generation) -> list[int]:
        """Blocks of a sequence's beginning that it can take. The last token is always computed, for its logits."""
        if not self.pool.reuse_prefixes:
            return []
        extend_hashes(generation.hashes, generation.salt, generation.tokens, self.pool.block_tokens)
        if generation.wants_prompt_logprobs:
            return []
        return self.pool.find(generation.hashes[: (len(generation.tokens) - 1) // self.pool.block_tokens])

    def plan(self) -> list[StepItem]:
        """The next step: all that decode, the most important first, and prompts as far as the budget goes.
        Preempts where blocks run out."""
        for generation in self.running:
            self._adopt(generation)
        decoding = sorted((g for g in self.running if g.pending == 1), key=lambda g: g.order)
        for generation in decoding:
            while generation.blocks and len(generation.blocks) * self.pool.block_tokens <= generation.computed:
                if self.pool.available:
                    generation.blocks += self._take(1)
                else:
                    self._preempt(max(self.running, key=lambda g: g.order))
        items = [_item(generation, 1) for generation in decoding if generation.blocks]
        # In the order of the queue, whatever their classes: while work of a higher one keeps coming, a prompt that
        # holds its seat and its blocks would else wait for ever.
        prefilling = sorted((g for g in self.running if g.pending > 1), key=lambda g: (g.key, g.number))
        counts = share_prefill(self._wanted(prefilling), self._prefill_budget(len(items)))
        return items + [_item(g, count) for g, count in zip(prefilling, counts, strict=True) if count]

    def _wanted(self, prefilling: Sequence[Generation]) -> list[int]:
        """Tokens that each prompt could use in this step. One that goes on with a block that another before it is
        about to compute waits for that block."""
        rows, wanted = _PROMPT_LOGPROB_ROWS, []
        claimed: set[bytes] = set()
        for generation in prefilling:
            if generation.wants_prompt_logprobs:
                count = min(generation.pending, rows)
                rows -= count
            else:
                count = 0 if claimed.intersection(self._coming(generation)[:1]) else generation.pending
            if count:
                claimed.update(generation.hashes[generation.published :])
            wanted.append(count)
        return wanted

    def _adopt(self, generation: Generation) -> None:
        """Takes blocks that became known since the sequence was admitted in place of its own empty ones."""
        if generation.pending == 1 or generation.wants_prompt_logprobs:
            return
        known = self.pool.find(self._coming(generation))
        if not known:
            return
        first, stop = generation.published, generation.published + len(known)
        self.pool.hold(known)
        self.pool.release(generation.blocks[first:stop])
        generation.blocks[first:stop] = known
        generation.published = stop
        generation.computed = stop * self.pool.block_tokens
        if not generation.generated:
            tokens = len(known) * self.pool.block_tokens
            generation.cached_tokens = (generation.cached_tokens or 0) + tokens
            self.pool.count_lookup(0, tokens)

    def _coming(self, generation: Generation) -> list[bytes]:
        """Hashes of the blocks that a sequence computes next and may take instead, if it stands at the beginning
        of one. The last token is always computed, for its logits."""
        block_tokens = self.pool.block_tokens
        if generation.computed != generation.published * block_tokens:
            return []
        return generation.hashes[generation.published : (len(generation.tokens) - 1) // block_tokens]

    def take_fresh(self) -> list[int]:
        """Blocks that got a new owner since the last call, and are to be cleared."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def advance(self, items: Sequence[StepItem]) -> None:
        """A step is computed: blocks that it filled are known from now on."""
        block_tokens = self.pool.block_tokens
        for item in items:
            generation = item.generation
            generation.computed += item.count
            full = generation.computed // block_tokens
            if full == generation.published or not self.pool.reuse_prefixes:
                continue
            tokens = generation.tokens[: generation.computed]
            extend_hashes(generation.hashes, generation.salt, tokens, block_tokens)
            for place in range(generation.published, full):
                self.pool.publish(generation.blocks[place], generation.hashes[place])
            generation.published = full

    def distrust(self, generation: Generation) -> None:
        """What is cached of a sequence is wrong, as its logits tell that are not finite: nobody else is to begin
        with it."""
        self.pool.distrust(generation.blocks)

    def remove(self, generation: Generation) -> None:
        """A sequence ended, wherever it was."""
        if generation in self.preempted:
            self.preempted.remove(generation)
        else:
            self.running.remove(generation)
            self._give_up_blocks(generation)

    def _prefill_budget(self, decoding: int) -> int:
        # However many decode, prompts go on: they would wait for ever under a load of long answers.
        least = max(1, self.limits.max_step_tokens // 4)
        return max(least, self.limits.max_step_tokens - decoding)

    def _make_room(self, rank: int, needed: int, found: Sequence[int]) -> bool:
        leaving = self._who_must_go(rank, needed, found)
        for victim in leaving or ():
            victim.gave_way = True
            self._preempt(victim)
        return leaving is not None

    def _who_must_go(self, rank: int, needed: int, found: Sequence[int]) -> list[Generation] | None:
        """Who gives way to a newcomer that takes `needed` blocks besides those `found`; None where all who may
        would not be enough: nobody is given up in vain."""
        # Each that runs may need a block before any gives one back; alone, a sequence has all there are.
        staying = len(self.running)
        spare = self.pool.available - self.pool.kept_among(found) - needed
        gone: Counter[int] = Counter()
        leaving: list[Generation] = []
        candidates = self._who_may_give_way(rank)
        while staying >= self.limits.max_sequences or spare < staying:
            victim = next(candidates, None)
            if victim is None:
                return None
            leaving.append(victim)
            staying -= 1
            spare += sum(block not in found for block in self.pool.would_free(victim.blocks, gone))
        return leaving

    def _who_may_give_way(self, rank: int) -> Iterator[Generation]:
        """Sequences of lower classes, the least important first. Each gives way once at most: it would else be
        computed again and again, and never end, while important work keeps coming."""
        lower = [g for g in self.running if g.rank < rank and not g.gave_way]
        return iter(sorted(lower, key=lambda g: g.order, reverse=True))

    def _preempt(self, generation: Generation) -> None:
        self.running.remove(generation)
        self._give_up_blocks(generation)
        self.preempted.append(generation)
        self.preemptions += 1

    def _give_up_blocks(self, generation: Generation) -> None:
        self.pool.release(generation.blocks)
        generation.blocks = []
        generation.computed = generation.published = 0

    def _take(self, count: int) -> list[int]:
        taken = self.pool.take(count)
        self._fresh += taken
        return taken


def share_prefill(pending: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt the step takes, of prompts in the order of the queue. Half of the budget goes
    to the shortest, so that a short prompt does not wait for a long one; the rest, one token at least, goes to the
    first, so that a long one does not wait for ever."""
    counts = [0] * len(pending)
    left = budget
    for reserved, order in (
        (budget - budget // 2, sorted(range(len(pending)), key=lambda index: pending[index])),
        (0, range(len(pending))),
    ):
        for index in order:
            count = min(pending[index] - counts[index], left - reserved)
            if count > 0:
                counts[index] += count
                left -= count
    return counts


def _item(generation: Generation, count: int) -> StepItem:
    samples = count == generation.pending
    outputs = count if generation.wants_prompt_logprobs else int(samples)
    return StepItem(generation, count, samples, outputs)
