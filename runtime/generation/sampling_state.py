"""What sampling remembers of one generation: how often each token came, where its grammar stands, what is banned.

A state lives as long as its generation, also through preemption. Made anew from a request with `emitted` tokens,
it is what it was after them.
"""

from __future__ import annotations

from ..errors import InvalidRequestError, OverloadedError, PimoeError
from ..requests import GenerateRequest
from .grammar import GrammarMatcher
from .penalties import LogitBias, TokenCounts
from .rules import banned_tokens


class SamplingState:
    """One per running generation.

    Args:
        request: has passed `check_request`; its `emitted` tokens count as generated.
        end_tokens: the model's end-of-sequence tokens; those outside of the vocabulary are left out.
        grammar: what the answer must match, at its beginning; from `GrammarCompiler.compile`.

    Raises:
        InvalidRequestError: the `emitted` tokens do not match the grammar.
        OverloadedError: other requests have used up what the grammar may take of memory.
    """

    __slots__ = ("_end_tokens", "_request", "bias", "counts", "generated", "grammar", "params")

    def __init__(
        self,
        request: GenerateRequest,
        vocab_size: int,
        end_tokens: tuple[int, ...],
        grammar: GrammarMatcher | None = None,
    ) -> None:
        self.params = params = request.sampling
        self.generated = len(request.emitted)
        self.grammar = grammar
        self.bias = LogitBias(params.logit_bias) if params.logit_bias else None
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self.counts = TokenCounts(params, request.prompt_token_ids, request.emitted) if penalised else None
        self._request = request
        self._end_tokens = tuple(token for token in end_tokens if 0 <= token < vocab_size)
        if grammar is not None:
            _replay(grammar, request.emitted)

    def advance(self, token: int) -> None:
        """`token` was chosen."""
        self.generated += 1
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    @property
    def banned(self) -> tuple[int, ...]:
        """What must not come next: before `min_tokens` whatever would end the answer; and where a grammar is to be
        followed with `ignore_eos`, end tokens at all times. A grammar that allows nothing else overrules it."""
        banned = banned_tokens(self._request, self.generated, self._end_tokens)
        if not banned and self.grammar is not None and self.params.ignore_eos:
            return self._end_tokens
        return banned

    @property
    def alters_logits(self) -> bool:
        """Whether anything but temperature and truncation applies to the next token."""
        return any((self.bias is not None, self.counts is not None, self.grammar is not None, self.banned))

    @property
    def finished_by_grammar(self) -> bool:
        """Whether the grammar is complete and allows nothing more: the answer ends with "stop", whatever
        `min_tokens` and `ignore_eos` say."""
        return self.grammar is not None and self.grammar.finished

    @property
    def error(self) -> PimoeError | None:
        """Why the generation cannot go on: its grammar turned out to be too complex, alone or after what other
        requests had used up, or was left (by logits that are NaN). The last token chosen is then not to be handed
        out."""
        return None if self.grammar is None else self.grammar.error


def _replay(grammar: GrammarMatcher, emitted: tuple[int, ...]) -> None:
    for place, token in enumerate(emitted):
        grammar.accept(token)
        if isinstance(grammar.error, OverloadedError):
            raise grammar.error
        if grammar.error is not None:
            raise InvalidRequestError(
                f"token {token}, number {place} of emitted, does not match the grammar", "emitted"
            )
