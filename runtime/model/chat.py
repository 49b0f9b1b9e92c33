"""Chat templates: a conversation as the prompt that a model was trained on, in the Jinja dialect of Hugging Face.

The environment follows `transformers.utils.chat_template_utils`: sandboxed and immutable, whitespace control
on, `loopcontrols`, `raise_exception`, `strftime_now`, an unescaped `tojson`, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import CheckpointError, InvalidRequestError

_END_OF_CONTENT = "\ue000end of content\ue000 "
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template's text.
        special_tokens: such as `bos_token`, which templates refer to by name.
        origin: where the template came from, for errors.
        with_tools: renders in its place where there are tools; some checkpoints have two.

    Attributes:
        source: the template's text, the one for tools where there are two.
        reads: the variables that it refers to, such as `messages`, `tools` or `enable_thinking`.

    Raises:
        CheckpointError: the template is no valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        origin: str,
        with_tools: ChatTemplate | None = None,
    ) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.reads = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: the chat template is no valid Jinja ({error})") from error
        self.source = source
        self._with_tools = with_tools
        if with_tools is not None:
            self.source, self.reads = with_tools.source, self.reads | with_tools.reads
        self._special_tokens = dict(special_tokens)
        # Whether the same messages may make another prompt tomorrow.
        self.reads_clock = "strftime_now" in source

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt, up to where the model's answer begins.

        Args:
            messages: objects with `role`, `content` and whatever else the template reads.
            variables: more of what the template reads, such as `tools` or `enable_thinking`.

        Raises:
            InvalidRequestError: the template refuses the messages.
        """
        if self._with_tools is not None and variables and variables.get("tools"):
            return self._with_tools.render(messages, variables)
        names: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
        names |= self._special_tokens | dict(variables or {})
        names["messages"] = [dict(message) for message in messages]
        try:
            return self._template.render(names)
        except Exception as error:  # a template can fail in any way on messages that it did not expect
            raise InvalidRequestError(f"the chat template refused the messages: {error}", "messages") from error

    def render_unfinished(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt up to the end of the last message's `content`, for the model to go on in the middle of it.

        The end is found by a mark behind the content, as `transformers.apply_chat_template` does it.

        Args:
            messages, variables: as in `render`.

        Raises:
            InvalidRequestError: the template refuses the messages, or does not show the end of the last one.
        """
        *before, last = messages
        marked = {**last, "content": last["content"] + _END_OF_CONTENT}
        text = self.render([*before, marked], {"add_generation_prompt": False, **(variables or {})})
        at = text.rfind(_END_OF_CONTENT.strip())
        if at < 0:
            raise InvalidRequestError(
                "the chat template does not show the end of the last message, so that it cannot be continued",
                "continue_final_message",
            )
        # Without the mark's own space behind it the template trims its messages: so it would the content's.
        return text[:at] if text.startswith(_END_OF_CONTENT, at) else text[:at].rstrip()


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The checkpoint's chat template, from `chat_template.jinja` or `tokenizer_config.json`, with the one that it
    may have for tools; None where it has none.

    Raises:
        CheckpointError: the template is malformed.
    """
    names = _special_tokens(tokenizer_config)
    templates = _sources(folder, tokenizer_config)
    if "default" not in templates:
        return None
    with_tools = None
    if "tool_use" in templates:
        with_tools = ChatTemplate(templates["tool_use"][1], names, str(templates["tool_use"][0]))
    file, source = templates["default"]
    return ChatTemplate(source, names, str(file), with_tools)


def _sources(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """Templates by name, and the file that each is from. A file of its own wins over the config."""
    config = folder / "tokenizer_config.json"
    value = tokenizer_config.get("chat_template")
    entries = (
        value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    )
    found: dict[str, tuple[Path, str]] = {}
    for entry in entries:
        source = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(source, str):
            raise CheckpointError(f"{config}: chat_template must be a string or a list of named templates")
        found[str(entry.get("name"))] = config, source
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    return found | {name: (file, file.read_text(encoding="utf-8")) for name, file in files.items()}


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; the config holds each as its text or as an object with it."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it passes through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own filter, it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
