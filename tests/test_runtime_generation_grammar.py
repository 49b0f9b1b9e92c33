"""Structured output: whatever a random model wants, the answer matches and ends."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from grammars import EMBEDDED, EMBEDDED_END, EMBEDDED_VOCAB, compiled, generate, tokenizer_of, train_bpe
from pimoe.runtime.errors import InvalidRequestError, OverloadedError
from pimoe.runtime.generation import grammar as grammar_module
from pimoe.runtime.generation.grammar import GrammarMatcher
from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
from pimoe.runtime.generation.grammar_source import GrammarLimits
from pimoe.runtime.generation.sampler import sample
from pimoe.runtime.generation.sampling_state import SamplingState
from pimoe.runtime.requests import GrammarKind, SamplingParams
from samplers import state_of

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", 'a"b']}, "maxItems": 3},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "zip", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False}
    },
}
REGEXES = [r"[a-z]{1,12} [0-9]{4}-[0-9]{2}", "(ab|cd){2,5}é?", "(yes|no|maybe)[.!?]{1,3}", "\\{x{0,9}\\}"]
CHOICES = ["yes", "no", 'it\'s "x"\\', "é😀\n", "yes, but"]


class Model(NamedTuple):
    folder: Path
    vocab: int
    end_tokens: tuple[int, ...]
    compiler: GrammarCompiler


@pytest.fixture(params=["embedded", "bpe", "bpe without end tokens"])
async def model(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Model]:
    folder, vocab, end_tokens = EMBEDDED, EMBEDDED_VOCAB, EMBEDDED_END
    if request.param != "embedded":
        folder, (vocab, end_tokens) = tmp_path, train_bpe(tmp_path)
    if request.param == "bpe without end tokens":
        end_tokens = ()
    compiler = GrammarCompiler(folder, vocab, end_tokens)
    yield Model(folder, vocab, end_tokens, compiler)
    compiler.close()


async def answers(model: Model, kind: GrammarKind, source: str, count: int, **params: Any) -> list[str]:
    """Of a random model, at a temperature that leaves nothing probable."""
    texts = []
    for seed in range(count):
        matcher = await compiled(model.compiler, kind, source)
        wanted = SamplingParams(**{"temperature": 1.5, "seed": seed, **params})
        state = state_of(wanted, model.vocab, end_tokens=model.end_tokens, grammar=matcher)
        tokens = generate(state, model.vocab, seed, 3000)
        assert tokens is not None, "it never ended"
        texts.append(tokenizer_of(model.folder).decode(tokens, skip_special_tokens=True))
    return texts


async def test_answers_are_valid_by_the_schema(model: Model) -> None:
    for text in await answers(model, "json_schema", json.dumps(PERSON), 12):
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("regex", REGEXES)
async def test_answers_match_the_whole_expression(model: Model, regex: str) -> None:
    for text in await answers(model, "regex", regex, 6):
        assert re.fullmatch(regex, text), text


async def test_answers_are_one_of_the_choices(model: Model) -> None:
    texts = await answers(model, "choice", json.dumps(CHOICES), 30)
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) >= 3


async def test_answers_follow_a_lark_grammar(model: Model) -> None:
    source = 'start: sum\nsum: NUMBER ("+" NUMBER){0,4}\nNUMBER: /[1-9][0-9]{0,2}/'
    for text in await answers(model, "lark", source, 6):
        assert re.fullmatch(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){0,4}", text)


async def test_any_object_is_an_object_when_it_ends(model: Model) -> None:
    """A random model writes objects without end; one that likes closing brackets ends."""
    matcher = await compiled(model.compiler, "json_object", "")
    closing = [id for text, id in tokenizer_of(model.folder).get_vocab().items() if set(text) <= set('}]",')]
    params = SamplingParams(temperature=1.0, logit_bias=tuple((token, 12.0) for token in closing))
    state = state_of(params, model.vocab, end_tokens=model.end_tokens, grammar=matcher)
    tokens = generate(state, model.vocab, 1, 3000)
    assert tokens is not None
    assert isinstance(json.loads(tokenizer_of(model.folder).decode(tokens)), dict)


async def test_greedy_answers_and_penalised_ones_match_too(model: Model) -> None:
    strange = {"repetition_penalty": 5.0, "frequency_penalty": 2.0, "logit_bias": ((65, 100.0), (66, -100.0))}
    for params in (
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.01, **strange},
        {"temperature": 0.0, **strange},
    ):
        for text in await answers(model, "regex", REGEXES[0], 2, **params):
            assert re.fullmatch(REGEXES[0], text)


async def test_a_resumed_answer_goes_on_identically(model: Model) -> None:
    source, params = json.dumps(PERSON), SamplingParams(temperature=1.5, seed=3, frequency_penalty=0.5)

    async def tokens_after(emitted: list[int], count: int) -> list[int]:
        matcher = await compiled(model.compiler, "json_schema", source)
        state = state_of(params, model.vocab, emitted=emitted, end_tokens=model.end_tokens, grammar=matcher)
        tokens = list(emitted)
        while len(tokens) < count and not state.finished_by_grammar:
            logits = torch.randn(1, model.vocab, generator=torch.Generator().manual_seed(len(tokens))) * 3
            (token,), _ = sample(logits, [state], [len(tokens)])
            state.advance(token)
            tokens.append(token)
        assert state.error is None
        return tokens

    whole = await tokens_after([], 60)
    for at in (1, 7, len(whole) // 2, len(whole) - 1, len(whole)):
        assert await tokens_after(whole[:at], 60) == whole


async def test_emitted_tokens_that_do_not_match_are_refused(model: Model) -> None:
    matcher = await compiled(model.compiler, "regex", "[0-9]+")
    emitted = tokenizer_of(model.folder).encode("12x").ids
    with pytest.raises(InvalidRequestError, match="of emitted, does not match the grammar"):
        state_of(SamplingParams(), model.vocab, emitted=emitted, end_tokens=model.end_tokens, grammar=matcher)


async def test_each_row_has_its_own_grammar_or_none(model: Model) -> None:
    """And is what it is alone."""
    logits = torch.randn(4, model.vocab, generator=torch.Generator().manual_seed(1))
    sources = ["[0-9]+", None, "x+", "[^x]"]

    async def states() -> list[SamplingState]:
        matchers = [source and await compiled(model.compiler, "regex", source) for source in sources]
        params = [SamplingParams(temperature=0.0 if row < 2 else 1.0, logprobs=0) for row in range(4)]
        return [
            state_of(params[row], model.vocab, end_tokens=model.end_tokens, grammar=matchers[row] or None)
            for row in range(4)
        ]

    together, alone = await states(), await states()
    tokens, reports = sample(logits, together, range(4))
    texts = [tokenizer_of(model.folder).decode([token], skip_special_tokens=False) for token in tokens]
    assert texts[0].isdigit()
    assert tokens[1] == int(logits[1].argmax())
    assert set(texts[2]) == {"x"}
    for row in range(4):
        found = sample(logits[row : row + 1], [alone[row]], [row])
        assert found == ([tokens[row]], [reports[row]])
        report = reports[row]
        assert report is not None
        raw = torch.log_softmax(logits[row], dim=-1)
        assert report.logprob == pytest.approx(float(raw[tokens[row]])), "of all tokens, not of those allowed"


# What goes wrong.


@pytest.fixture
async def compiler() -> AsyncIterator[GrammarCompiler]:
    compiler = GrammarCompiler(EMBEDDED, EMBEDDED_VOCAB, EMBEDDED_END)
    yield compiler
    compiler.close()


def spell(matcher: GrammarMatcher, text: str) -> None:
    """Bytes are tokens here."""
    for byte in text.encode():
        matcher.accept(byte)


def next_bytes(matcher: GrammarMatcher) -> str:
    return bytes(matcher.allowed()[:256].nonzero()[0].tolist()).decode()


async def test_a_token_that_is_not_allowed_ends_in_an_error_once(compiler: GrammarCompiler) -> None:
    matcher = await compiled(compiler, "regex", "abc")
    spell(matcher, "ax")
    assert matcher.error is not None
    assert matcher.error.param == "grammar"
    assert "cannot follow the grammar" in matcher.error.message
    error = matcher.error
    spell(matcher, "b")
    assert matcher.error is error
    assert matcher.allowed().all()
    assert not matcher.finished


async def test_logits_of_nan_end_their_own_row_only(compiler: GrammarCompiler) -> None:
    matchers = [await compiled(compiler, "regex", "[ab]{2}") for _ in range(2)]
    states = [state_of(SamplingParams(), 258, end_tokens=(257,), grammar=matcher) for matcher in matchers]
    logits = torch.zeros(2, 258)
    logits[0] = math.nan
    for position in range(2):
        tokens, _ = sample(logits, states, [position] * 2)
        for state, token in zip(states, tokens, strict=True):
            state.advance(token)
    assert states[1].error is None
    assert states[1].finished_by_grammar


@pytest.fixture
async def cramped() -> AsyncIterator[GrammarCompiler]:
    """All matchers of one compiled grammar share its lexer's states, of which there are few here."""
    compiler = GrammarCompiler(EMBEDDED, EMBEDDED_VOCAB, EMBEDDED_END, GrammarLimits(max_states=1000))
    yield compiler
    compiler.close()


