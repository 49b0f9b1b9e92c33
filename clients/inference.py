"""Tensor operations: hidden states `[tokens, hidden]` through one MoE layer, alone or many in one request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypedDict
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from .calls import Answer
from .errors import InvalidTensorError, PimoeClientError, ProtocolError, error_from_object
from .tensors import decode, encode
from .transport import HttpRequest
from .wire import pack, unpack

_MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
_INPUT = "hidden_states"
_OUTPUT = "output"

Outcome: TypeAlias = NDArray[Any] | PimoeClientError


class InferOptions(TypedDict, total=False):
    """Keyword arguments of `infer` and `infer_many`. One left out, or None, is the server's to choose.

    - `layer`: index of the MoE layer; the model's first one unless given.
    - `priority`: 0 to 1, 1 is most urgent; or "interactive" (1), "default" (0.5), "batch" (0). `timeout_s`: for
      the whole call, retries included.
    - `cache`: False neither looks the result up nor keeps it.
    """

    layer: int | None
    priority: float | str | None
    timeout_s: float | None
    cache: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class InferOperation:
    """One array for one MoE layer, for `infer_many`. What is None is left to that call.

    Attributes:
        array: hidden states `[tokens, hidden]`.
        timeout_s: this operation's own time, within that of the call.

    Raises:
        InvalidTensorError: not two dimensions.
    """

    array: NDArray[Any]
    layer: int | None = None
    priority: float | str | None = None
    timeout_s: float | None = None
    cache: bool | None = None

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim != 2:
            raise InvalidTensorError(f"shape is {array.shape}, and must be [tokens, hidden]", param=_INPUT)
        object.__setattr__(self, "array", array)

    def to_wire(self, remaining_s: float) -> dict[str, Any]:
        """The body of its request, msgpack's types only."""
        own_s = remaining_s if self.timeout_s is None else float(self.timeout_s)
        parameters = {
            "layer": self.layer,
            "priority": self.priority,
            # Always a float: the server may take integers for the microseconds of other clients.
            "timeout": min(own_s, remaining_s),
            "cache": self.cache,
        }
        return {
            "inputs": [encode(self.array, _INPUT)],
            "parameters": {name: value for name, value in parameters.items() if value is not None},
        }


def as_operation(item: NDArray[Any] | InferOperation, options: InferOptions) -> InferOperation:
    """`item` as an operation, with `options` for what it leaves open."""
    if not isinstance(item, InferOperation):
        return InferOperation(item, **options)
    own = {name: value for name in InferOptions.__annotations__ if (value := getattr(item, name)) is not None}
    return InferOperation(item.array, **{**options, **own})


def infer_request(model: str, operation: InferOperation, remaining_s: float) -> HttpRequest:
    """The request of one operation."""
    return HttpRequest("POST", _path(model, "infer"), _MSGPACK, pack(operation.to_wire(remaining_s)))


def read_infer(answer: Answer, operation: InferOperation) -> NDArray[Any]:
    """Its output `[tokens, hidden]`, a read-only view."""
    return _output(unpack(answer.body, answer.call), operation)


class InferBatch:
    """Operations of one request, and which of them still wait for an answer.

    A server under load may turn away some operations and compute the others: only those are sent again.

    Attributes:
        outcomes: of each operation, in order; None while it waits.
    """

    def __init__(self, operations: Sequence[InferOperation]) -> None:
        self._operations = operations
        self._pending: Sequence[int] = range(len(operations))
        self.outcomes: list[Outcome | None] = [None] * len(operations)

    def request(self, model: str, remaining_s: float) -> HttpRequest:
        """The request of all pending operations."""
        requests = [self._operations[index].to_wire(remaining_s) for index in self._pending]
        return HttpRequest("POST", _path(model, "infer_many"), _MSGPACK, pack({"requests": requests}))

    def take(self, answer: Answer) -> None:
        """Keeps what `answer` holds.

        Raises:
            PimoeClientError: that of the first operation which is worth sending again.
        """
        responses = unpack(answer.body, answer.call).get("responses")
        if not isinstance(responses, list) or len(responses) != len(self._pending):
            raise ProtocolError(f"{answer.call} did not give {len(self._pending)} responses")
        refused = []
        for index, response in zip(self._pending, responses, strict=True):
            outcome = self.outcomes[index] = _outcome(response, self._operations[index])
            if isinstance(outcome, PimoeClientError) and outcome.retryable:
                refused.append((index, outcome))
        self._pending = [index for index, _ in refused]
        if refused:
            raise refused[0][1]

    def fail(self, error: PimoeClientError) -> None:
        """No more tries: operations that were never answered end with `error`."""
        self.outcomes = [error if outcome is None else outcome for outcome in self.outcomes]


def split(operations: Iterable[InferOperation], most: int, most_bytes: int) -> list[InferBatch]:
    """`operations` in order, in requests of at most `most` and `most_bytes`; a larger one gets its own."""
    groups: list[list[InferOperation]] = []
    nbytes = 0
    for operation in operations:
        nbytes += operation.array.nbytes
        if not groups or len(groups[-1]) == most or nbytes > most_bytes:
            groups.append([])
            nbytes = operation.array.nbytes
        groups[-1].append(operation)
    return [InferBatch(group) for group in groups]


def arrays(outcomes: Sequence[Outcome]) -> list[NDArray[Any]]:
    """The outcomes when all of them are arrays.

    Raises:
        PimoeClientError: that of the first operation that failed; a note says which.
    """
    found = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, PimoeClientError):
            outcome.add_note(f"operation {index} of {len(outcomes)}")
            raise outcome
        found.append(outcome)
    return found


@lru_cache(maxsize=64)
def _path(model: str, verb: str) -> str:
    return f"/v2/models/{quote(model, safe='')}/{verb}"


def _outcome(response: Any, operation: InferOperation) -> Outcome:
    if not isinstance(response, dict):
        raise ProtocolError("one of many responses is no map")
    error = response.get("error")
    return error_from_object(error) if isinstance(error, dict) else _output(response, operation)


def _output(response: Mapping[str, Any], operation: InferOperation) -> NDArray[Any]:
    outputs = response.get("outputs")
    for tensor in outputs if isinstance(outputs, list) else ():
        if isinstance(tensor, dict) and tensor.get("name") == _OUTPUT:
            return decode(tensor, operation.array.dtype)
    raise ProtocolError(f"the answer holds no tensor named {_OUTPUT!r}")
