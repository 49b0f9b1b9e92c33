"""How long a batch takes: learnt online from those that ran.

    seconds = fixed + per_token * tokens + per_row * rows of the most loaded expert

since a batch of experts takes as long as its most loaded one. Recursive least squares with exponential forgetting
(Haykin, Adaptive Filter Theory, ch. 10), in information form with a little ridge: tokens and rows go together so
closely that the covariance form would wind up. Where the model does not fit, `AimdLimit` bounds batches instead
(Crankshaw et al., Clipper, NSDI 17).
"""

from __future__ import annotations

import math
from typing import Any

_FORGETTING = 0.98  # the last fifty batches count
_FORGETTING_FAST = 0.9  # the last ten: what fits badly has changed
_GOOD_ERROR = 0.25
_RIDGE = 1e-6
_TINY = 1e-18
_MIN_SAMPLES = 8
_WINDOW = 64  # batches after which what sizes were seen begins to be forgotten
_TRUSTED_ERROR = 0.5
_SMOOTHING = 0.1


class LatencyModel:
    """Predicts seconds of a batch from its tokens.

    Args:
        scale_tokens: the order of magnitude of a large batch; keeps the arithmetic well conditioned.

    Attributes:
        samples: batches learnt from.
        error: mean relative residual of the latest predictions; 1 before any.
        trusted: whether predictions are good enough to decide by.
        mean_s: smoothed seconds of the latest batches; 0 before any.
        fixed_s: seconds that a batch takes however small it is.
        per_token_s: seconds that each further token adds, with experts loaded as evenly as they lately were.
    """

    def __init__(self, scale_tokens: int = 1024) -> None:
        self.samples = 0
        self.error = 1.0
        self.trusted = False
        self.mean_s = self.fixed_s = self.per_token_s = 0.0
        self._scale = float(max(1, scale_tokens))
        self._theta = (0.0, 0.0, 0.0)
        # Sums of 1, tokens, rows, tokens^2, tokens * rows, rows^2; and of the first three times seconds.
        self._sums = (0.0,) * 6
        self._moments = (0.0,) * 3
        self._largest_share = 1.0  # rows of the most loaded expert, per token of the batch
        self._sizes = self._sizes_before = (
            math.inf,
            0,
        )  # the smallest and largest batch of this window and the last
        self._variance = 0.0

    def observe(self, tokens: int, largest_rows: int | None, seconds: float) -> None:
        """Learn from one batch; `largest_rows` are those of its most loaded expert, None where not known."""
        weight = _SMOOTHING if self.samples else 1.0
        rows_share = self._largest_share if largest_rows is None else largest_rows / max(1, tokens)
        self._largest_share += (rows_share - self._largest_share) * weight
        self.mean_s += (seconds - self.mean_s) * weight
        size, rows = tokens / self._scale, tokens * rows_share / self._scale
        expected = self._theta[0] + self._theta[1] * size + self._theta[2] * rows
        residual = seconds - expected
        if self.samples:
            relative = min(1.0, abs(residual) / max(seconds, expected, 1e-9))
            self.error += (relative - self.error) * _SMOOTHING
        # One batch that waited for a replica to come back says little about the next. Of a size that was not seen
        # yet, though, the batch knows more than the model.
        if self._is_trusted() and self._smallest <= tokens <= self._largest:
            residual = min(residual, max(3.0 * self.deviation_s, 0.5 * expected))
        if self.samples:
            self._variance += (residual * residual - self._variance) * _SMOOTHING
        self._update(size, rows, expected + residual)
        if self.samples % _WINDOW == 0:
            self._sizes_before, self._sizes = self._sizes, (tokens, tokens)
        self._sizes = (min(self._sizes[0], tokens), max(self._sizes[1], tokens))
        self.samples += 1
        self.trusted = self._is_trusted()
        self.fixed_s = max(0.0, self._theta[0])
        slope = self._theta[1] + self._theta[2] * self._largest_share
        self.per_token_s = max(0.0, slope / self._scale)

    def _is_trusted(self) -> bool:
        return self.samples >= _MIN_SAMPLES and self.error < _TRUSTED_ERROR

    def _update(self, size: float, rows: float, seconds: float) -> None:
        # Written out: this runs once for every batch, and loops over three are slow in Python.
        n, t, r, tt, tr, rr = self._sums
        keep = _FORGETTING if self.error < _GOOD_ERROR else _FORGETTING_FAST
        n, t, r = keep * n + 1.0, keep * t + size, keep * r + rows
        tt, tr, rr = keep * tt + size * size, keep * tr + size * rows, keep * rr + rows * rows
        y, ty, ry = self._moments
        y, ty, ry = keep * y + seconds, keep * ty + size * seconds, keep * ry + rows * seconds
        self._sums, self._moments = (n, t, r, tt, tr, rr), (y, ty, ry)
        # The ridge goes with each feature: small batches would be all ridge where large ones are allowed.
        n, tt, rr = n + max(_RIDGE * n, _TINY), tt + max(_RIDGE * tt, _TINY), rr + max(_RIDGE * rr, _TINY)
        # Elimination; the matrix is symmetric and, by its ridge, positive definite: no pivoting is needed.
        f, g = t / n, r / n
        tt, tr, rr = tt - f * t, tr - f * r, rr - g * r
        ty, ry = ty - f * y, ry - g * y
        h = tr / tt
        per_row = (ry - h * ty) / (rr - h * tr)
        per_size = (ty - tr * per_row) / tt
        self._theta = ((y - t * per_size - r * per_row) / n, per_size, per_row)

    def predict_s(self, tokens: int) -> float:
        """Expected seconds of a batch; 0 while the model is not to be trusted. Of one that is smaller or larger
        than any seen lately, those of the smallest or the largest: beyond what was seen it knows nothing."""
        if not self.trusted:
            return 0.0
        within = min(max(tokens, self._smallest), self._largest)
        return self.fixed_s + self.per_token_s * within

    @property
    def _smallest(self) -> float:
        return min(self._sizes[0], self._sizes_before[0])

    @property
    def _largest(self) -> int:
        return max(self._sizes[1], self._sizes_before[1])

    @property
    def deviation_s(self) -> float:
        """Standard deviation of the latest residuals."""
        return math.sqrt(self._variance)

    def least_s(self, tokens: int) -> float:
        """What a batch takes at the least, to turn work away by: two standard deviations below the expectation,
        and nothing where no batch was so small."""
        if not self.trusted or tokens < self._smallest:
            return 0.0
        return max(0.0, self.predict_s(tokens) - 2.0 * self.deviation_s)

    def tokens_within(self, seconds: float) -> float:
        """The largest batch that is expected to take no longer; infinite while there is no telling."""
        if not self.trusted or self.per_token_s <= 0:
            return math.inf
        return max(0.0, (seconds - self.fixed_s) / self.per_token_s)

    def snapshot(self) -> dict[str, Any]:
        """Plain values for the status page."""
        return {
            "trusted": self.trusted,
            "error_ratio": self.error,
            "fixed_s": self.fixed_s,
            "per_token_s": self.per_token_s,
            "mean_s": self.mean_s,
            "samples": self.samples,
        }


class AimdLimit:
    """A bound of batch sizes that grows by steps while batches are fast enough and is halved when one is not."""

    _STEPS = 16

    def __init__(self) -> None:
        self._share = 1.0

    def tokens(self, low: int, high: int) -> int:
        """The bound, between `low` and `high`."""
        return max(low, int(high * self._share), 1)

    def observe(self, met: bool) -> None:
        """Whether a batch took no longer than its items can spare. Not whether they were in time: under overload
        they are late for having waited, and smaller batches would make it worse."""
        self._share = min(1.0, self._share + 1.0 / self._STEPS) if met else max(self._share / 2, 1e-4)
