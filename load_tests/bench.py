"""Runs the whole measuring stand and writes `load_tests/RESULTS.md`: `make bench`.

    python load_tests/bench.py                          # everything, some hour; writes RESULTS.md and results/
    python load_tests/bench.py --preset tiny            # everything, small; prints the page
    python load_tests/bench.py --out FOLDER             # writes there instead
    python load_tests/bench.py --only NAME [-- ARGS]    # one script, printed, nothing written; may be repeated
    python load_tests/bench.py --again NAME             # one that failed once more, into the page of that run

Scripts run one after the other, in processes of their own. One that fails is shown with the end of what it said,
and the others go on; the exit code is 1 then. What is written is written at the end of a whole run, or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from bench_page import Outcome, Run, now, page, revision
from report import DEFAULT_PRESET, progress

FOLDER = Path(__file__).parent
PAGE, CHARTS = "RESULTS.md", "results"
_RUN = "run.json"  # beside the charts: the page once more, to be made anew from
_ERROR_LINES = 30
_STOP_S = 90.0  # for a script to end its cluster


@dataclass(frozen=True)
class Script:
    """One measurement.

    Attributes:
        chart: the option that takes a file for its chart, if it draws one.
        limit_s: after so long it hangs.
        default: whether it is part of a whole run.
    """

    name: str
    question: str
    chart: str | None = "--svg"
    limit_s: float = 1800.0
    default: bool = True


SCRIPTS = (
    Script("compare_serving", "One MoE layer over HTTP: pimoe beside what users would pick instead"),
    Script("compare_generation", "One checkpoint, decode and prefill: pimoe beside transformers and llama.cpp"),
    Script("isolation_tax", "The same engine with its experts in-process and in processes of their own"),
    Script("int8_experts", "What rounding experts to int8 costs in accuracy and saves in memory", chart=None),
    Script("dispatch", "One dispatch over a link, a Serve handle, an actor call, ZeroMQ"),
    Script("cache", "Hits over HTTP and in-process, beside an empty handler and the same request computed"),
    Script("mixed_prompts", "What short prompts wait for their first token while long ones prefill", chart=None),
    Script("overload", "What priorities and deadlines are worth at twice the capacity", chart=None),
    Script("cache_policies", "Which eviction policy keeps the right answers", chart=None),
    Script("simulate_batching", "pimoe's batching beside others on the same arrivals, in virtual time", "--plot"),
    Script("footprint", "Start-up and memory", chart=None),
    Script("soak", "Twenty minutes of mixed work at 80% load: nothing may drift", limit_s=2700.0),
    Script("gpu", "pimoe.runtime on one GPU, experts in-process and in processes of their own", chart=None),
    # Long, and about switches rather than about promises.
    Script("engine_switches", "What the engine's switches cost and gain", chart=None, default=False),
    Script("compare_http_clients", "Which HTTP library carries tensors fastest", chart=None, default=False),
)


def run_script(script: Script, arguments: Sequence[str], folder: Path, scripts: Path = FOLDER) -> Outcome:
    """Run one script; its facts and its chart go into `folder`, its progress to our standard error.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    facts, chart = folder / f"{script.name}.json", folder / f"{script.name}.svg"
    charts = [] if script.chart is None else [script.chart, str(chart)]
    command = [sys.executable, str(scripts / f"{script.name}.py"), *arguments, "--json", str(facts), *charts]
    started = time.monotonic()
    said: deque[str] = deque(maxlen=_ERROR_LINES)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stderr is not None
    reader = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
    reader.start()
    with _ended(process):
        text, ending = _read(process, script.limit_s)
    reader.join(5.0)
    return Outcome(
        name=script.name,
        question=script.question,
        seconds=time.monotonic() - started,
        code=process.returncode,
        text=text,
        error="\n".join([*said, *ending]).replace(f"{FOLDER.parent}/", ""),  # nobody needs to know where it lies
        facts=_read_facts(facts),
        chart=chart.name if chart.exists() else None,
    )


def _read(process: subprocess.Popen[str], limit_s: float) -> tuple[str, list[str]]:
    """All of its standard output, and a line where it had to be stopped."""
    assert process.stdout is not None
    stopped: list[str] = []

    def stop() -> None:
        stopped.append(f"stopped: it took longer than {limit_s:g} s")
        _interrupt(process)

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()
    try:
        text = process.stdout.read()
        process.wait(_STOP_S)
    finally:
        timer.cancel()
    return text, stopped


