"""What tends to be asked for after what: sequences of requests that recur, learned apart for each tenant.

Pure: time comes in as a number. Everything is bounded, and what is not asked for any more is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..requests import GenerateRequest, InferRequest

Request: TypeAlias = InferRequest | GenerateRequest

WINDOW = 8  # requests of a tenant that one may follow: so many callers may take turns without hiding each other
MAX_SUCCESSORS = 8  # of one request
MAX_COUNT = 64.0  # then counts are halved: what came lately weighs more
_REQUEST_BYTES = 512  # of its objects
_TOKEN_BYTES = 36  # of a token id in a tuple


class Prediction(NamedTuple):
    """A request that is to be expected, and the share of times that it has come."""

    key: bytes
    request: Request
    confidence: float


def request_bytes(request: Request) -> int:
    """About the memory that keeping it takes."""
    if isinstance(request, InferRequest):
        return _REQUEST_BYTES + request.hidden_states.nbytes
    return _REQUEST_BYTES + _TOKEN_BYTES * (len(request.prompt_token_ids) + len(request.emitted))


@dataclass(slots=True)
class _Node:
    """A request that was made, how often, and what came after it how often."""

    request: Request
    size_bytes: int
    count: float = 0.0
    successors: dict[bytes, float] = field(default_factory=dict)

    def followed_by(self, key: bytes) -> None:
        """Count a successor. When there are too many, all lose one (Misra and Gries): what recurs stays."""
        if key not in self.successors and len(self.successors) == MAX_SUCCESSORS:
            self.successors = {other: count - 1 for other, count in self.successors.items() if count > 1}
        else:
            self.successors[key] = self.successors.get(key, 0.0) + 1

    def occurred(self) -> None:
        """Count it."""
        self.count += 1
        if self.count >= MAX_COUNT:
            self.count /= 2
            self.successors = {key: count / 2 for key, count in self.successors.items() if count >= 1}


@dataclass(slots=True)
class _Recent:
    """One of a tenant's last requests, and what has come after it already."""

    key: bytes
    at_s: float
    followers: set[bytes] = field(default_factory=set)


class SequenceRecorder:
    """Counts, for each request, which others came among the next few of the same tenant.

    Args:
        max_nodes: requests that are known at a time, and tenants too.
        max_request_bytes: of all requests that are kept; none is kept that takes an eighth of it or more.
        horizon_s: what comes later than that does not follow.
    """

    def __init__(self, max_nodes: int, max_request_bytes: int, horizon_s: float) -> None:
        self.max_nodes, self.max_request_bytes, self.horizon_s = max_nodes, max_request_bytes, horizon_s
        self.request_bytes = 0
        self._nodes: OrderedDict[tuple[str, bytes], _Node] = OrderedDict()  # the latest last
        self._recent: OrderedDict[str, deque[_Recent]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def record(self, tenant: str, key: bytes, request: Request, now_s: float) -> None:
        """A request came."""
        size_bytes = request_bytes(request)
        if 8 * size_bytes > self.max_request_bytes:
            return
        for recent in self._window(tenant):
            if recent.key != key and now_s - recent.at_s <= self.horizon_s and key not in recent.followers:
                recent.followers.add(key)
                if (before := self._nodes.get((tenant, recent.key))) is not None:
                    before.followed_by(key)
        self._window(tenant).append(_Recent(key, now_s))
        self._node(tenant, key, request, size_bytes).occurred()
        while len(self._nodes) > self.max_nodes or self.request_bytes > self.max_request_bytes:
            self.request_bytes -= self._nodes.popitem(last=False)[1].size_bytes

    def predict(self, tenant: str, key: bytes, min_confidence: float, min_occurrences: int) -> list[Prediction]:
        """What has followed this request so often and in such a share of cases, the surest first. To be asked
        before the request itself is recorded, which nothing has followed yet."""
        node = self._nodes.get((tenant, key))
        if node is None:
            return []
        found = []
        for successor, count in node.successors.items():
            confidence = min(1.0, count / node.count)
            known = self._nodes.get((tenant, successor))
            if known is not None and count >= min_occurrences and confidence >= min_confidence:
                found.append(Prediction(successor, known.request, confidence))
        return sorted(found, key=lambda prediction: -prediction.confidence)

    def _window(self, tenant: str) -> deque[_Recent]:
        if tenant not in self._recent:
            self._recent[tenant] = deque(maxlen=WINDOW)
            if len(self._recent) > self.max_nodes:
                self._recent.popitem(last=False)
        self._recent.move_to_end(tenant)
        return self._recent[tenant]

    def _node(self, tenant: str, key: bytes, request: Request, size_bytes: int) -> _Node:
        place = (tenant, key)
        if place not in self._nodes:
            self._nodes[place] = _Node(request, size_bytes)
            self.request_bytes += size_bytes
        self._nodes.move_to_end(place)
        return self._nodes[place]
