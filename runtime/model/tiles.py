"""Batch invariance: every row is computed in a call of one shape, whatever else is in the batch.

How a matrix product adds up depends on its shape: with more rows another kernel runs, with other rounding. Where
every call has the same number of rows, filled up with zeros, what is left is that a row's result must not depend
on its place in the call, nor on the rows beside it. `check_tiles` finds out whether that holds on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigurationError

# A multiple of the numbers in a vector register, so that no row has elements of its own at a register's end.
TILE_ROWS = 32

Rows = TypeVar("Rows", Tensor, tuple[Tensor, ...])


def by_tiles(function: Callable[..., Rows], *rows: Tensor) -> Rows:
    """`function(*rows)` in calls of `TILE_ROWS` rows each.

    Args:
        function: of tensors with as many rows as there are, to one or several such; each row on its own.
        rows: tensors with the same number of rows.
    """
    count = rows[0].shape[0]
    padded = [F.pad(each, (0, 0) * (each.dim() - 1) + (0, -count % TILE_ROWS)) for each in rows]
    tiles = [function(*tile) for tile in zip(*(torch.split(each, TILE_ROWS) for each in padded), strict=True)]
    if not tiles:
        return function(*rows)
    if isinstance(tiles[0], Tensor):
        return torch.cat(tiles)[:count]
    return tuple(torch.cat(parts)[:count] for parts in zip(*tiles, strict=True))


def check_tiles(
    function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Tries out what the module says of places and neighbours, with random rows.

    Raises:
        ConfigurationError: it does not hold here.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TILE_ROWS, width, generator=generator).to(device=device, dtype=dtype)
    expected = function(rows)
    for place in (1, 7, TILE_ROWS // 2, TILE_ROWS - 1):
        alone = torch.zeros_like(rows)
        alone[place] = rows[0]
        moved = function(rows.roll(place, 0)).roll(-place, 0)
        if not torch.equal(moved, expected) or not torch.equal(function(alone)[place], expected[0]):
            raise ConfigurationError(
                "batch_invariant cannot be kept here: a matrix product gives a row other bits at another place",
                "batch_invariant",
            )
