"""A grammar that does not end, or ends its process, or fails later, is the misfortune of its own request only."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from grammars import EMBEDDED, EMBEDDED_END, EMBEDDED_VOCAB, compiled
from pimoe.runtime.errors import InvalidRequestError, RequestCancelledError, UnavailableError
from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
from pimoe.runtime.generation.grammar_source import GrammarLimits
from pimoe.runtime.requests import GrammarKind


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def new(**limits: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(EMBEDDED, EMBEDDED_VOCAB, EMBEDDED_END, GrammarLimits(**limits)))
        return made[-1]

    yield new
    for compiler in made:
        compiler.close()


Make = Callable[..., GrammarCompiler]
# It compiles for minutes.
ENDLESS = json.dumps(
    {"type": "array", "prefixItems": [{"type": "integer", "multipleOf": 99_000 + i} for i in range(300)]}
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what another thread brings about
            await asyncio.sleep(0.005)


async def refusal(compiler: GrammarCompiler, kind: GrammarKind, source: str) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await compiled(compiler, kind, source)
    return caught.value.message


async def test_a_grammar_that_takes_too_long_is_refused_and_no_other_waits_for_it(make: Make) -> None:
    compiler = make(compile_s=0.5, max_compiling=1)
    endless = asyncio.create_task(refusal(compiler, "json_schema", ENDLESS))
    await until(lambda: bool(compiler._trials._busy))
    assert (await compiled(compiler, "regex", "a")).error is None
    assert "compiling it takes more than 0.5 s" in await endless


async def test_another_is_compiled_while_one_does_not_end(make: Make) -> None:
    compiler = make(compile_s=600)
    endless = asyncio.create_task(compiled(compiler, "json_schema", ENDLESS))
    await until(lambda: bool(compiler._trials._busy))
    assert (await compiled(compiler, "regex", "a")).error is None
    assert not endless.done()
    compiler.close()
    with pytest.raises(RequestCancelledError, match="shutting down"):
        await endless


async def test_closing_while_the_process_starts_is_no_failure_of_the_process(make: Make) -> None:
    compiler = make()
    started = asyncio.create_task(compiled(compiler, "regex", "a"))
    await until(lambda: any(not process.ready for process in compiler._trials._busy))
    compiler.close()
    with pytest.raises(RequestCancelledError, match="shutting down"):
        await started


async def test_a_refused_grammar_is_refused_again_without_a_look(make: Make) -> None:
    compiler = make(compile_s=0.5)
    first = await refusal(compiler, "json_schema", ENDLESS)
    compiler.close()  # nothing could look at it any more
    assert await refusal(compiler, "json_schema", ENDLESS) == first


async def test_a_refusal_is_forgotten(make: Make) -> None:
    compiler = make(refused_s=1e-9)
    await refusal(compiler, "regex", "(")
    compiler.close()
    with pytest.raises(RequestCancelledError):
        await compiled(compiler, "regex", "(")


async def test_a_grammar_that_ends_the_process_it_is_tried_in_is_refused(make: Make) -> None:
    compiler = make(compile_s=600)
    task = asyncio.create_task(refusal(compiler, "json_schema", ENDLESS))
    await until(lambda: any(process.ready for process in compiler._trials._busy))
    for process in compiler._trials._busy:
        process.kill()
    assert "the process that tried to compile it ended" in await task
    assert (await compiled(compiler, "regex", "a")).error is None, "in another process"


async def test_without_a_process_to_try_it_a_grammar_is_not_compiled(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(UnavailableError, match="no process to try grammars in: it cannot be started") as caught:
        await compiled(make(), "regex", "a")
    assert caught.value.retry_after_s is not None
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(UnavailableError, match="it does not start"):
        await compiled(make(), "regex", "a")


async def test_closing_ends_the_processes(make: Make) -> None:
    compiler = make()
    await compiled(compiler, "regex", "a")
    (process,) = compiler._trials._idle
    assert process._process.poll() is None
    compiler.close()
    assert process._process.poll() is not None


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_grammar_under_way_holds_up_nobodys_end(ending: str) -> None:
    """Neither the interpreter's nor, when that is killed, the end of the process that tries it."""
    script = textwrap.dedent("""
        import asyncio, os, pathlib, signal, sys
        from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
        from pimoe.runtime.generation.grammar_source import GrammarLimits

        async def main():
            compiler = GrammarCompiler(pathlib.Path(sys.argv[1]), 258, (257,), GrammarLimits(compile_s=10_000))
            compiling = asyncio.create_task(compiler.compile("json_schema", sys.argv[2], float("inf")))
            while not any(process.ready for process in compiler._trials._busy):
                await asyncio.sleep(0.01)
            print(*(process._process.pid for process in compiler._trials._busy), flush=True)
            ENDING

        asyncio.run(main())
    """).replace("ENDING", ending)
    command = [sys.executable, "-c", script, str(EMBEDDED), ENDLESS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == (-signal.SIGKILL if ending else 0), done.stderr
    pid = int(done.stdout)
    for _ in range(3000):
        if not alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError("it goes on alone")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


OPTIONAL: dict[str, Any] = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", json.dumps(OPTIONAL)),
        ("json_schema", json.dumps({"properties": {"a": OPTIONAL}, "required": ["a"], "type": "object"})),
        (
            "json_schema",
            json.dumps({"type": "array", "minItems": 2, "prefixItems": [{"pattern": "^a{350}$"}, OPTIONAL]}),
        ),
        ("regex", "[ab]a{1000000}"),
    ],
    ids=["properties", "inner properties", "later properties", "regex"],
)
async def test_what_fails_after_its_first_tokens_is_refused(make: Make, kind: GrammarKind, source: str) -> None:
    assert "too complex to be followed" in await refusal(make(), kind, source)


async def test_walks_of_a_trial_do_not_use_up_what_one_answer_may(make: Make) -> None:
    """All walks together take more states than there are, each alone does not."""
    assert (await compiled(make(max_states=600), "regex", "(a|b)*a(a|b){18}")).error is None


async def test_an_object_of_any_kind_needs_no_trial(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert (await compiled(make(), "json_object", "")).error is None


async def test_one_that_was_accepted_needs_no_second_trial(make: Make) -> None:
    compiler = make(max_copies=1)
    await compiled(compiler, "regex", "a")
    compiler._trials.close()
    assert (await compiled(compiler, "regex", "a")).error is None
    with pytest.raises(RequestCancelledError):
        await compiled(compiler, "regex", "b")


def test_the_process_needs_no_torch() -> None:
    script = "import sys, pimoe.runtime.generation.grammar_trial; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "False\n"
