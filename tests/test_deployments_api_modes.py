"""Modes: the presets by themselves, and over the application; what a request names itself always wins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from fake_gateway import MODEL, FakeGateway, Reply, ask
from openai import OpenAI
from pimoe.deployments.api import ApiSettings
from pimoe.deployments.api.chat_prompt import prepare
from pimoe.deployments.api.modes import MODE_NAMES, Chosen, Mode, Modes, choose, seed_of_prompt
from pimoe.deployments.api.prompt_cache import Chat, ChatPrompts
from pimoe.deployments.settings import AppSettings
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.errors import ConfigurationError, ContextLengthError
from pimoe.runtime.model.tokenizer import Tokenizer
from pimoe.runtime.requests import SamplingParams

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(turns: int, size: int = 1) -> list[dict[str, str]]:
    """A system message and so many exchanges, the last still open."""
    messages = [{"role": "system", "content": "S"}]
    for number in range(turns):
        messages.append({"role": "user", "content": f"{number % 10}" * size})
        messages.append({"role": "assistant", "content": "a" * size})
    return [*messages, {"role": "user", "content": "q"}]


async def chat(gateway: FakeGateway, headers: dict[str, str] | None = None, **body: Any) -> Reply:
    body = {"model": MODEL.name, "messages": talk(4), **body}
    return await ask(gateway, "POST", "/v1/chat/completions", orjson.dumps(body), headers)


async def sampled(**body: Any) -> SamplingParams:
    gateway = FakeGateway()
    reply = await chat(gateway, messages=talk(0), **body)
    assert reply.status == 200, reply.body
    return gateway.generated[0].sampling


# The presets ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_are_documented() -> None:
    modes = Modes()
    assert [modes.named(name).newest_messages for name in MODE_NAMES] == [8, 6, 6]
    assert [modes.named(name).top_k for name in MODE_NAMES] == [0, 50, 20]
    assert [modes.named(name).max_tokens for name in MODE_NAMES] == [1024, 256, 128]
    assert [modes.named(name).penalties for name in MODE_NAMES] == [True, True, False]
    assert [modes.named(name).repeatable for name in MODE_NAMES] == [False, False, True]


@pytest.mark.parametrize("mode", MODE_NAMES)
@pytest.mark.parametrize("name", ["top_k", "repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_what_is_given_wins(mode: Any, name: str) -> None:
    asked = replace(SamplingParams(), **{name: 2})
    assert getattr(Modes().named(mode).sampling(asked, {name}), name) == 2


def test_ultra_drops_penalties_that_the_request_did_not_name() -> None:
    asked = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5)
    assert Modes().ultra.sampling(asked, ()) == SamplingParams(top_k=20)
    assert Modes().accuracy.sampling(asked, ()) == asked


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_greedy_requests_are_the_same_in_all_modes(mode: Any) -> None:
    asked = SamplingParams(temperature=0.0)
    assert Modes().named(mode).sampling(asked, ()) == asked


@pytest.mark.parametrize(
    ("context", "max_tokens", "share", "budget"),
    [
        (4096, 96, 1.0, 4000),
        (4096, 96, 0.25, 1000),
        (4096, None, 1.0, 3968),
        (400, None, 1.0, 300),
        (9, 10, 1.0, -1),
    ],
)
def test_the_budget_of_a_prompt(context: int, max_tokens: int | None, share: float, budget: int) -> None:
    assert Mode(6, share, max_tokens=128).prompt_budget(context, max_tokens) == budget


@pytest.mark.parametrize(
    "wrong",
    [
        {"newest_messages": -1},
        {"context_share": 0.0},
        {"context_share": 1.1},
        {"context_share": True},
        {"max_tokens": 0},
        {"top_k": 1.5},
        {"repeatable": 1},
    ],
)
def test_wrong_presets(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        replace(Modes().speed, **wrong)
    assert caught.value.param == next(iter(wrong))


def test_choosing() -> None:
    modes = Modes()
    assert choose(None, None, modes, 16) is None
    assert choose(None, "disabled", modes, 16) is None
    assert choose("speed", None, modes, 16) == Chosen("speed", modes.speed, "auto")
    auto = choose(None, "auto", modes, 16)
    assert auto is not None
    assert (auto.name, auto.preset) == (None, Mode(0, 1.0, 16))


def test_seeds_of_prompts() -> None:
    seeds = {seed_of_prompt(range(size)) for size in range(200)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of_prompt([1, 2]) == seed_of_prompt((1, 2))


def test_settings_change_presets() -> None:
    fields = {"modes": {"ultra": {"top_k": 5, "repeatable": False}}, "api": {"default_mode": "speed"}}
    api = AppSettings.model_validate({"gateway": fields}).gateway.to_api()
    assert api.default_mode == "speed"
    assert api.modes == replace(Modes(), ultra=replace(Modes().ultra, top_k=5, repeatable=False))


@pytest.mark.parametrize(
    "gateway",
    [
        {"modes": {"ultra": {"top_q": 5}}},
        {"modes": {"ultra": {"context_share": 2}}},
        {"modes": {"other": {}}},
        {"api": {"default_mode": "fast"}},
        {"api": {"modes": 1}},
        {"api": {"max_choices": "8"}},
        {"prompt_cache": {"max_bytes": -1}},
    ],
)
def test_wrong_settings(gateway: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        AppSettings.model_validate({"gateway": gateway})


# Over the application ------------------------------------------------------------------------------------------


async def test_without_a_mode_nothing_changes() -> None:
    gateway = FakeGateway()
    reply = await chat(gateway)
    assert "pimoe" not in json.loads(reply.body)
    assert not [name for name in reply.headers if name in ("x-pimoe-mode", "x-pimoe-trimmed-messages")]
    prompt, sampling = gateway.generated[0].prompt_token_ids, gateway.generated[0].sampling
    assert (sampling.top_k, sampling.max_tokens) == (0, gateway.info.max_context_tokens - len(prompt))
    assert bytes(gateway.generated[0].prompt_token_ids).count(b"\n") == 10


@pytest.mark.parametrize(("mode", "kept"), [("accuracy", 8), ("speed", 6), ("ultra", 6)])
async def test_the_answer_says_what_was_left_out(mode: str, kept: int) -> None:
    gateway = FakeGateway()
    reply = await chat(gateway, mode=mode, max_tokens=8, messages=talk(6))
    prompt = bytes(gateway.generated[0].prompt_token_ids).decode()
    lines = prompt.splitlines()
    assert lines[0] == "system: S"
    assert lines[-1] == "user: q"
    assert len(lines) == kept
    left = 14 - kept
    told = {"mode": mode, "trimmed_messages": left, "trimmed_tokens": left, "kept_messages": kept}
    body = json.loads(reply.body)
    assert body["pimoe"] == told
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert (reply.headers["x-pimoe-mode"], reply.headers["x-pimoe-trimmed-messages"]) == (mode, str(left))
    assert gateway.prompt_cache.statistics().entries > 0


async def test_a_stream_says_it_once_and_first() -> None:
    gateway = FakeGateway()
    reply = await chat(gateway, mode="ultra", stream=True, n=2, max_tokens=3, temperature=0)
    events = [json.loads(line[6:]) for line in reply.body.decode().split("\n\n") if line.startswith("data: {")]
    assert events[0]["pimoe"]["trimmed_messages"] == 4
    assert not [event for event in events[1:] if "pimoe" in event]
    assert reply.headers["x-pimoe-mode"] == "ultra"


async def test_presets_and_what_wins_over_them() -> None:
    ultra = await sampled(mode="ultra")
    assert (ultra.top_k, ultra.max_tokens) == (20, 128)
    assert (await sampled(mode="ultra", top_k=0)).top_k == 0
    assert (await sampled(mode="ultra", top_k=-1)).top_k == 0
    assert (await sampled(mode="ultra", top_k=None)).top_k == 20
    assert (await sampled(mode="ultra", max_completion_tokens=9)).max_tokens == 9
    assert (await sampled(mode="speed")).top_k == 50
    assert await sampled(mode="speed", temperature=0, max_tokens=9) == await sampled(temperature=0, max_tokens=9)
    accuracy = await sampled(mode="accuracy", seed=1)
    assert accuracy == replace(await sampled(seed=1), max_tokens=accuracy.max_tokens)


async def test_completions_have_modes_without_messages() -> None:
    gateway = FakeGateway()
    body = orjson.dumps({"model": MODEL.name, "prompt": "x" * 300, "mode": "ultra", "max_tokens": 2})
    reply = await ask(gateway, "POST", "/v1/completions", body)
    assert json.loads(reply.body)["pimoe"] == {"mode": "ultra"}
    assert (len(gateway.generated[0].prompt_token_ids), gateway.generated[0].sampling.top_k) == (301, 20)


async def test_only_ultra_makes_sampled_requests_repeatable() -> None:
    gateway = FakeGateway()
    for mode in ("accuracy", "speed", "ultra", "ultra"):
        await chat(gateway, mode=mode, max_tokens=4)
    assert gateway.bypasses == ["nondeterministic", "nondeterministic", None, None]
    accuracy, speed, first, second = (request.sampling.seed for request in gateway.generated)
    assert first == second
    assert len({accuracy, speed, first}) == 3
    await chat(gateway, mode="ultra", max_tokens=4, n=2, messages=talk(1))
    one, two = (request.sampling.seed for request in gateway.generated[-2:])
    assert two == one + 1 != first


async def test_who_wants_another_answer_in_ultra_gets_one() -> None:
    gateway = FakeGateway()
    await chat(gateway, mode="ultra", cache=False)
    await chat(gateway, mode="ultra", cache=False)
    await chat(gateway, mode="ultra", seed=5)
    one, two, given = (request.sampling.seed for request in gateway.generated)
    assert one != two
    assert given == 5
    assert gateway.bypasses == ["asked", "asked", None]


async def test_the_header_and_the_default() -> None:
    gateway = FakeGateway(settings=ApiSettings(default_mode="speed"))
    seen = []
    for headers, body in (
        ({}, {}),
        ({"x-pimoe-mode": " ultra "}, {}),
        ({"x-pimoe-mode": "ultra"}, {"mode": "accuracy"}),
        ({"x-pimoe-mode": "none"}, {}),
        ({}, {"mode": "none"}),
    ):
        reply = await chat(gateway, headers, max_tokens=4, **body)
        seen.append(reply.headers.get("x-pimoe-mode"))
    assert seen == ["speed", "ultra", "accuracy", None, None]


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ({}, {"mode": "fast"}, "mode"),
        ({}, {"mode": 1}, "mode"),
        ({}, {"truncation": "middle"}, "truncation"),
        ({}, {"truncation": True}, "truncation"),
        ({"x-pimoe-mode": "fast"}, {}, "x-pimoe-mode"),
        ({"x-pimoe-mode": ""}, {}, "x-pimoe-mode"),
    ],
)
async def test_bad_modes(headers: dict[str, str], body: dict[str, Any], param: str) -> None:
    reply = await chat(FakeGateway(), headers, **body)
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["param"] == param


async def test_truncation_says_whether_messages_may_go() -> None:
    gateway = FakeGateway()
    long = talk(20, size=10)
    refused = await chat(gateway, messages=long)
    assert json.loads(refused.body)["error"]["code"] == "context_length_exceeded"
    whole = await chat(gateway, messages=long, mode="speed", truncation="disabled")
    assert whole.status == 400
    short = await chat(gateway, messages=long, truncation="auto", max_tokens=100)
    told = json.loads(short.body)["pimoe"]
    assert told["mode"] is None
    assert told["trimmed_messages"] + told["kept_messages"] == 42
    assert 300 - 34 < len(gateway.generated[-1].prompt_token_ids) <= 300
    kept = await chat(gateway, mode="ultra", truncation="disabled", max_tokens=4)
    assert json.loads(kept.body)["pimoe"]["trimmed_messages"] == 0


async def test_what_must_stay_and_does_not_fit_is_refused_as_ever() -> None:
    gateway = FakeGateway()
    messages = [*talk(3), {"role": "user", "content": "x" * 200}]
    reply = await chat(gateway, messages=messages, mode="ultra", max_tokens=10)
    assert reply.status == 200, "more than the mode's share, but the context has room for it"
    assert json.loads(reply.body)["pimoe"]["kept_messages"] == 2
    for length in (395, 200_000):
        messages[-1]["content"] = "x" * length
        reply = await chat(gateway, messages=messages, mode="ultra", max_tokens=10)
        assert json.loads(reply.body)["error"]["code"] == "context_length_exceeded"


async def test_far_too_much_is_left_out_without_being_counted() -> None:
    reply = await chat(FakeGateway(), messages=talk(3, size=200_000), mode="speed", max_tokens=4)
    told = json.loads(reply.body)["pimoe"]
    assert told == {"mode": "speed", "trimmed_messages": 6, "trimmed_tokens": None, "kept_messages": 2}


def test_the_openai_sdk_is_not_disturbed() -> None:
    from fake_gateway import served

    with served(FakeGateway()) as host, OpenAI(base_url=f"http://{host}/v1", api_key="x") as client:
        create: Any = client.chat.completions.create
        asked = {"model": MODEL.name, "messages": talk(5), "extra_body": {"mode": "ultra"}, "max_tokens": 4}
        answer = create(**asked)
        assert answer.pimoe["trimmed_messages"] == 6
        stream = create(
            model=MODEL.name, messages=talk(5), extra_body={"mode": "ultra"}, max_tokens=4, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


# With a real tokenizer -----------------------------------------------------------------------------------------


def real(tmp_path: Path, template: str | None = None) -> tuple[Tokenizer, ChatPrompts]:
    """The embedded model's tokenizer, with its own template or another one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((CHECKPOINT / name).read_bytes())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    return tokenizer, ChatPrompts(tokenizer)


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_the_embedded_model_s_chats(tmp_path: Path, mode: Any) -> None:
    tokenizer, prompts = real(tmp_path)
    messages = [*talk(5)[:-1], {"role": "user", "content": "reverse: expert"}]
    prompt = prepare(prompts, Chat(messages), Chosen(mode, Modes().named(mode)), (512, None))
    assert prompt.token_ids == tokenizer.encode("reverse: expert\n", add_special_tokens=False)
    assert len(prompt.kept) == (8 if mode == "accuracy" else 6)
    left = [messages[i]["content"] for i in range(len(messages)) if i not in prompt.kept]
    assert prompt.trimmed_tokens == sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in left)


