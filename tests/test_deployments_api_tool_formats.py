"""Tool calls read out of answers: each format exactly, cut at every place, broken off at every place."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.deployments.api.openai_tools import Tools
from pimoe.deployments.api.tool_formats import FORMATS, Parser, Part, ToolSet, format_of
from pimoe.runtime.model.tokenizer import Tokenizer
from scripted_chat import END, make_tokenizer

TOOLS = ToolSet(
    {
        "weather": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "zip": {"type": "string"}},
        },
        "now": {},
    }
)
BY_NAME = {format.name: format for format in FORMATS}

Answer = tuple[str, str, list[tuple[str, str]]]  # content, reasoning, calls with their arguments


def added_up(parts: list[Part]) -> Answer:
    """Parts as whoever streams them adds them up; calls must be opened once, in order, with a name."""
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        content += part.content
        reasoning += part.reasoning
        if part.name is not None:
            assert part.call == len(calls)
            calls.append((part.name, ""))
        if part.arguments:
            assert part.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return content, reasoning, calls


def read(name: str, pieces: list[str]) -> Answer:
    parser: Parser = BY_NAME[name].parser(TOOLS)
    return added_up([part for piece in pieces for part in parser.push(piece)] + parser.finish())


PARIS = '{"city": "Pa\\"r{is}", "days": 2}'
DS_ONE = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + PARIS + "\n```<｜tool▁call▁end｜>"
DS31_ONE = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + PARIS + "<｜tool▁call▁end｜>"
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\nnord\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=zip>\n75001\n</parameter>\n</function>\n</tool_call>"
)
NOW: Answer = ("", "", [("now", "{}")])
CASES: dict[str, tuple[str, str, Answer]] = {
    "hermes one": (
        "hermes",
        f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>',
        ("", "", [("weather", PARIS)]),
    ),
    "hermes text and two": (
        "hermes",
        f'I look.\n\n<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>\n'
        '<tool_call>\n{"name": "now"}\n</tool_call>\n and that is all. ',
        ("I look.and that is all. ", "", [("weather", PARIS), ("now", "{}")]),
    ),
    "hermes arguments as text": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", "", [("now", '{"a": 1}')]),
    ),
    "hermes arguments null": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": null, "id": 3}</tool_call>',
        ("", "", [("now", "{}")]),
    ),
    "hermes no call": ("hermes", "a <tool> < b\n\n", ("a <tool> < b\n\n", "", [])),
    "hermes junk": (
        "hermes",
        'x <tool_call>\nnot json\n</tool_call> y <tool_call>{"name": "now"}</tool_call>',
        ("x<tool_call>\nnot json\n</tool_call> y", "", [("now", "{}")]),
    ),
    "mistral list": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        ("", "", [("weather", PARIS), ("now", "{}")]),
    ),
    "mistral names": (
        "mistral",
        f"Let me see.[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{{}}",
        ("Let me see.", "", [("weather", PARIS), ("now", "{}")]),
    ),
    "mistral bare names": ("mistral", f"[TOOL_CALLS]weather{PARIS}", ("", "", [("weather", PARIS)])),
    "mistral text": ("mistral", "[1, 2] and [TOOL", ("[1, 2] and [TOOL", "", [])),
    "llama one": ("llama", f'{{"name": "weather", "parameters": {PARIS}}}', ("", "", [("weather", PARIS)])),
    "llama tag and two": (
        "llama",
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {PARIS}}}; '
        '{"name": "now", "parameters": {}}',
        ("", "", [("weather", PARIS), ("now", "{}")]),
    ),
    "llama other json": (
        "llama",
        '{"name": "Bob", "age": 3} {"name": 1}',
        ('{"name": "Bob", "age": 3} {"name": 1}', "", []),
    ),
    "llama a name is no call": ("llama", ' {"name": "Bob"}', ('{"name": "Bob"}', "", [])),
    "llama text": ("llama", ' I say {"a": 1}', (' I say {"a": 1}', "", [])),
    "deepseek v3": (
        "deepseek",
        f"<｜tool▁calls▁begin｜>{DS_ONE}\n{DS_ONE}<｜tool▁calls▁end｜>",
        ("", "", [("weather", PARIS)] * 2),
    ),
    "deepseek v3.1": (
        "deepseek",
        f"I look.<｜tool▁calls▁begin｜>{DS31_ONE}{DS31_ONE}<｜tool▁calls▁end｜>",
        ("I look.", "", [("weather", PARIS)] * 2),
    ),
    "deepseek text": ("deepseek", "a <｜tool b", ("a <｜tool b", "", [])),
    "harmony": (
        "harmony",
        "<|channel|>analysis<|message|>I think <b>.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello < you",
        ("Hello < you", "I think <b>.", []),
    ),
    "harmony calls": (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{PARIS}<|call|>"
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
        ("I look.", "Hm.", [("weather", PARIS), ("now", "{}")]),
    ),
    "harmony without channels": ("harmony", "plain", ("plain", "", [])),
    "qwen3-coder": (
        "qwen3-coder",
        f"So:\n{CODER}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        ("So:", "", [("weather", '{"city":"Paris\\nnord","days":2,"zip":"75001"}'), ("now", "{}")]),
    ),
    "hermes half a character": (
        "hermes",
        '<tool_call>{"name": "n\\ud800\\ud83d\\ude00", "arguments": {"a": "\\udc00"}}</tool_call>',
        ("", "", [("n\ufffd😀", '{"a": "\\udc00"}')]),
    ),
    "hermes half a character in text": (
        "hermes",
        '<tool_call>{"arguments": "{\\"a\\": \\"\\udc00\\"}", "name": "now"}</tool_call>',
        ("", "", [("now", '{"a": "\ufffd"}')]),
    ),
    "hermes arguments twice": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": 1}, "parameters": [2], "arguments": 3}</tool_call>',
        ("", "", [("now", '{"a": 1}')]),
    ),
    "hermes empty text": ("hermes", '<tool_call>{"name": "now", "arguments": ""}</tool_call>', NOW),
    "mistral list as arguments": (
        "mistral",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": [1]}]',
        ('{"name": "now", "arguments": [1]}]', "", [("now", "{}")]),
    ),
    "mistral no name": ("mistral", '[TOOL_CALLS][{"name": ""}]', ('{"name": ""}]', "", [])),
    "mistral named list": (
        "mistral",
        '[TOOL_CALLS]now[ARGS][{"a": 1}] [TOOL_CALLS]now[ARGS] {}',
        ('[TOOL_CALLS]now[ARGS][{"a": 1}]', "", [("now", "{}")]),
    ),
    "llama no name": ("llama", '{"name": " ", "parameters": {}}', ('{"name": " ", "parameters": {}}', "", [])),
    "llama list": ("llama", '{"name": "f", "parameters": [{}]}', ('{"name": "f", "parameters": [{}]}', "", [])),
    "deepseek list, then a call": (
        "deepseek",
        f'<｜tool▁call▁begin｜>weather<｜tool▁sep｜>[{{"a": 1}}]<｜tool▁call▁end｜>{DS31_ONE}',
        (
            '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>[{"a": 1}]<｜tool▁call▁end｜>',
            "",
            [("weather", PARIS)],
        ),
    ),
    "deepseek v3 list": (
        "deepseek",
        DS_ONE.replace(PARIS, "[1]") + DS_ONE,
        (DS_ONE.replace(PARIS, "[1]"), "", [("weather", PARIS)]),
    ),
    "deepseek no name": (
        "deepseek",
        "<｜tool▁call▁begin｜> <｜tool▁sep｜>{}",
        ("<｜tool▁call▁begin｜> <｜tool▁sep｜>{}", "", []),
    ),
    "harmony list": (
        "harmony",
        "<|channel|>commentary to=functions.now<|message|> [1, 2]<|end|><|channel|>final<|message|>So.",
        ("<|channel|>commentary to=functions.now<|message|>[1, 2]So.", "", []),
    ),
    "harmony nothing": ("harmony", "<|channel|>commentary to=functions.now<|message|><|call|>", NOW),
    "qwen3-coder no name": (
        "qwen3-coder",
        "<tool_call><function=></function></tool_call>",
        ("<tool_call><function=></function></tool_call>", "", []),
    ),
    "qwen3-coder nested deeper than it can be written": (
        "qwen3-coder",
        f"<tool_call><function=now><parameter=days>{'[' * 300 + ']' * 300}</parameter></function></tool_call>",
        ("", "", [("now", f'{{"days":"{"[" * 300 + "]" * 300}"}}')]),
    ),
    "qwen3-coder junk": ("qwen3-coder", "<tool_call>x</tool_call>", ("<tool_call>x</tool_call>", "", [])),
}


NO_CALLS = [
    '{"name": "", "arguments": {}}',
    '{"name": " ", "arguments": {}}',
    '{"arguments": {}, "name": ""}',
    '{"name": "now", "arguments": [{"a": 1}]}',
    '{"arguments": [], "name": "now"}',
    '{"name": "now", "arguments": "[1]"}',
    '{"name": "now", "arguments": "{} {}"}',
    '{"name": "now", "arguments": 5}',
    '{"name": "now", "arguments": nil}',
    '{"name": "now", "arguments": true }',
]
CASES |= {
    f"hermes none {at}": ("hermes", f"<tool_call>{call}</tool_call>", (f"<tool_call>{call}</tool_call>", "", []))
    for at, call in enumerate(NO_CALLS)
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, str, Answer]:
    return CASES[request.param]


def test_whole(case: tuple[str, str, Answer]) -> None:
    name, text, expected = case
    assert read(name, [text]) == expected


def test_character_by_character(case: tuple[str, str, Answer]) -> None:
    name, text, expected = case
    assert read(name, list(text)) == expected


def test_cut_at_every_place(case: tuple[str, str, Answer]) -> None:
    name, text, expected = case
    for at in range(len(text) + 1):
        assert read(name, [text[:at], text[at:]]) == expected, at
    places = range(0, len(text) + 1, 1 + len(text) // 40)
    for first, second in combinations(places, 2):
        assert read(name, [text[:first], text[first:second], text[second:]]) == expected, (first, second)


def spans(text: str, mark: str) -> list[tuple[int, int]]:
    return [(at, at + len(mark)) for at in range(len(text)) if text.startswith(mark, at)]


def test_broken_off_at_every_place_it_gives_a_beginning(case: tuple[str, str, Answer]) -> None:
    """Of the calls that the whole gives; a last one may lack characters, never have others."""
    name, text, (_, reasoning, calls) = case
    marks = [span for mark in BY_NAME[name].special for span in spans(text, mark)]
    for at in range(len(text)):
        if any(start < at < end for start, end in marks):  # a special token comes whole
            continue
        whole = read(name, [text[:at]])
        assert whole == read(name, list(text[:at])), at
        assert reasoning.startswith(whole[1])
        assert len(whole[2]) <= len(calls)
        for (function, begun), (expected, arguments) in zip(whole[2], calls, strict=False):
            assert function == expected
            assert arguments.startswith(begun) or begun == "{}"


def test_arguments_are_given_as_they_come() -> None:
    for name in ("hermes one", "mistral list", "mistral names", "llama one", "deepseek v3", "deepseek v3.1"):
        format, text, _ = CASES[name]
        parser = BY_NAME[format].parser(TOOLS)
        end = text.index('"days"')
        before = added_up([part for char in text[:end] for part in parser.push(char)])
        assert before[2] == [("weather", PARIS[: PARIS.index('"days"')])]


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(BY_NAME)),
    st.lists(
        st.sampled_from(
            [
                *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", '{"name"', ": ", '"f"', "}", "{", "]"),
                *(', "arguments": ', ', "parameters": ', "\n", " ", ";", "<", "x", "\\", '"', "[", "null"),
                *("<|channel|>", "final", "analysis", " to=functions.f", "<|message|>", "<|end|>", "<|start|>"),
                *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
                *("<function=f>", "<parameter=k>", "</parameter>", "</function>", "function", "<|python_tag|>"),
            ]
        ),
        max_size=14,
    ),
    st.data(),
)
def test_anything_at_all_reads_the_same_however_it_is_cut(name: str, words: list[str], data: Any) -> None:
    text = "".join(words)
    expected = read(name, [text])
    assert read(name, list(text)) == expected
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
    assert read(name, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == expected


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.text() | st.integers(), st.lists), max_size=3)
)
def test_any_arguments_pass_through(arguments: dict[str, Any]) -> None:
    for name in ("hermes", "mistral", "llama", "deepseek", "harmony"):
        for ascii in (True, False):
            given = json.dumps(arguments, ensure_ascii=ascii)
            written = {
                "hermes": f'<tool_call>{{"name": "f", "arguments": {given}}}</tool_call>',
                "mistral": f'[TOOL_CALLS][{{"name": "f", "arguments": {given}}}]',
                "llama": f'{{"name": "f", "parameters": {given}}}',
                "deepseek": f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{given}<｜tool▁call▁end｜>",
                "harmony": f"<|channel|>commentary to=functions.f<|message|>{given}",
            }[name]
            if any(mark in given for mark in BY_NAME[name].special):
                continue
            assert read(name, list(written))[2] == [("f", given)]


TEMPLATES = {
    "hermes": '{% if tools %}<tool_call>\n{"name": <function-name>}\n</tool_call>{% endif %}',
    "qwen3-coder": "<tool_call>\n<function=example>\n<parameter=p>",
    "mistral": "{{ '[TOOL_CALLS]' }}",
    "llama": '<|start_header_id|>{"name": function name, "parameters": dictionary}',
    "deepseek": "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}",
    "harmony": "<|start|>assistant<|channel|>final<|message|>",
}


def test_templates_tell_their_format() -> None:
    for name, template in TEMPLATES.items():
        found = format_of(template)
        assert found is not None
        assert found.name == name
    assert format_of("{{ messages[0].content }}") is None


def test_ids_are_what_templates_accept() -> None:
    seed = "0123456789abcdef" * 2
    assert BY_NAME["mistral"].call_id(seed) == "012345678"
    assert BY_NAME["hermes"].call_id(seed) == "call_" + seed[:24]


# Forced calls, as llguidance reads their grammars

FORCED = ToolSet(TOOLS.parameters, ("weather", "now"))
ANSWERS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "P"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "P"}}]',
    "llama": '{"name": "weather", "parameters": {"city": "P"}}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "P"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "harmony": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "P"}',
    "mistral by name": '[TOOL_CALLS]weather[ARGS]{"city": "P"}',
    "deepseek v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "P"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}
TEMPLATE_OF = {"mistral by name": "[TOOL_CALLS][ARGS]", "deepseek v3": "<｜tool▁call▁begin｜>```json"}


class Grammar:
    """The grammar of a format's forced calls, for a tokenizer that has its marks as tokens, special or not."""

    def __init__(self, folder: Path, name: str, tools: ToolSet) -> None:
        format = BY_NAME[name.split()[0]]
        self.tokenizer = make_tokenizer(folder, None)
        grammar = Tools(known=tools, format=format).grammar(
            WithTemplate(self.tokenizer, TEMPLATE_OF.get(name, ""))
        )
        assert grammar is not None
        end = self.tokenizer.added_token_id(END)
        tokens = llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=end)
        self._matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not self._matcher.get_error()

    def accepts(self, text: str) -> bool:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        matcher = self._matcher.deep_copy()
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


