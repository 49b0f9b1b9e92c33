"""Which grammars are accepted, what is told of the others, and that compiling is bounded in every way."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from grammars import EMBEDDED, EMBEDDED_END, EMBEDDED_VOCAB, compiled, train_bpe
from pimoe.runtime.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
)
from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
from pimoe.runtime.generation.grammar_source import GrammarLimits
from pimoe.runtime.requests import GrammarKind
from tokenizers import models


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def new(folder: Path = EMBEDDED, vocab: int = EMBEDDED_VOCAB, **limits: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(folder, vocab, EMBEDDED_END, GrammarLimits(**limits)))
        return made[-1]

    yield new
    for compiler in made:
        compiler.close()


Make = Callable[..., GrammarCompiler]


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "JSON schema is not accepted: EOF"),
        ("json_schema", "[]", "JSON schema is not accepted"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
        ("json_schema", '{"$ref": "http://example.com/x.json"}', "does not fetch"),
        ("json_schema", '{"$ref": "#"}', "not accepted"),
        ("json_schema", nested(2000), "recursion limit"),
        ("json_schema", '{"type": "string", "pattern": "("}', "regex"),
        ("regex", "[a", "regular expression is not accepted: .*unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(" * 2000 + "a" + ")" * 2000, "not accepted"),
        ("regex", "x" * 20_000, "it has 20000 bytes; at most 16384"),
        ("regex", "é" * 10_000, "it has 20000 bytes; at most 16384"),
        ("json_schema", json.dumps({"const": "x" * 70_000}), "it has 70013 bytes; at most 65536"),
        ("choice", "[]", "list of choices is not accepted: it must be a JSON list of strings"),
        ("choice", '["a", 1]', "JSON list of strings"),
        ("choice", '{"a": 1}', "JSON list of strings"),
        ("choice", "yes", "not accepted"),
        ("choice", "[" * 16_000, "JSON list of strings"),
        ("choice", '["\\ud800"]', "surrogates"),
        ("regex", "\ud800", "surrogates"),
        ("lark", "start: (", "Lark grammar is not accepted"),
        ("lark", "start: missing", 'unknown name: "missing"'),
        ("lark", "start: " + "(" * 8000 + '"a"' + ")" * 8000, "too deeply nested"),
    ],
)
async def test_what_is_not_accepted_is_refused_with_the_reason(
    make: Make, kind: GrammarKind, source: str, message: str
) -> None:
    compiler = make()
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await compiled(compiler, kind, source)
    assert caught.value.param == "grammar"
    assert len(caught.value.message) < 500
    assert (await compiled(compiler, "regex", "[0-9]")).error is None, "and the next one is served"


def test_the_deepest_grammars_that_fit_do_not_end_the_process() -> None:
    """In a process of its own: llguidance recurses once for each of thousands of rules."""
    script = textwrap.dedent("""
        import asyncio, json, pathlib, sys
        from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
        from pimoe.runtime.generation.grammar_source import GrammarLimits
        folder, limits = pathlib.Path(sys.argv[1]), GrammarLimits(compile_s=100)

        def lark(rule):
            limit = limits.max_grammar_bytes
            count = limit // len(rule % (4000, 4001)) - 3
            return "start: a0\\n" + "".join(rule % (i, i + 1) for i in range(count)) + 'a%d:"a"\\n' % count

        def terminals(rule):
            return lark(rule).replace("a", "A").replace("stArt", "start").replace('"A"', '"a"')

        def schema(definition):
            limit = limits.max_schema_bytes
            count = limit // len(json.dumps({"1000": definition % 1001})) - 20
            parts = ['"%d":%s' % (i, definition % (i + 1)) for i in range(count)]
            return '{"$ref":"#/$defs/0","$defs":{%s,"%d":{"type":"integer"}}}' % (",".join(parts), count)

        definitions = [
            '{"$ref":"#/$defs/%d"}',
            '{"items":{"$ref":"#/$defs/%d"}}',
            '{"anyOf":[{"$ref":"#/$defs/%d"}]}',
            '{"anyOf":[{"$ref":"#/$defs/%d"},{"type":"null"}]}',
            '{"allOf":[{"$ref":"#/$defs/%d"}]}',
            '{"properties":{"a":{"$ref":"#/$defs/%d"}}}',
        ]
        rules = ["a%d:a%d\\n", 'a%d:"x" a%d\\n', "a%d:a%d?\\n", "a%d:a%d*\\n"]
        grammars = [
            *(("json_schema", schema(definition)) for definition in definitions),
            *(("lark", lark(rule)) for rule in rules),
            *(("lark", terminals(rule)) for rule in ("a%d:a%d\\n", 'a%d:a%d "x"\\n')),
            ("regex", "(a|" * 200 + "b" + ")" * 200),
            ("regex", "a?" * 1000),
            ("choice", json.dumps(["a"] * 2000)),
        ]

        async def main():
            compiler = GrammarCompiler(folder, 258, (257,), limits)
            now = asyncio.get_running_loop().time
            for kind, source in grammars:
                try:
                    matcher = await compiler.compile(kind, source, now() + 100)
                    for _ in range(3):
                        allowed = matcher.allowed().nonzero()[0]
                        matcher.accept(int(allowed[0]))
                    outcome = "served"
                except Exception as error:
                    outcome = str(error)
                print(kind, len(source), outcome[:100], flush=True)
            compiler.close()
            print("alive")

        asyncio.run(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(EMBEDDED)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.endswith("alive\n"), (done.returncode, done.stdout, done.stderr)
    assert done.stdout.count("served") >= 8, done.stdout


async def test_equal_grammars_are_compiled_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compilations = make(), count_compilations(monkeypatch)
    first = await compiled(compiler, "regex", "[0-9]{2}")
    await asyncio.gather(*(compiled(compiler, "regex", "[0-9]{2}") for _ in range(5)))
    await asyncio.gather(*(compiled(compiler, "regex", "[a-z]{2}") for _ in range(5)))
    assert compilations == ["[0-9]{2}", "[a-z]{2}"]
    second = await compiled(compiler, "regex", "[0-9]{2}")
    first.accept(ord("1"))
    first.accept(ord("2"))
    assert first.finished
    assert not second.finished, "each request has its own place"


async def test_the_last_used_ones_are_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compilations = make(max_compiled=2), count_compilations(monkeypatch)
    for source in ("a", "b", "a", "c", "a", "b"):
        await compiled(compiler, "regex", source)
    assert compilations == ["a", "b", "c", "b"]


async def test_one_that_served_many_is_compiled_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compilations = make(max_copies=3), count_compilations(monkeypatch)
    for _ in range(7):
        await compiled(compiler, "regex", "a")
    assert compilations == ["a"] * 3


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compilations: list[str] = []
    compile_new = GrammarCompiler._compile_new

    def counted(self: GrammarCompiler, key: Any) -> Any:
        compilations.append(key.source)
        return compile_new(self, key)

    monkeypatch.setattr(GrammarCompiler, "_compile_new", counted)
    return compilations


class Held:
    """Compilations that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        compile_new = GrammarCompiler._compile_new

        def held(compiler: GrammarCompiler, key: Any) -> Any:
            self.begun.set()
            assert self.go.wait(60)
            return compile_new(compiler, key)

        monkeypatch.setattr(GrammarCompiler, "_compile_new", held)


async def test_the_loop_is_free_while_a_grammar_is_compiled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    task = asyncio.create_task(compiled(make(), "regex", "a"))
    await asyncio.to_thread(held.begun.wait, 60)
    assert not task.done()
    held.go.set()
    assert (await task).error is None


async def test_the_deadline_of_the_request_holds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with pytest.raises(DeadlineExceededError, match="while its grammar was compiled"):
        await make().compile("regex", "a", asyncio.get_running_loop().time() + 0.05)
    held.go.set()


async def test_so_many_wait_and_no_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held, compiler = Held(monkeypatch), make(max_waiting=2)
    tasks = [asyncio.create_task(compiled(compiler, "regex", source)) for source in "ab"]
    await asyncio.to_thread(held.begun.wait, 60)
    with pytest.raises(OverloadedError, match="too many requests wait"):
        await compiled(compiler, "regex", "c")
    held.go.set()
    await asyncio.gather(*tasks)
    assert (await compiled(compiler, "regex", "c")).error is None


async def test_a_cancelled_request_waits_no_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held, compiler = Held(monkeypatch), make(max_waiting=1)
    task = asyncio.create_task(compiled(compiler, "regex", "a"))
    await asyncio.to_thread(held.begun.wait, 60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    held.go.set()
    assert (await compiled(compiler, "regex", "b")).error is None


# Where there is no structured output.


async def test_without_llguidance_requests_are_told_what_is_missing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = make()
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"pimoe\[structured\] is not installed") as caught:
            await compiled(compiler, "regex", "a")
        assert caught.value.param == "grammar"


async def test_without_a_tokenizer_too(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"needs the model's tokenizer\.json, which is missing"):
        await compiled(make(tmp_path), "regex", "a")


@pytest.mark.parametrize("content", ["{}", "no JSON", "[]"])
async def test_a_tokenizer_that_is_none_is_no_reason_to_fail(make: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidRequestError, match="cannot be had with this model's tokenizer"):
        await compiled(make(tmp_path), "regex", "a")


async def test_a_tokenizer_that_llguidance_does_not_understand_is_told(make: Make, tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequestError, match="cannot be had with this model's tokenizer"):
        await make(tmp_path).load()


async def test_a_model_may_have_fewer_or_more_tokens_than_its_tokenizer(make: Make, tmp_path: Path) -> None:
    vocab, _ = train_bpe(tmp_path)
    for size in (vocab - 50, vocab, vocab + 3000):
        matcher = await compiled(make(tmp_path, size), "regex", "[a-z]+")
        allowed = matcher.allowed()
        assert allowed.shape == (size,)
        assert allowed.any()
        assert not allowed[vocab - 10 :].any()


def test_limits_are_checked_when_made() -> None:
    with pytest.raises(ConfigurationError, match=r"grammars\.max_states is 0; it must be above 0"):
        GrammarLimits(max_states=0)
    with pytest.raises(ConfigurationError, match="compile_s"):
        GrammarLimits(compile_s=math.nan)


async def test_a_closed_compiler_compiles_no_more_and_what_it_gave_goes_on(make: Make) -> None:
    compiler = make()
    matcher = await compiled(compiler, "regex", "a")
    compiler.close()
    assert matcher.allowed().nonzero()[0].tolist() == [ord("a")]
    matcher.accept(ord("x"))
    assert matcher.error is not None
    with pytest.raises(RequestCancelledError, match="shutting down"):
        await compiled(compiler, "regex", "b")