def _interrupt(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C does, which the scripts clean up at; killed where that does not help."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        _kill_session(process)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens in the block, the process ends, and with it what it started in its session."""
    try:
        yield
    except BaseException:
        if process.poll() is None:
            _interrupt(process)
        raise
    finally:
        _kill_session(process)
        process.wait()


def _kill_session(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _pass_on(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        print(line, end="", file=sys.stderr, flush=True)
        last.append(line.rstrip("\n"))


def _read_facts(file: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return found
    return {}


def write(text: str, made: Path, target: Path) -> None:
    """Put the page and its charts and facts in place of those before: all of a run, or nothing."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=target) as near:
        fresh, old, draft = Path(near) / "new", Path(near) / "old", Path(near) / PAGE
        shutil.copytree(made, fresh)
        draft.write_text(text)
        with contextlib.suppress(FileNotFoundError):
            os.rename(target / CHARTS, old)
        os.rename(fresh, target / CHARTS)
        os.replace(draft, target / PAGE)


def run(options: argparse.Namespace, more: Sequence[str]) -> int:
    """Run what was asked for; the exit code."""
    wanted = [
        script for script in SCRIPTS if script.name in (options.only or [s.name for s in SCRIPTS if s.default])
    ]
    started = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        for index, script in enumerate(wanted):
            progress(f"{script.name}, {index + 1} of {len(wanted)}")
            outcome = run_script(script, ["--preset", options.preset, *more], Path(made))
            outcomes.append(outcome)
            if options.only:
                print(outcome.text, flush=True)
            if not outcome.succeeded:
                progress(f"{script.name} failed with exit code {outcome.code}")
        if not options.only:
            seconds = time.monotonic() - started
            whole = Run(options.preset, now(), seconds, revision(FOLDER.parent), outcomes)
            _publish(whole, Path(made), options.out)
    return int(not all(outcome.succeeded for outcome in outcomes))


def run_again(names: Sequence[str], target: Path) -> int:
    """Run scripts of the last whole run that failed there once more, and put what they give in its page, which
    says so; the exit code. What succeeded stays as it was: nothing is tried until it pleases."""
    files = target / CHARTS
    plain = json.loads((files / _RUN).read_text())
    whole = Run.from_plain(
        plain, {each["name"]: _read_facts(files / f"{each['name']}.json") for each in plain["outcomes"]}
    )
    failed = {each.name for each in whole.outcomes if not each.succeeded}
    if others := sorted(set(names) - failed):
        progress(f"did not fail: {', '.join(others)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="pimoe-bench-") as made:
        shutil.copytree(files, made, dirs_exist_ok=True)
        for script in (script for script in SCRIPTS if script.name in names):
            progress(f"{script.name}, again")
            for ending in ("json", "svg"):  # nothing of the run that failed
                (Path(made) / f"{script.name}.{ending}").unlink(missing_ok=True)
            outcome = run_script(script, ["--preset", whole.preset], Path(made))
            again = f"run again on {now()}, {revision(FOLDER.parent)}, after it failed in its turn"
            whole = whole.with_again(replace(outcome, again=again))
        _publish(whole, Path(made), target)
    return int(not all(outcome.succeeded for outcome in whole.outcomes))


def _publish(whole: Run, made: Path, out: str | Path | None) -> None:
    target = out
    if target is None and whole.preset == DEFAULT_PRESET:
        target = FOLDER
    text = page(whole, CHARTS)
    if target is None:
        print(text)  # a small run is no result: it must not replace one
        return
    (made / _RUN).write_text(json.dumps(whole.to_plain(), indent=1) + "\n")
    write(text, made, Path(target))
    progress(f"written: {Path(target) / PAGE}")


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    known = [script.name for script in SCRIPTS]
    command_line = argparse.ArgumentParser(description="Run the measuring stand and write its results.")
    command_line.add_argument("--preset", choices=["tiny", DEFAULT_PRESET], default=DEFAULT_PRESET)
    command_line.add_argument("--only", action="append", choices=known, help="print this one; may be repeated")
    command_line.add_argument("--again", action="append", choices=known, help="that failed; may be repeated")
    command_line.add_argument("--out", metavar="FOLDER", help=f"write {PAGE} and {CHARTS}/ there")
    command_line.add_argument("more", nargs="*", metavar="ARGS", help="with --only, after --: for the script")
    options = command_line.parse_args(arguments)
    if options.more and not options.only:
        command_line.error("arguments for a script need --only")
    if options.out and options.only:
        command_line.error("--only writes nothing: leave --out away")
    try:
        if options.again:
            return run_again(options.again, Path(options.out or FOLDER))
        return run(options, options.more)
    except KeyboardInterrupt:
        progress("interrupted: nothing is written")
        return 130


if __name__ == "__main__":
    # A shell without job control starts background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
