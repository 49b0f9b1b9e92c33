"""Tokenizers: text there and back, streamed and at once, and conversations as prompts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.errors import CheckpointError, InvalidRequestError
from pimoe.runtime.model.detokenizer import byte_alphabet
from pimoe.runtime.model.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

TEXT = st.text(alphabet=st.one_of(st.sampled_from("ab é€😀\n▁�"), st.characters(codec="utf-8")), max_size=30)


def byte_level() -> Backend:
    """Like Qwen's: bytes, some merged across the borders of characters, special and plain added tokens."""
    letters = list(byte_alphabet())
    pairs = [("â", "Ĥ"), ("Ĥ", "¬"), ("¬", "â"), ("Ġ", "a")]
    vocabulary = {token: index for index, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs[:1] + pairs[3:]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens(["<think> now"])
    return backend


def sentence_piece(decoder: Any) -> Backend:
    """Like Mixtral's: words with their space in front, and bytes for what is in no word."""
    words = ["▁", "▁a", "a", "b", "▁▁", "c", "▁ab", ",", "\n"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: 259 + index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "▁"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
BACKENDS = {
    "byte level": byte_level(),
    "llama": sentence_piece(LLAMA_DECODER),
    "metaspace": sentence_piece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=list(BACKENDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Backend]:
    backend = BACKENDS[request.param]
    return load(save(tmp_path_factory.mktemp("tokenizer"), backend)), backend


@given(data=st.data())
def test_streamed_text_adds_up_to_the_text_decoded_at_once(pair: tuple[Tokenizer, Backend], data: Any) -> None:
    """For any ids, well-formed or not, however they are cut into pushes."""
    tokenizer, backend = pair
    near_bytes = st.sampled_from([*range(0xE2 - 40, 0xE2 + 30), *range(backend.get_vocab_size() - 12, 420)])
    ids = data.draw(st.lists(st.one_of(near_bytes, st.integers(0, backend.get_vocab_size() + 3)), max_size=40))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=5)) | {0, len(ids)})
    stream = tokenizer.incremental()
    text = "".join(stream.push(ids[a:b]) for a, b in pairwise(cuts)) + stream.finish()
    assert text == tokenizer.decode(ids)


@given(text=TEXT, special=st.booleans(), names=st.lists(st.sampled_from(["<|end|>", "</s>", "<think> now"])))
def test_long_texts_are_encoded_and_decoded_as_short_ones_are(
    pair: tuple[Tokenizer, Backend], text: str, special: bool, names: list[str]
) -> None:
    tokenizer, backend = pair
    unit = text + "".join(names) or "a"
    long = unit * (1 + 1100 // len(unit))
    ids = tokenizer.encode(long, add_special_tokens=special)
    assert ids == backend.encode(long, add_special_tokens=special).ids
    for skip in (True, False):
        assert tokenizer._decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


def test_other_threads_go_on_while_a_long_text_is_encoded(pair: tuple[Tokenizer, Backend]) -> None:
    """The library holds the interpreter lock throughout `encode` and `decode`, but not for batches."""
    tokenizer, _ = pair
    text, done, counts = "ab a " * 200_000, threading.Event(), []

    def count() -> None:
        while not done.is_set():
            counts.append(None)
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = len(counts)
        ids = tokenizer.encode(text)
        encoded = len(counts)
        tokenizer._decode(ids, False)
        decoded = len(counts)
    finally:
        done.set()
        counter.join()
    assert encoded - before > 10
    assert decoded - encoded > 10


@given(text=TEXT, extra=st.lists(st.sampled_from(["<|end|>", "</s>", "<think> now", "e\u0301", "ﷺ", "각", "▁▁"])))
def test_no_text_has_fewer_tokens_than_is_said(
    pair: tuple[Tokenizer, Backend], text: str, extra: list[str]
) -> None:
    tokenizer, _ = pair
    for part in (text, *extra, text + "".join(extra)):
        assert tokenizer.fewest_tokens(part) <= len(tokenizer.encode(part, add_special_tokens=False))
    assert tokenizer.fewest_tokens("a" * 1100) >= 100, "the longest token has 11 characters"


@given(text=TEXT)
def test_encoded_text_decodes_as_the_library_does(pair: tuple[Tokenizer, Backend], text: str) -> None:
    tokenizer, backend = pair
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)
    stream = tokenizer.incremental()
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) + stream.finish() == backend.decode(ids, skip_special_tokens=True)
    if "�" not in text:
        assert not [piece for piece in pieces if "�" in piece]


