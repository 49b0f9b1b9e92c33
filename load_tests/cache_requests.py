"""The requests that `cache.py` asks over and over: a completion and a tensor request of the embedded model."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from wrk import Target

PROMPT = "add: 12 34"
ANSWER_TOKENS = 16
TENSOR_TOKENS = 4
COMPLETION, TENSOR = "completion", "tensor"
_TIMEOUT_S = 60.0
_PAST_THE_CACHE = {"x-pimoe-cache": "false"}


@dataclass(frozen=True)
class Asked:
    """A request, and what it is answered.

    Attributes:
        name: `COMPLETION` or `TENSOR`.
        target: the request, which the cache may answer.
        answer: its whole body.
    """

    name: str
    target: Target
    content_type: str
    answer: bytes

    def past_the_cache(self) -> Target:
        """The same, computed each time."""
        headers = {**self.target.headers, **_PAST_THE_CACHE}
        return Target(self.target.url, self.target.method, headers, self.target.bodies)

    def elsewhere(self, url: str) -> Target:
        """The same bytes, asked of something else."""
        return Target(url, self.target.method, self.target.headers, self.target.bodies)


def hidden_states(tokens: int, hidden: int, seed: int) -> NDArray[np.float32]:
    """`[tokens, hidden]`, others for every seed."""
    return np.random.default_rng(seed).standard_normal((tokens, hidden), dtype=np.float32)


def ask_both(url: str, model: str, hidden: int) -> list[Asked]:
    """Both requests, asked until the cache answers them.

    Raises:
        RuntimeError: an answer that is no answer, or the cache does not give it.
    """
    return [_asked(COMPLETION, _completion(url, model)), _asked(TENSOR, _tensor(url, model, hidden))]


def post(target: Target) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of the answer."""
    place = urlsplit(target.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_TIMEOUT_S)
    try:
        connection.request(target.method, place.path, b"".join(target.bodies[:1]), dict(target.headers))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def get_status(url: str) -> dict[str, Any]:
    """The application's status page."""
    _, _, body = post(Target(f"{url}/admin/status"))
    status: dict[str, Any] = json.loads(body)
    return status


def _asked(name: str, target: Target, attempts: int = 50) -> Asked:
    for _ in range(attempts):  # each gateway has a cache of its own
        status, headers, body = post(target)
        if status != 200:
            raise RuntimeError(f"{name}: status {status}: {body[:300]!r}")
        if headers.get("x-pimoe-cache") == "hit":
            return Asked(name, target, headers["content-type"], body)
    raise RuntimeError(f"{name}: asked {attempts} times, and never answered by the cache")


def _completion(url: str, model: str) -> Target:
    wanted = {"model": model, "prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    headers = {"content-type": "application/json"}
    return Target(f"{url}/v1/completions", "POST", headers, [json.dumps(wanted).encode()])


def _tensor(url: str, model: str, hidden: int) -> Target:
    """In the binary extension of the Open Inference Protocol, both ways."""
    data = hidden_states(TENSOR_TOKENS, hidden, 0).tobytes()
    described = {"name": "hidden_states", "datatype": "FP32", "shape": [TENSOR_TOKENS, hidden]}
    head = json.dumps(
        {
            "inputs": [{**described, "parameters": {"binary_data_size": len(data)}}],
            "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Target(f"{url}/v2/models/{model}/infer", "POST", headers, [head + data])
