"""The same dispatch over links, Ray Serve handles, raw actor calls and ZeroMQ, in one cluster and one run.

    python load_tests/dispatch.py [--preset tiny] [--json FILE] [--svg FILE]

A replica like the router calls expert replicas at once and waits for all of them. Three tables: bytes that come
back as they went, which is transport alone; tokens through a layer of the embedded model, which is a whole
dispatch with its plan, its experts and its sum; and the public reference shape of expert services. See README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dispatch_cluster import IN_PROCESS, deployed
from dispatch_echo import ECHO_WAYS, GENERIC, HANDLE, LANE, LINK, SOCKET, TIMEOUT_S, ZMQ, without_zmq
from dispatch_reference import ReferencePreset, measure_reference, reference_table, reference_worse
from pimoe.runtime.embedded import CHECKPOINT
from plot import Panel, Series, figure
from report import machine, machine_line, median_quantile, parser, progress, publish, table, target, target_table
from stand import stand, supervised

GROUPS = 2  # that the embedded model's experts are split into
EXPERT_WAYS = (IN_PROCESS, LANE, LINK, HANDLE)
TARGET_BYTES, TARGET_GROUPS, TARGET_RATIO = 2**14, 2, 50
_FAST = (LANE, LINK, SOCKET, GENERIC, ZMQ, IN_PROCESS)


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all sizes and ways in turn, so that all meet the same disturbances.
        link_calls, handle_calls: per round, size and way; handles and actors are too slow for as many.
        most_bytes: to all groups together in the calls of one round, size and way; no fewer than three calls.
        payload_bytes: to each expert replica, and back from it.
        groups: how many are sent to at once.
        tokens: sizes of a dispatch through real experts.
    """

    rounds: int
    link_calls: int
    handle_calls: int
    most_bytes: int = 2**27
    payload_bytes: tuple[int, ...] = (2**10, 2**14, 2**17, 2**20, 2**22)
    groups: tuple[int, ...] = (1, 2, 4)
    tokens: tuple[int, ...] = (1, 8, 32, 128)
    reference: ReferencePreset = field(default_factory=ReferencePreset)

    def calls(self, way: str, payload_bytes: int) -> int:
        """Per round; `payload_bytes` to all groups together."""
        wanted = self.link_calls if way in _FAST else self.handle_calls
        return max(3, min(wanted, self.most_bytes // payload_bytes))


PRESETS = {
    "tiny": Preset(
        *(1, 20, 5, 2**23),
        tokens=(1, 32),
        reference=ReferencePreset(inner=64, rounds=1, warm_up=2, calls=5),
    ),
    "default": Preset(rounds=7, link_calls=200, handle_calls=25),
}


@dataclass(frozen=True)
class Result:
    """One way of one kind and size of dispatch.

    Attributes:
        kind: "echo", whose size is the bytes to each replica and back, or "experts", whose size is tokens.
        groups: sent to at once.
        p50_us, p95_us: until all have answered; medians over rounds of each round's quantile.
        ratio: p50 to that of the link.
    """

    kind: str
    size: int
    groups: int
    way: str
    p50_us: float
    p95_us: float
    ratio: float


Case = tuple[str, int, int, str]  # as the first fields of a result


def measure(preset: Preset) -> list[Result]:
    """Deploy the measuring application beside whatever runs in this process' cluster, measure, and remove it."""
    progress("dispatch: starting expert groups and a router that measures")
    ways = [way for way in ECHO_WAYS if way != ZMQ or not without_zmq()]
    cases: list[Case] = [
        *(
            ("echo", size, groups, way)
            for groups in preset.groups
            for size in preset.payload_bytes
            for way in ways
        ),
        *(("experts", size, GROUPS, way) for size in preset.tokens for way in EXPERT_WAYS),
    ]
    times: dict[Case, list[list[float]]] = {case: [] for case in cases}
    copies = max(GROUPS, *preset.groups)
    with deployed("dispatch", CHECKPOINT, GROUPS, copies, whole=False, echoes=True) as router:
        if ZMQ in ways:
            router.open_zmq.remote().result(timeout_s=TIMEOUT_S)
        for index in range(preset.rounds):
            progress(f"dispatch: round {index + 1} of {preset.rounds}")
            for case in cases:
                times[case].append(_ask(router, case, preset).result(timeout_s=TIMEOUT_S))
    return [_result(case, rounds, times[(*case[:3], LINK)]) for case, rounds in times.items()]


def _ask(router: Any, case: Case, preset: Preset) -> Any:
    kind, size, groups, way = case
    if kind == "echo":
        return router.echo.remote(way, size, groups, preset.calls(way, size * groups))
    return router.experts.remote(way, size, preset.calls(way, size))


def _result(case: Case, rounds: list[list[float]], link_rounds: list[list[float]]) -> Result:
    p50, p95, link = (median_quantile(r, q) for r, q in ((rounds, 0.5), (rounds, 0.95), (link_rounds, 0.5)))
    return Result(*case, p50_us=1e6 * p50, p95_us=1e6 * p95, ratio=p50 / link)


# For people ----------------------------------------------------------------------------------------------------


def tables(results: Sequence[Result]) -> str:
    """Bytes, tokens, and how far the link is ahead of a handle."""
    return "\n\n".join([_echo_table(results), _expert_table(results), target_table(targets(results))])


def _echo_table(results: Sequence[Result]) -> str:
    found = {(r.groups, r.size, r.way): r for r in results if r.kind == "echo"}
    ways = list(dict.fromkeys(way for *_, way in found))
    others = [way for way in ways if way != LINK]
    rows = [
        (
            *(f"{groups}", f"{size:,}", f"{found[groups, size, LINK].p95_us:,.0f}"),
            *(f"{found[groups, size, way].p50_us:,.0f}" for way in ways),
            *(f"{found[groups, size, way].ratio:.1f}x" for way in others),
        )
        for groups, size in dict.fromkeys((groups, size) for groups, size, _ in found)
    ]
    header = ("groups", "bytes each", "link p95 us", *(f"{way} p50 us" for way in ways))
    title = (
        "Bytes to groups at once, and as many back from each (medians of rounds)\n"
        "link: a packed call, as dispatches use it, large bodies through shared memory; socket: without that;\n"
        "generic: a call with a map and described tensors"
    )
    header = (*header, *(f"{way} to link" for way in others))
    short = [name.replace(GENERIC, "generic").replace(SOCKET, "socket") for name in header]
    return table(title, short, rows)


def _expert_table(results: Sequence[Result]) -> str:
    rows = [
        (f"{r.size:,}", r.way, f"{r.p50_us:,.0f}", f"{r.p95_us:,.0f}", f"{r.ratio:.2f}x")
        for r in results
        if r.kind == "experts"
    ]
    title = f"Tokens through {GROUPS} expert groups of the embedded model, from plan to sum"
    return table(title, ("tokens", "way", "p50 us", "p95 us", "to link"), rows)


def targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Whether the link, as dispatches use it, is as far ahead of a handle as it is to be."""
    what = "{:g} KB to {} groups over links, times as fast as over Serve handles"
    return [
        target(what.format(r.size / 1024, r.groups), r.ratio, TARGET_RATIO, digits=1)
        for r in results
        if (r.kind, r.size, r.groups, r.way) == ("echo", TARGET_BYTES, TARGET_GROUPS, HANDLE)
    ]


def worse_lines(results: Sequence[Result]) -> list[str]:
    """Where another way is faster than the link, or where being apart costs something."""
    slower = [
        f"{r.size:,} bytes to {r.groups} group(s): the link takes {1 / r.ratio:.2f}x as long as {r.way}"
        for r in results
        if r.kind == "echo" and r.ratio < 1
    ]
    apart = [
        f"{r.size} token(s) through the embedded model: the link takes {1 / r.ratio:.1f}x as long as {r.way}"
        for r in results
        if r.kind == "experts" and r.ratio < 1
    ]
    return slower + apart


def chart(results: Sequence[Result]) -> str:
    """An SVG: microseconds over bytes for each number of groups, and over tokens."""
    echoes = [r for r in results if r.kind == "echo"]
    panels = [
        _panel(f"bytes to {groups} group(s)", "bytes each way", [r for r in echoes if r.groups == groups])
        for groups in dict.fromkeys(r.groups for r in echoes)
    ]
    experts = [r for r in results if r.kind == "experts"]
    return figure("A dispatch, p50", [*panels, _panel("tokens through experts", "tokens", experts)])


def _panel(title: str, label: str, rows: Sequence[Result]) -> Panel:
    ways = dict.fromkeys(r.way for r in rows)
    lines = [Series(way, [(r.size, r.p50_us) for r in rows if r.way == way]) for way in ways]
    return Panel(title, label, "microseconds", lines, x_log=True, y_log=True)


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    here, preset, reason = machine(("pyzmq",)), PRESETS[options.preset], without_zmq()
    with stand() as cluster:
        cluster.serve(None, GROUPS)
        results = measure(preset)
        reference = measure_reference(preset.reference)
    worse = [*worse_lines(results), *reference_worse(reference)]
    facts = {
        "machine": here,
        "preset": options.preset,
        "skipped": {ZMQ: reason} if reason else {},
        "dispatch": [asdict(result) for result in results],
        "reference": [asdict(result) for result in reference],
        "targets": targets(results),
        "worse": worse,
    }
    left_out = [f"left out: {ZMQ} ({reason})"] if reason else []
    told = "\n".join(["Where pimoe is worse", *(worse or ["nowhere"])])
    parts = [machine_line(here), *left_out, tables(results), reference_table(reference, preset.reference), told]
    publish(facts, "\n\n".join(parts), options.json)
    if options.svg is not None:
        Path(options.svg).write_text(chart(results))


if __name__ == "__main__":
    command_line = parser(
        "Compare dispatch over pimoe's links with Ray Serve handles, actors and ZeroMQ.", PRESETS
    )
    command_line.add_argument("--svg", metavar="FILE", help="draw microseconds over sizes there")
    arguments = command_line.parse_args()
    supervised(lambda: run(arguments))