@given(ids=st.lists(st.integers(0, 261), max_size=60))
def test_byte_level_decoding_is_that_of_the_library_even_for_bad_bytes(ids: list[int]) -> None:
    backend = BACKENDS["byte level"]
    tokenizer = Tokenizer(backend, byte_level=True, template=None)
    stream = tokenizer.incremental()
    assert stream.push(ids) + stream.finish() == backend.decode(ids, skip_special_tokens=True)


def test_a_character_appears_when_its_last_byte_does(pair: tuple[Tokenizer, Backend]) -> None:
    tokenizer, _ = pair
    stream = tokenizer.incremental()
    ids = tokenizer.encode("b😀", add_special_tokens=False)
    pieces = [stream.push([token]) for token in ids]
    assert pieces[-4:] == ["", "", "", "😀"]
    assert stream.finish() == ""


def test_endless_bad_bytes_are_not_held_back_forever(pair: tuple[Tokenizer, Backend]) -> None:
    tokenizer, backend = pair
    stray = backend.token_to_id("<0x80>") or backend.token_to_id("Ģ")
    assert stray is not None
    stream = tokenizer.incremental()
    assert "".join(stream.push([stray]) for _ in range(100)).count("�") > 80


def test_context_keeps_the_space_of_the_first_word() -> None:
    tokenizer = Tokenizer(BACKENDS["llama"], byte_level=False, template=None)
    word, space = tokenizer.encode("ab", add_special_tokens=False)[0], "▁ab"
    assert BACKENDS["llama"].id_to_token(word) == space
    assert tokenizer.incremental().push([word]) == "ab"
    assert tokenizer.incremental(context=[1, word]).push([word, word]) == " ab ab"


def test_text_of_single_tokens(pair: tuple[Tokenizer, Backend]) -> None:
    tokenizer, backend = pair
    space_a = backend.token_to_id("Ġa") or backend.token_to_id("▁a")
    byte = backend.token_to_id("â") or backend.token_to_id("<0xE2>")
    special = backend.token_to_id("<|end|>") or backend.token_to_id("</s>")
    assert space_a is not None
    assert byte is not None
    assert special is not None
    assert tokenizer.token_text(space_a) == " a"
    assert tokenizer.token_text(byte) == "�"
    assert tokenizer.token_text(special) == backend.id_to_token(special)
    assert tokenizer.token_text(backend.get_vocab_size() + 5) == ""
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_special_tokens_are_added_once() -> None:
    tokenizer = Tokenizer(BACKENDS["llama"], byte_level=False, template=None)
    assert tokenizer.encode("a")[0] == 1
    assert 1 not in tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("<s>a", add_special_tokens=False).count(1) == 1


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    tokenizer = load(save(tmp_path, backend))
    assert len(tokenizer.encode("bbbbb")) == 5