@pytest.mark.parametrize("budget", [90, 150, 151, 333, 480])
def test_the_longest_chat_that_fits_is_kept_to_the_token(tmp_path: Path, budget: int) -> None:
    tokenizer, prompts = real(tmp_path, CHATML)
    messages = talk(40, size=7)
    chosen = Chosen(None, Mode(0, 1.0, 16))
    prompt = prepare(prompts, Chat(messages), chosen, (budget + 8, 8))

    def tokens(kept: list[dict[str, str]]) -> list[int]:
        return tokenizer.encode(tokenizer.render_chat(kept), add_special_tokens=False)

    assert prompt.token_ids == tokens([messages[i] for i in prompt.kept])
    assert len(prompt.token_ids) <= budget
    more = len(prompt.kept) + 1  # one exchange more
    assert len(tokens([messages[0], *messages[-more:]])) > budget
    assert prompts.cache.statistics().misses < 12 + len(messages)  # renders, and the texts left out


def test_a_system_message_alone_may_be_too_long(tmp_path: Path) -> None:
    _, prompts = real(tmp_path, CHATML)
    messages = [{"role": "system", "content": "s" * 300_000}, {"role": "user", "content": "q"}]
    with pytest.raises(ContextLengthError):
        prepare(prompts, Chat(messages), Chosen("ultra", Modes().ultra), (512, None))
