"""Prompts of chats, remembered: exact keys, bounds, counts, threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.deployments.api.prompt_cache import Chat, ChatPrompts, PromptCache, PromptCacheLimits, cannot_fit
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.errors import ConfigurationError, InvalidRequestError
from pimoe.runtime.model.chat import ChatTemplate
from pimoe.runtime.model.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


class CountingCodec:
    """One token per byte, and how often it was asked."""

    def __init__(self) -> None:
        self.rendered = 0
        self.encoded: list[str] = []

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        self.encoded.append(text)
        return list(text.encode("utf-8", "surrogatepass"))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], /, variables: Mapping[str, Any] | None = None
    ) -> str:
        self.rendered += 1
        return repr((messages, variables))

    def render_unfinished_chat(
        self, messages: Sequence[Mapping[str, Any]], /, variables: Mapping[str, Any] | None = None
    ) -> str:
        return self.render_chat(messages, variables)[:-1]


def made(max_entries: int = 4096, max_bytes: int = 2**20, reads_clock: bool = False) -> tuple[Any, ChatPrompts]:
    codec = CountingCodec()
    return codec, ChatPrompts(codec, PromptCache(PromptCacheLimits(max_entries, max_bytes)), reads_clock)


def test_an_equal_chat_is_made_once() -> None:
    codec, prompts = made()
    first = prompts.token_ids(Chat(HELLO))
    again = prompts.token_ids(Chat([dict(HELLO[0])], {}))
    assert first is not None
    assert list(first) == list(again or ()) == list(repr((HELLO, None)).encode())
    assert (codec.rendered, len(codec.encoded)) == (1, 1)
    counts = prompts.cache.statistics()
    assert (counts.hits, counts.misses, counts.entries) == (1, 1, 1)
    assert counts.bytes >= 4 * len(first)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
chats = st.builds(
    Chat,
    st.lists(st.dictionaries(st.sampled_from(("role", "content", "tool_calls")), json_values), max_size=3),
    st.none() | st.dictionaries(st.sampled_from(("tools", "enable_thinking")), json_values, min_size=1),
    st.booleans(),
)


@given(st.lists(chats, max_size=8))
def test_whatever_was_asked_before_an_answer_is_what_a_new_cache_would_give(asked: list[Chat]) -> None:
    _, prompts = made(max_entries=4)
    for chat in asked:
        _, fresh = made()
        assert list(prompts.token_ids(chat) or ()) == list(fresh.token_ids(chat) or ())


def test_order_and_kind_of_values_are_part_of_the_key() -> None:
    codec, prompts = made()
    tools: list[Any] = [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": True, "b": 2}, {"a": 1.0, "b": 2}, {"a": "1"}]
    for tool in tools:
        prompts.token_ids(Chat(HELLO, {"tools": tool}))
    assert codec.rendered == len(tools)


def test_what_json_cannot_say_is_made_each_time() -> None:
    codec, prompts = made()
    odd = Chat([{"role": "user", "content": "\ud800"}])
    assert prompts.token_ids(odd)
    assert prompts.token_ids(odd)
    assert codec.rendered == 2
    assert prompts.cache.statistics().entries == 0
    assert prompts.text_tokens(["\ud800"]) == prompts.text_tokens(["\ud800"]) == 3


def test_a_template_that_reads_the_clock_is_rendered_each_time_and_tokenized_once() -> None:
    codec, prompts = made(reads_clock=True)
    for _ in range(3):
        prompts.token_ids(Chat(HELLO))
    assert (codec.rendered, len(codec.encoded)) == (3, 1)
    source = "{{ strftime_now('%H:%M') }}{{ messages[0].content }}"
    assert ChatTemplate(source, {}, "test").reads_clock
    assert not ChatTemplate("{{ messages[0].content }}", {}, "test").reads_clock


def test_texts_too_long_to_matter_are_not_tokenized() -> None:
    codec, prompts = made()
    assert prompts.token_ids(Chat([{"content": "x" * 300}]), max_tokens=1) is None
    assert prompts.token_ids(Chat(HELLO), max_tokens=0, whole=False) is None
    assert not codec.encoded
    assert prompts.token_ids(Chat(HELLO)) is not None
    assert prompts.token_ids(Chat(HELLO), max_tokens=0) is not None, "what is known costs nothing"


class MeasuringCodec(CountingCodec):
    """Knows that no token is longer than two characters."""

    def fewest_tokens(self, text: str, /) -> int:
        return -(-len(text) // 2)


def test_a_tokenizer_that_knows_its_longest_token_refuses_before_it_tokenizes() -> None:
    codec = MeasuringCodec()
    prompts = ChatPrompts(codec)
    text = codec.render_chat(HELLO)
    assert prompts.token_ids(Chat(HELLO), max_tokens=len(text) // 2 - 1) is None
    assert not codec.encoded
    assert prompts.token_ids(Chat(HELLO), max_tokens=-(-len(text) // 2)) is not None, "it might fit"


def test_what_is_cut_afterwards_may_be_longer_than_what_fits() -> None:
    codec = MeasuringCodec()
    assert cannot_fit("aaaaa", codec, 2)
    assert not cannot_fit("aaaa", codec, 2)
    assert not cannot_fit("aaaaa", codec, 2, whole=False)
    assert cannot_fit("a" * 513, codec, 2, whole=False)


def test_counts_of_texts_are_no_prompts() -> None:
    codec, prompts = made()
    assert prompts.text_tokens(["hello"]) == prompts.text_tokens(["hello"]) == 5
    assert codec.encoded == ["hello"]


def test_only_so_much_text_is_counted_at_once() -> None:
    codec, prompts = made()
    assert prompts.text_tokens(["aaaa", "bbbb"], max_chars=7) is None
    assert prompts.text_tokens(["aaaa", "bbbb"], max_chars=7) == 8, "the first was counted before"
    assert codec.encoded == ["aaaa", "bbbb"]
    assert prompts.text_tokens([], max_chars=0) == 0


def test_a_refusal_is_not_remembered() -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    prompts = ChatPrompts(tokenizer)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="role user"):
            prompts.token_ids(Chat([{"role": "system", "content": "x"}]))
    assert prompts.cache.statistics().entries == 0


def test_the_least_recently_used_goes_first() -> None:
    cache = PromptCache(PromptCacheLimits(max_entries=3))
    for number in range(3):
        cache.put(bytes([number]), number)
    assert cache.get(b"\0") == 0
    cache.put(b"\3", 3)
    assert [cache.get(bytes([number])) for number in range(4)] == [0, None, 2, 3]
    assert cache.statistics()[:4] == (4, 1, 1, 3)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 400)), max_size=60), st.integers(0, 20_000))
def test_bytes_and_entries_stay_within_their_bounds(puts: list[tuple[int, int]], max_bytes: int) -> None:
    _, prompts = made(max_entries=5, max_bytes=max_bytes)
    for number, size in puts:
        prompts.token_ids(Chat([{"role": "user", "content": f"{number} " * size}]))
        counts = prompts.cache.statistics()
        assert counts.bytes <= max_bytes
        assert counts.entries <= 5
        assert (counts.bytes == 0) == (counts.entries == 0)
    counts = prompts.cache.statistics()
    assert counts.hits + counts.misses == len(puts)


def test_nothing_is_kept_where_nothing_may_be() -> None:
    codec, prompts = made(max_entries=0)
    assert prompts.token_ids(Chat(HELLO)) == prompts.token_ids(Chat(HELLO))
    assert codec.rendered == 2


@pytest.mark.parametrize("wrong", [{"max_entries": -1}, {"max_bytes": 1.5}, {"max_bytes": True}])
def test_wrong_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        PromptCacheLimits(**wrong)


def test_many_threads_count_right() -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    prompts = ChatPrompts(tokenizer, PromptCache(PromptCacheLimits(max_entries=8)))
    wanted = {number: tokenizer.encode(f"add: {number}\n", add_special_tokens=False) for number in range(24)}

    def ask(number: int) -> bool:
        chat = Chat([{"role": "user", "content": f"add: {number % 24}"}])
        return list(prompts.token_ids(chat) or ()) == wanted[number % 24]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(800)))
    counts = prompts.cache.statistics()
    assert counts.hits + counts.misses == 800
    assert counts.entries == 8


def test_the_embedded_checkpoint_has_no_clock(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    assert tokenizer is not None
    assert not tokenizer.chat_reads_clock
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((CHECKPOINT / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    dated = Tokenizer.load(tmp_path)
    assert dated is not None
    assert dated.chat_reads_clock


def test_special_tokens_are_added_where_asked_for_and_only_there() -> None:
    class Adding(CountingCodec):
        def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
            return [256] * add_special_tokens + list(text.encode())

    for reads_clock in (False, True):
        prompts = ChatPrompts(Adding(), reads_clock=reads_clock)
        for _ in range(2):
            plain, special = (prompts.token_ids(Chat(HELLO, special=special)) for special in (False, True))
            assert plain is not None
            assert special is not None
            assert list(special) == [256, *plain]
