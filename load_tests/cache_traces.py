"""Requests for a cache, as traces that are the same in every run: skewed, swept by scans, shifting."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SEED = 2024


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        keys, requests: different entries that may be asked for, and how often any is asked for, per trace.
        shares: cache sizes, of the bytes of all entries that are asked for at all.
    """

    keys: int
    requests: int
    shares: tuple[float, ...]


PRESETS = {
    "tiny": Preset(keys=500, requests=3000, shares=(0.05, 0.2)),
    "default": Preset(keys=20_000, requests=200_000, shares=(0.01, 0.05, 0.2)),
}


@dataclass(frozen=True)
class Trace:
    """What is asked for, in order, and how large each entry is."""

    name: str
    keys: list[bytes]
    sizes: dict[bytes, int]


def make_traces(preset: Preset) -> Iterator[Trace]:
    """The same ones in every run."""
    rng = np.random.default_rng(_SEED)
    zipf = {skew: zipf_trace(rng, preset.keys, preset.requests, skew) for skew in (0.8, 1.0)}
    shifting = zipf[1.0].copy()
    for part in np.array_split(shifting, 8):
        part[:] = rng.permutation(preset.keys)[part]
    scanned = zipf[1.0].copy()
    for start in range(preset.requests // 8, preset.requests, preset.requests // 4):
        scan = scanned[start : start + preset.requests // 8]  # an eighth of all, four times: half of the trace
        scan[:] = preset.keys + start + np.arange(len(scan))
    for name, asked in (
        ("zipf 0.8", zipf[0.8]),
        ("zipf 1.0", zipf[1.0]),
        ("zipf 1.0 + scans", scanned),
        ("zipf 1.0, shifting", shifting),
    ):
        yield _trace(name, asked)


def zipf_trace(rng: np.random.Generator, keys: int, requests: int, skew: float) -> NDArray[np.int64]:
    """Numbers below `keys`, of which the r-th most popular is asked for with probability ~ 1 / r ** skew."""
    weights = 1 / np.arange(1, keys + 1) ** skew
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(requests))
    return rng.permutation(keys)[np.minimum(ranks, keys - 1)]


def _trace(name: str, asked: NDArray[np.int64]) -> Trace:
    """Sizes as of answers: most of some kilobytes, a few of hundreds; none depends on how popular an entry is."""
    keys = {int(number): hashlib.sha256(b"%d" % number).digest() for number in np.unique(asked)}
    spread = np.random.default_rng(_SEED).lognormal(np.log(2048), 1.2, len(keys))
    sizes = {key: min(int(size), 2**18) for key, size in zip(keys.values(), spread, strict=True)}
    return Trace(name, [keys[number] for number in asked.tolist()], sizes)
