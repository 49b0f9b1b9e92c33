"""Where an answer stands in the grammar that it must match, and what may come next.

The work is llguidance's (https://github.com/guidance-ai/llguidance); `grammar_compiler.py` makes its matchers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidRequestError, OverloadedError, PimoeError
from .grammar_source import brief

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Computing time that a generation may spend in its grammar: so much at once, and so much more for each token. A
# usual grammar takes 0.3 ms a token with a vocabulary of 150,000.
_BUDGET_S, _BUDGET_PER_TOKEN_S = 2.0, 0.01
_RETRY_AFTER_S = 1.0
_USED_UP = "lexer error: too many states"  # `stop_reason()` does not tell it from a token that is not allowed


class GrammarMatcher:
    """One generation's place in its grammar. It never raises: what goes wrong becomes its `error`.

    Args:
        matcher: at the beginning; what it learns of the grammar it may share with other requests' matchers.
        vocab_size: of the model.
        mask_tokens: how many tokens llguidance knows, at least as many.
        used_up: called when the matcher has run out of lexer states; whether other requests have drawn on them.

    Attributes:
        error: why the generation cannot go on.
    """

    __slots__ = ("_mask", "_matcher", "_spent_s", "_tokens", "_used_up", "_vocab_size", "error")

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        mask_tokens: int,
        used_up: Callable[[], bool],
    ) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask = np.zeros((mask_tokens + 31) // 32, dtype=np.int32)
        self._used_up = used_up
        self._tokens = 0
        self._spent_s = 0.0
        self.error: PimoeError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        return self.error is None and self._matcher.is_stopped()

    def allowed(self, without: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Which tokens may come next, `[vocab]`. All of them once there is an `error`.

        Args:
            without: tokens that may not, unless there are no others.
        """
        if self.error is None:
            self._timed(self._fill_mask)
        if self.error is None:
            bits = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little")
            allowed = bits.view(np.bool_)
            rest = allowed.copy()
            rest[list(without)] = False
            if rest.any():
                return rest
            if allowed.any():
                return allowed
            self._fail("no token of the model goes on with the answer")
        return np.ones(self._vocab_size, dtype=np.bool_)

    def accept(self, token: int) -> None:
        """`token` came next. One that is not allowed leads to an `error`."""
        if self.error is None:
            self._tokens += 1
            self._timed(lambda: self._matcher.consume_token(token))

    def _fill_mask(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def _timed(self, work: Callable[[], object]) -> None:
        # This thread's computing time, not the clock: a busy machine is not the grammar's fault.
        started = time.thread_time()
        work()
        if self._matcher.is_error():
            self._fail_by_matcher()
        self._spent_s += time.thread_time() - started
        if self._spent_s > _BUDGET_S + _BUDGET_PER_TOKEN_S * self._tokens:
            self._fail("following it takes too long")

    def _fail_by_matcher(self) -> None:
        """The states of a lexer are bounded, and all matchers made of one compiled grammar draw on the same: this
        one may have failed by what others had used up. Compiling it again here would hold up the step."""
        why = self._matcher.get_error()
        if why.startswith(_USED_UP) and self._used_up():
            message = "other requests have used up what this grammar may take of memory; try again"
            self.error = OverloadedError(message, "grammar", _RETRY_AFTER_S)
        else:
            self._fail(f"it is too complex, or was left: {brief(why)}")

    def _fail(self, why: str) -> None:
        if self.error is None:
            self.error = InvalidRequestError(f"the answer cannot follow the grammar: {why}", "grammar")


def ban_all_but(logits: Tensor, allowed: NDArray[np.bool_]) -> None:
    """Make what is not `allowed [vocab]` impossible in one row `[vocab]` of logits, in place."""
    logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -math.inf)
