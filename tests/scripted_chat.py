"""A gateway whose model "generates" given texts: a byte-level tokenizer and real chat templates in front,
and the real stop strings and cache behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path

from fake_gateway import MODEL, FakeGateway
from pimoe.runtime.caching import BypassReason, CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.generation.stopping import StoppingBackend
from pimoe.runtime.model.detokenizer import byte_alphabet
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.requests import (
    GenerateAnswer,
    GenerateRequest,
    InferRequest,
    InferResult,
    ModelInfo,
    TokenChunk,
    TokenLogprob,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

END = "<|im_end|>"
SPECIAL = (
    *(
        END,
        "<|im_start|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "<|call|>",
    ),
    *("<|constrain|>", "<|return|>", "<|python_tag|>"),
)
PLAIN = ("<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>")

CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}MARKS<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.id }} {{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}"
    "{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
# What in a template shows the format of its calls.
MARKS = {
    "hermes": "<tool_call></tool_call>",
    "mistral": "{{ '[TOOL_CALLS]' }}",
    "llama": '<|start_header_id|>"parameters"',
    "deepseek": "<｜tool▁call▁begin｜>",
    "harmony": "<|channel|><|message|>",
    "qwen3-coder": "<tool_call><function=f><parameter=p>",
    "unknown": "",
}


def make_tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """Bytes as tokens, but for the marks of the formats; saved and loaded as a checkpoint's is."""
    vocabulary = dict(sorted(byte_alphabet().items(), key=lambda item: item[1]))
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False) for token in PLAIN])
    backend.save(str(folder / "tokenizer.json"))
    config = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


class ScriptedBackend:
    """Generates `answers`, one after the other and the last one again and again; in chunks of `size` tokens.

    Attributes:
        given: how many tokens each generation has given.
    """

    def __init__(self, model: ModelInfo, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.answers = [""]
        self.size = 1
        self.requests: list[GenerateRequest] = []
        self.given: list[int] = []
        self.closed = 0

    async def infer(self, request: InferRequest) -> InferResult:
        raise NotImplementedError

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        turn = len(self.requests)
        self.requests.append(request)
        self.given.append(0)
        text = self.answers[min(turn, len(self.answers) - 1)]
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), *self.model.eos_token_ids]
        ends = len(ids) <= request.sampling.max_tokens
        ids = ids[: request.sampling.max_tokens]
        try:
            for start in range(0, len(ids), self.size):
                part = tuple(ids[start : start + self.size])
                last = start + self.size >= len(ids)
                self.given[turn] += len(part)
                chunk = TokenChunk(part, ("stop" if ends else "length") if last else None)
                yield self._told(chunk, request, start == 0)
        finally:
            self.closed += 1

    def _told(self, chunk: TokenChunk, request: GenerateRequest, first: bool) -> TokenChunk:
        """With logprobs, where they are asked for."""
        sampling = request.sampling
        logprobs = prompt = None
        if sampling.logprobs is not None:
            logprobs = tuple(scored(token, sampling.logprobs) for token in chunk.token_ids)
        if sampling.prompt_logprobs is not None and first:
            tokens = request.prompt_token_ids[1:]
            prompt = (None, *(scored(token, sampling.prompt_logprobs) for token in tokens))
        cached = len(request.prompt_token_ids) // 2 if first else 0
        return TokenChunk(chunk.token_ids, chunk.finish_reason, logprobs, prompt, cached)


def scored(token: int, most: int) -> TokenLogprob:
    """A made-up logprob: the second likeliest of all."""
    top = tuple((token + 1 - i if i < 2 else token - i, -0.25 * (i + 1)) for i in range(most))
    return TokenLogprob(token, -0.5, top, rank=2)


class ScriptedGateway(FakeGateway):
    """A gateway with the real cache and stop strings in front of a `ScriptedBackend`."""

    def __init__(self, folder: Path, format: str | None = "hermes", template: str = CHATML) -> None:
        source = None if format is None else template.replace("MARKS", MARKS[format])
        tokenizer = make_tokenizer(folder, source)
        end = tokenizer.added_token_id(END)
        assert end is not None
        info = {**MODEL.to_wire(), "eos_token_ids": (end,), "vocab_size": tokenizer.vocab_size}
        model = ModelInfo.from_wire({**info, "max_context_tokens": 4000})
        super().__init__(info=model, tokenizer=tokenizer)  # type: ignore[arg-type]
        self.backend = ScriptedBackend(model, tokenizer)
        seconds = iter(range(1_000, 1_000_000))
        self.cached = CachedBackend(
            StoppingBackend(self.backend, tokenizer), ResultCache(CacheLimits()), wall_clock=lambda: next(seconds)
        )

    def script(self, *answers: str, size: int = 1) -> None:
        """What is generated from now on."""
        self.backend.answers, self.backend.size = list(answers), size
        self.backend.requests.clear()
        self.backend.given.clear()
        self.backend.closed = 0
        self.cached.flush()

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        return await self.cached.generate(request, bypass)