EXPLODING = "(a|b)*a(a|b){18}"


def wander(matcher: GrammarMatcher, seed: int, tokens: int) -> None:
    """Each seed needs states of its own."""
    numbers = random.Random(seed)
    for _ in range(tokens):
        matcher.allowed()
        spell(matcher, numbers.choice("ab"))


async def test_where_others_used_up_the_states_a_request_may_be_sent_again(cramped: GrammarCompiler) -> None:
    matchers = [await compiled(cramped, "regex", EXPLODING) for _ in range(12)]
    for seed, matcher in enumerate(matchers):
        wander(matcher, seed, 100)
    errors = [matcher.error for matcher in matchers]
    assert errors[0] is None
    assert isinstance(errors[-1], OverloadedError)
    assert errors[-1].retry_after_s is not None
    again = await compiled(cramped, "regex", EXPLODING)
    wander(again, 11, 100)
    assert again.error is None, "it shares nothing with those before"


async def test_a_step_compiles_nothing(cramped: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    matchers = [await compiled(cramped, "regex", EXPLODING) for _ in range(12)]
    monkeypatch.setattr(GrammarCompiler, "_compile_new", None)
    cramped.close()
    for seed, matcher in enumerate(matchers):
        wander(matcher, seed, 100)
    assert matchers[-1].error is not None


async def test_a_grammar_with_too_many_states_of_its_own_fails(cramped: GrammarCompiler) -> None:
    matcher = await compiled(cramped, "regex", EXPLODING)
    wander(matcher, 0, 3000)
    assert isinstance(matcher.error, InvalidRequestError)
    assert "too many" in matcher.error.message


async def test_emitted_tokens_may_be_replayed_later_where_others_used_up_the_states(
    cramped: GrammarCompiler,
) -> None:
    matchers = [await compiled(cramped, "regex", EXPLODING) for _ in range(12)]
    for seed, matcher in enumerate(matchers[:-1]):
        wander(matcher, seed, 100)
    numbers = random.Random(11)
    emitted = [ord(numbers.choice("ab")) for _ in range(100)]
    with pytest.raises(OverloadedError, match="try again"):
        state_of(SamplingParams(), EMBEDDED_VOCAB, emitted=emitted, grammar=matchers[-1])


async def test_a_generation_has_a_budget_for_its_grammar(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = await compiled(compiler, "regex", "[ab]*")
    times = itertools.count(0.0, 0.5)
    monkeypatch.setattr(grammar_module.time, "thread_time", lambda: next(times))
    for used in range(4):
        assert matcher.error is None, used
        matcher.allowed()
    matcher.allowed()
    assert matcher.error is not None
    assert "takes too long" in matcher.error.message


async def test_whitespace_ends(compiler: GrammarCompiler) -> None:
    matcher = await compiled(compiler, "json_object", "")
    spell(matcher, "{" + " " * 64)
    assert matcher.error is None
    assert next_bytes(matcher) == '"}'


async def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    matcher = await compiled(compiler, "regex", "(.|\\n)*")
    assert matcher.allowed()[256:].tolist() == [False, True], "the padding is not allowed, the end is"


async def test_tokens_left_out_come_back_where_there_are_no_others(compiler: GrammarCompiler) -> None:
    matcher = await compiled(compiler, "regex", "[ab]c")
    assert matcher.allowed(without=[ord("a"), ord("c")]).nonzero()[0].tolist() == [ord("b")]
    assert matcher.allowed(without=[ord("a"), ord("b")]).nonzero()[0].tolist() == [ord("a"), ord("b")]
