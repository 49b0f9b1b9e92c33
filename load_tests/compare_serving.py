"""One MoE layer, served by pimoe with its experts apart and by what users would pick instead.

    python load_tests/compare_serving.py [--preset tiny] [--server NAME] [--variants] [--json FILE] [--svg FILE]

Hidden 512, 8 experts, top-2 renormalised, SwiGLU of inner size 1024, float32; a request is 4 tokens as raw tensor
bytes, and so is its answer. `make rivals` installs the rivals; each that is missing is named with the reason.
Where pimoe itself could not be measured the exit code is 1, and what it promises there counts as missed.
See README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pimoe.deployments.processes import adopt_orphans
from pimoe.runtime.errors import UnavailableError
from report import cores, machine, machine_line, parser, progress, publish
from serving_contenders import Contender, contenders
from serving_model import Sample, write_model
from serving_rounds import Measured, Preset, measure
from serving_tables import charts, closed_rows, failures, open_rows, server_rows, text
from serving_targets import target_rows
from stand import supervised
from wrk import is_installed

MODEL_NAME = "layer"
PRESETS = {
    "tiny": Preset(
        rounds=1,
        connections=(1, 8),
        closed_s=1,
        open_shares=(),
        open_rates=(20.0,),
        open_s=1.0,
        bodies=16,
        ceiling_times=3,
        alone=(),
    ),
    "default": Preset(),
}
TINY_SERVERS = ("pimoe", "serve", "starlette")
WRK = "wrk with one thread"
WITHOUT_WRK = "wrk is not installed (Debian: apt-get install wrk), so by a slower generator of our own"


def line_up(with_variants: bool, alone: Collection[str]) -> list[Contender]:
    """All that could take part.

    Args:
        with_variants: each rival with one worker and with one for each core.
        alone: without that, these rivals (keys) with one worker too, for requests that come one by one.
    """
    known = contenders(MODEL_NAME)
    if with_variants:
        return [variant for one in known for variant in variants(one)]
    if cores() == 1:
        return known
    extra = {one.key: [replace(variants(one)[0], is_alone=True)] for one in known if one.key in alone}
    return [entry for one in known for entry in (one, *extra.get(one.key, ()))]


def chosen(everybody: Sequence[Contender], options: argparse.Namespace) -> list[Contender]:
    """Who takes part, missing or not."""
    names = options.server or (TINY_SERVERS if options.preset == "tiny" else {one.rival for one in everybody})
    return [one for one in everybody if one.rival in names]


def variants(contender: Contender) -> list[Contender]:
    """Both ways for a rival to use the cores: one worker with them all, or one worker for each."""
    if contender.is_ours:
        return [contender]
    ways = dict.fromkeys(((1, cores()), (cores(), 1)))
    return [
        replace(
            contender,
            key=f"{contender.key}-{workers}x{threads}",
            title=f"{contender.title} {workers}x{threads}",
            workers=workers,
            threads=threads,
            variant_of=contender.key,
        )
        for workers, threads in ways
    ]


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    adopt_orphans()  # what servers leave behind comes to this process, which ends it
    here, preset = machine(), PRESETS[options.preset]
    preset = replace(preset, rounds=options.rounds or preset.rounds)
    everybody = line_up(options.variants, preset.alone)
    wanted = chosen(everybody, options)
    skipped: dict[str, str] = {one.title: reason for one in wanted if (reason := one.missing()) is not None}
    present = [one for one in wanted if one.title not in skipped]
    for title, reason in skipped.items():
        progress(f"skipped: {title}: {reason}")
    ceiling: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / MODEL_NAME)
        found = measure(present, model, Sample(model, preset.bodies), preset, ceiling)
    skipped |= failures(present, found)
    facts = facts_of(present, found, preset)
    facts |= {"ceiling": {"tokens": preset.ceiling_tokens, "tokens_per_s": max(ceiling)}, "skipped": skipped}
    facts["targets"] = target_rows(everybody, facts["closed"], preset.connections, max(ceiling), skipped)
    facts = {"machine": here, "preset": options.preset, **facts}
    if options.svg is not None:
        Path(options.svg).write_text(charts(facts))
    publish(facts, f"{machine_line(here)}\n\n{text(facts)}", options.json)
    if ours := [f"{title}: {why}" for title, why in skipped.items() if title.startswith("pimoe")]:
        raise UnavailableError("; ".join(ours))  # after the results, which say so too


def facts_of(present: Sequence[Contender], found: dict[str, Measured], preset: Preset) -> dict[str, Any]:
    """Rows of everything that was measured."""
    load = WRK if is_installed() else WITHOUT_WRK
    rounds = f"{preset.rounds} round{'s' if preset.rounds > 1 else ''} of {preset.closed_s} s each, medians"
    return {
        "load": f"{load}; {preset.bodies} bodies in turn; {rounds}",
        "notes": notes(present, found, preset),
        "closed": closed_rows(present, found),
        "open": open_rows(present, found),
        "open_s": preset.open_s,
        "servers": server_rows(present, found),
    }


def notes(present: Sequence[Contender], found: Mapping[str, Measured], preset: Preset) -> list[str]:
    """What to know about the numbers of this run."""
    told = []
    if alone := [one for one in present if one.is_alone]:
        how = f"one worker with all cores ({alone[0].workers}x{alone[0].threads})"
        rounds = min(preset.alone_rounds, preset.rounds)
        told.append(f"Rivals with {how}: at 1 connection only, in {rounds} of {preset.rounds} rounds.")
    if preset.rounds > 1:
        told.append("In brackets beside a target's ratio: the lowest and the highest round.")
    if not any(measured.open for measured in found.values()):
        told.append("No open loop: its rates are shares of what rivals did in rounds before the last: none here.")
    return told


def main() -> None:
    """The command line."""
    known = [one.key for one in contenders(MODEL_NAME)]
    command_line = parser("Serve one MoE layer with pimoe and with its rivals, and load each.", PRESETS)
    command_line.add_argument("--server", action="append", choices=known, help="only these; may be repeated")
    command_line.add_argument(
        "--variants", action="store_true", help="each rival with one worker and with one per core"
    )
    command_line.add_argument("--rounds", type=int, help="in place of the preset's")
    command_line.add_argument("--svg", metavar="FILE", help="write charts there")
    options = command_line.parse_args()
    supervised(lambda: run(options))


if __name__ == "__main__":
    main()
