"""One MoE layer, served by pimoe with its experts apart and by what users would pick instead.

    python load_tests/compare_serving.py [--preset tiny] [--server NAME] [--variants] [--json FILE] [--svg FILE]

Hidden 512, 8 experts, top-2 renormalised, SwiGLU of inner size 1024, float32; a request is 4 tokens as raw tensor
bytes, and so is its answer. `make rivals` installs the rivals; each that is missing is named with the reason.
See README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pimoe.deployments.processes import adopt_orphans
from report import cores, machine, machine_line, parser, progress, publish
from serving_contenders import Contender, contenders
from serving_model import Sample, write_model
from serving_rounds import Measured, Preset, measure
from serving_tables import charts, closed_rows, failures, open_rows, server_rows, target_rows, text
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
    ),
    "default": Preset(),
}
TINY_SERVERS = ("pimoe", "serve", "starlette")
WRK = "wrk with one thread"
WITHOUT_WRK = "wrk is not installed (Debian: apt-get install wrk), so by a slower generator of our own"


def chosen(options: argparse.Namespace) -> list[Contender]:
    """Who takes part, missing or not."""
    known = contenders(MODEL_NAME)
    names = options.server or (TINY_SERVERS if options.preset == "tiny" else [one.key for one in known])
    named = [one for one in known if one.key in names]
    return [variant for one in named for variant in variants(one)] if options.variants else named


def variants(contender: Contender) -> list[Contender]:
    """Both ways for a rival to use the cores: one worker with them all, or one worker for each."""
    if contender.is_ours:
        return [contender]
    ways = ((1, cores()), (cores(), 1))
    return [
        replace(
            contender,
            key=f"{contender.key}-{workers}x{threads}",
            title=f"{contender.title} {workers}x{threads}",
            workers=workers,
            threads=threads,
        )
        for workers, threads in ways
    ]


def run(options: argparse.Namespace) -> None:
    """Measure and publish."""
    adopt_orphans()  # what servers leave behind comes to this process, which ends it
    here, preset = machine(), PRESETS[options.preset]
    preset = replace(preset, rounds=options.rounds or preset.rounds)
    wanted = chosen(options)
    skipped: dict[str, str] = {one.title: reason for one in wanted if (reason := one.missing()) is not None}
    present = [one for one in wanted if one.title not in skipped]
    for title, reason in skipped.items():
        progress(f"skipped: {title}: {reason}")
    ceiling: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / MODEL_NAME)
        found = measure(present, model, Sample(model, preset.bodies), preset, ceiling)
    skipped |= failures(present, found)
    facts = facts_of(present, found, preset, max(ceiling))
    facts = {"machine": here, "preset": options.preset, **facts, "skipped": skipped}
    if options.svg is not None:
        Path(options.svg).write_text(charts(facts))
    publish(facts, f"{machine_line(here)}\n\n{text(facts)}", options.json)


def facts_of(
    present: Sequence[Contender], found: dict[str, Measured], preset: Preset, ceiling: float
) -> dict[str, object]:
    """Rows of everything."""
    closed = closed_rows(present, found)
    load = WRK if is_installed() else WITHOUT_WRK
    rounds = f"{preset.rounds} round{'s' if preset.rounds > 1 else ''} of {preset.closed_s} s each, medians"
    return {
        "load": f"{load}; {preset.bodies} bodies in turn; {rounds}",
        "closed": closed,
        "open": open_rows(present, found),
        "servers": server_rows(present, found),
        "ceiling": {"tokens": preset.ceiling_tokens, "tokens_per_s": ceiling},
        "targets": target_rows(closed, ceiling),
    }


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