class WithTemplate:
    """A tokenizer with the text of another chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        self.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("name", ANSWERS)
def test_forced_calls_are_what_the_format_reads(tmp_path: Path, name: str) -> None:
    one = ANSWERS[name]
    assert read(name.split()[0], [one])[2] == [("weather", '{"city": "P"}')]
    grammar = Grammar(tmp_path, name, FORCED)
    assert grammar.accepts(one)
    assert grammar.accepts(one.replace("weather", "now"))
    assert not grammar.accepts("It is fine.")
    assert not grammar.accepts(one.replace("weather", "other"))
    assert not grammar.accepts(one.replace('"P"', "5"))
    assert not grammar.accepts(one[:-1])


def test_forced_calls_in_one_answer(tmp_path: Path) -> None:
    one = ANSWERS["hermes"]
    assert Grammar(tmp_path, "hermes", FORCED).accepts(f"{one}\n{one}")
    alone = ToolSet(TOOLS.parameters, ("now",), parallel=False)
    assert not Grammar(tmp_path, "hermes", alone).accepts(f"{one}\n{one}".replace("weather", "now"))
    assert not Grammar(tmp_path, "hermes", alone).accepts(one)
    two = '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {"x": [1, 2]}}'
    assert Grammar(tmp_path, "llama", FORCED).accepts(two)
    assert read("llama", [two])[2] == [("now", "{}"), ("now", '{"x": [1, 2]}')]
    many = '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'
    assert Grammar(tmp_path, "mistral", FORCED).accepts(many)
