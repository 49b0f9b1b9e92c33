"""What the result cache is worth: hits over HTTP and in-process against computing, and how many under Zipf.

    python load_tests/cache.py [--preset tiny] [--json FILE] [--svg FILE]

In one cluster: the embedded model behind HAProxy, in the default deployment, and beside it a Starlette handler
that answers a constant, once as Serve handles requests and once past that, as the gateway's own go, which is the
most that a Starlette answer behind this proxy can be. See README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_local import local_table, run_local
from cache_served import WAYS, Served, measure_served, served_table, targets
from cache_served import worse_lines as served_worse
from cache_zipf import Size, Zipf, as_points, curves, measure_zipf, zipf_table
from cache_zipf import worse_lines as zipf_worse
from plot import Panel, Series, figure
from report import machine, machine_line, parser, publish, target_table
from stand import stand, supervised


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all ways in turn, so that all meet the same disturbances.
        seconds: of load, per round and way; whole ones.
        connections: closed-loop clients over HTTP.
        calls, computed_calls: in-process, per round and way.
        distinct, requests: different requests, and all, under Zipf.
        sizes: caches under Zipf.
    """

    rounds: int
    seconds: float
    connections: tuple[int, ...]
    calls: int
    computed_calls: int
    distinct: int
    requests: int
    sizes: tuple[Size, ...]


PRESETS = {
    "tiny": Preset(1, 1, (1, 4), 200, 5, 200, 600, (Size("lru", 0.1),)),
    "default": Preset(
        *(3, 2, (1, 32), 3000, 30, 3000, 8000),
        sizes=(Size("lru", 0.05), Size("lru", 0.2), Size("w-tinylfu", 0.05)),
    ),
}


def chart(served: Sequence[Served], zipf: Sequence[Zipf]) -> str:
    """An SVG: requests/s over connections for each request, and hit ratios over the size of the cache."""
    panels = [
        Panel(f"a {name}, over HTTP", "connections", "requests/s", _lines(served, name), x_log=True, y_log=True)
        for name in dict.fromkeys(r.request for r in served)
    ]
    first = zipf[0]
    policies = list(dict.fromkeys(r.policy for r in zipf))
    ratios = {**curves(first.distinct, first.requests, policies), **as_points(zipf)}
    lines = [Series(name, points) for name, points in ratios.items()]
    panels.append(Panel("under Zipf", "room, as a share of all answers", "hit ratio", lines, x_log=True))
    return figure("The result cache", panels, columns=3)


def _lines(served: Sequence[Served], name: str) -> list[Series]:
    rows = [r for r in served if r.request == name]
    return [Series(w, [(r.connections, r.requests_per_s) for r in rows if r.way == w]) for w in WAYS]


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here, preset = machine(("starlette", "uvicorn")), PRESETS[options.preset]
    local = run_local(preset.rounds, preset.calls, preset.computed_calls)
    with stand() as cluster:
        cluster.serve(None, 2)
        served, gateways = measure_served(cluster, preset.rounds, preset.seconds, preset.connections)
        zipf = measure_zipf(cluster, preset.distinct, preset.requests, preset.sizes)
    worse = [*served_worse(served), *zipf_worse(zipf)]
    facts = {
        "machine": here,
        "preset": options.preset,
        "gateways": gateways,
        "served": [asdict(result) for result in served],
        "local": [asdict(result) for result in local],
        "zipf": [asdict(result) for result in zipf],
        "targets": targets(served),
        "worse": worse,
    }
    told = "\n".join(["Where pimoe is worse", *(worse or ["nowhere"])])
    tables = [served_table(served), local_table(local), zipf_table(zipf), target_table(targets(served))]
    parts = [machine_line(here), *tables, told]
    publish(facts, "\n\n".join(parts), options.json)
    if options.svg is not None:
        Path(options.svg).write_text(chart(served, zipf))


if __name__ == "__main__":
    command_line = parser("Measure what the result cache is worth.", PRESETS)
    command_line.add_argument("--svg", metavar="FILE", help="draw requests/s and hit ratios there")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
