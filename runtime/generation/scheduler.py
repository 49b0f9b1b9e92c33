"""Which sequences advance in the next step. Pure: no clock, no I/O, no tensors.

Every step decodes one token of every running sequence whose prompt is cached, and prefills prompts beside them
under a token budget, so that a long prompt comes in chunks and stalls nobody for its whole length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from ..requests import GenerateRequest


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of generation.

    Attributes:
        max_sequences: running at once; each holds KV cache for all its tokens.
        max_step_tokens: prompt tokens prefilled in one step, beside the decoding sequences.
        max_context_tokens: prompt and answer of one sequence; None: the model's own limit.
        max_kv_tokens: tokens that all running sequences may come to together, and so one of them alone; None: no
            limit but the two above.
        drain_s: how long a stopping engine lets running sequences go on.
    """

    max_sequences: int = 32
    max_step_tokens: int = 2048
    max_context_tokens: int | None = None
    max_kv_tokens: int | None = None
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_context_tokens", "max_kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"engine.{name} is {value}; it must be at least 1", name)
        if not self.drain_s >= 0:
            raise ConfigurationError(f"engine.drain_s is {self.drain_s}; it must be at least 0", "drain_s")


@dataclass(slots=True, eq=False)
class Generation:
    """One running generation.

    Attributes:
        tokens: prompt, then what was generated.
        computed: how many of them are in the KV cache.
        admitted: when it began to run, on the engine's clock.
    """

    request: GenerateRequest
    slot: int
    deadline: float
    tokens: list[int]
    computed: int = 0
    admitted: float = 0.0
    finished: bool = field(default=False)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not cached yet: 1 while decoding, more while the prompt is prefilled."""
        return len(self.tokens) - self.computed

    @property
    def reserved_tokens(self) -> int:
        """Tokens it may come to."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class StepItem:
    """`count` tokens of a sequence to be computed in this step.

    Attributes:
        samples: whether the step reaches the sequence's last token, and so chooses the next one.
    """

    generation: Generation
    count: int
    samples: bool


def plan_step(running: Sequence[Generation], max_step_tokens: int) -> list[StepItem]:
    """The next step: all that decode, and prompts in order of admission as far as the budget goes."""
    items = []
    budget = max_step_tokens
    for sequence in running:
        pending = sequence.pending
        if pending == 1:
            items.append(StepItem(sequence, 1, samples=True))
        elif budget > 0:
            count = min(pending, budget)
            budget -= count
            items.append(StepItem(sequence, count, samples=count == pending))
    return items


def can_admit(running: Sequence[Generation], reserved_tokens: int, limits: EngineLimits) -> bool:
    """Whether one more sequence that may come to `reserved_tokens` fits beside the running ones."""
    if len(running) >= limits.max_sequences:
        return False
    if limits.max_kv_tokens is None:
        return True
    return sum(s.reserved_tokens for s in running) + reserved_tokens <= limits.max_kv_tokens
