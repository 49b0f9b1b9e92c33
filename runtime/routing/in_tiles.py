"""A routing strategy computed in tiles, so that each token's choice is the same to the bit in any batch."""

from __future__ import annotations

from torch import Tensor

from ..model.tiles import by_tiles
from .strategies import Routing, RoutingStrategy, TopKSoftmax


def row_by_row(strategy: RoutingStrategy) -> RoutingStrategy:
    """The strategy as one that gives a token the same bits in any batch."""
    native = isinstance(strategy, TopKSoftmax) and strategy.is_native
    return strategy if native else InTiles(strategy)


class InTiles:
    """See the module.

    Args:
        strategy: chooses for each token on its own.
    """

    def __init__(self, strategy: RoutingStrategy) -> None:
        self.strategy = strategy

    @property
    def num_experts(self) -> int:
        """See `RoutingStrategy`."""
        return self.strategy.num_experts

    def __call__(self, hidden: Tensor) -> Routing:
        """See `RoutingStrategy`."""

        def route(rows: Tensor) -> tuple[Tensor, ...]:
            routing = self.strategy(rows)
            return routing.expert_ids, routing.weights

        return Routing(*by_tiles(route, hidden))
