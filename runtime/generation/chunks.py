"""Working through the rows of a large tensor a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_CHUNK_ELEMENTS = 1 << 19


def row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices of `rows [rows, width]` that together are all of it.

    On a CPU each is small enough (2 MiB of float32) for its temporaries to stay in the cache and in memory that
    the process has already: for 32 rows of 150,000 tokens the page faults of new memory cost more than the
    arithmetic. On a GPU there is one slice, as there each operation costs its start.
    """
    count, width = rows.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, width)) if rows.is_cpu else max(1, count)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