def test_absent_and_broken_files(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Magic"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        Tokenizer.load(tmp_path)
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.load(tmp_path)


CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "<|{{ message.role }}|>{{ message.content }}<|end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS = {"bos_token": "<s>"}
MESSAGES = [{"role": "user", "content": "1 < 2?"}, {"role": "tool", "content": "x"}]
RENDERED = "<s><|user|>1 < 2?<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": CHATML, "bos_token": "<s>"},
        {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}], **BOS},
        {"chat_template": CHATML, "bos_token": {"content": "<s>", "special": True}},
    ],
)
def test_chat_templates_in_every_form(tmp_path: Path, config: dict[str, Any]) -> None:
    assert load(save(tmp_path, byte_level(), **config)).render_chat(MESSAGES) == RENDERED


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), chat_template="old", bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load(tmp_path).render_chat(MESSAGES) == RENDERED


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n"
        "{% set ns = namespace(turns=0) %}\n"
        "{% for message in messages %}\n"
        "  {%- generation %}{{ message['content'] | trim | tojson }}{% endgeneration %}\n"
        "  {% set ns.turns = ns.turns + 1 %}\n"
        "{% endfor %}\n"
        "{{ ns.turns }}{{ strftime_now('%Y') | length }}{{ eos_token }}{{ enable_thinking }}"
    )
    save(tmp_path, byte_level(), chat_template=template, eos_token="<|end|>")
    tools: list[Any] = [{"type": "function", "function": {"name": "é<f>", "parameters": {}}}]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|end|>")  # type: ignore[no-untyped-call]
    expected = reference.apply_chat_template(
        MESSAGES,
        tools=tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    assert load(tmp_path).render_chat(MESSAGES, {"tools": tools, "enable_thinking": True}) == expected


def test_a_template_for_tools_beside_the_default_one(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    save(tmp_path, byte_level(), chat_template=named)
    (tmp_path / "more").mkdir()
    folder = save(tmp_path / "more", byte_level(), chat_template="plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    for tokenizer in (load(tmp_path), load(folder)):
        assert tokenizer.render_chat(MESSAGES) == "plain"
        assert tokenizer.render_chat(MESSAGES, {"tools": [1, 2]}) == "2 tools"
        assert tokenizer.chat_template == "{{ tools | length }} tools"
        assert "tools" in tokenizer.chat_variables


def test_templates_tell_what_they_read(tmp_path: Path) -> None:
    for template, tools in (
        ("{% if tools %}{{ tools }}{% endif %}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro f(tools) %}{{ tools }}{% endmacro %}{{ f(1) }}", False),
        ("no tools here: {{ messages }}", False),
    ):
        tokenizer = load(save(tmp_path, byte_level(), chat_template=template))
        assert ("tools" in tokenizer.chat_variables) == tools
        assert tokenizer.chat_template == template
    assert load(save(tmp_path, byte_level())).chat_variables == frozenset()


@pytest.mark.parametrize("content", ["Hello", "Hello ", " Hello, ", "<|end|>"])
@pytest.mark.parametrize("trims", [False, True])
def test_an_unfinished_message_ends_the_prompt_as_in_transformers(
    tmp_path: Path, content: str, trims: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    template = CHATML.replace("message.content", "message.content | trim") if trims else CHATML
    save(tmp_path, byte_level(), chat_template=template, bos_token="<s>")
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>")  # type: ignore[no-untyped-call]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, continue_final_message=True
    )
    assert load(tmp_path).render_unfinished_chat(messages) == expected
    assert messages[1]["content"] == content


def test_a_template_that_hides_the_last_message_cannot_go_on_with_it(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level(), chat_template="{{ messages[0].content }}"))
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        tokenizer.render_unfinished_chat([MESSAGES[0], {"role": "assistant", "content": "a"}])


def test_tokens_by_name(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()))
    (end,) = tokenizer.special_token_ids
    assert tokenizer.added_token_id("<|end|>") == end
    plain = tokenizer.added_token_id("<think> now")
    assert plain is not None
    assert tokenizer.added_token_id("a") is None
    assert tokenizer.token_piece(end) == "<|end|>"
    assert tokenizer.token_piece(tokenizer.encode(" a")[0]) == "Ġa"
    assert tokenizer.token_piece(10**6) == ""
    ids = [*tokenizer.encode("é"), end, plain]
    assert tokenizer.decode(ids) == "é<think> now"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "é<|end|><think> now"


def test_messages_that_a_template_refuses_are_the_callers_fault(tmp_path: Path) -> None:
    check = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    template = check + "{{ messages[0].content + 1 }}"
    tokenizer = load(save(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(InvalidRequestError, match="user first"):
        tokenizer.render_chat([{"role": "system", "content": ""}])
    with pytest.raises(InvalidRequestError, match="refused the messages"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    for template in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
    ):
        tokenizer = load(save(tmp_path, byte_level(), chat_template=template))
        with pytest.raises(InvalidRequestError, match="refused"):
            tokenizer.render_chat(MESSAGES)


def test_missing_and_malformed_templates(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load(save(tmp_path, byte_level())).render_chat(MESSAGES)
    for template, message in (("{% if %}", "no valid Jinja"), (3, "must be a string")):
        save(tmp_path, byte_level(), chat_template=template)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.load(tmp_path)


def test_importing_the_tokenizer_imports_no_torch() -> None:
    code = "import sys, pimoe.runtime.model.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
