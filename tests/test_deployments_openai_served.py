"""OpenAI's whole surface, served: the real SDK, HTTP, links, engine and sampler, and the embedded model."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pimoe.deployments.cluster import LocalCluster

PROMPT = "reverse: planet\n"


@pytest.fixture(scope="module")
def client(application: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{application.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **extra: Any) -> Any:
    """Greedy, unless told otherwise."""
    model = client.models.list().data[0].id
    body = {"temperature": 0, "max_tokens": 16, **extra}
    return client.completions.create(model=model, prompt=prompt, extra_body=body)


def test_an_answer_that_a_stop_string_ends_is_cached(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    for outcome in ("miss", "hit"):
        raw = client.completions.with_raw_response.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=32, stop=["nal"]
        )
        choice: Any = raw.parse().choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("te", "stop", "nal")
        assert raw.headers["x-pimoe-cache"] == outcome


def test_an_echo_scores_tokens_as_their_generation_did(client: openai.OpenAI) -> None:
    made = complete(client, logprobs=2, return_token_ids=True).choices[0]
    tokens = [*made.prompt_token_ids, *made.token_ids]
    echoed = complete(client, tokens, echo=True, logprobs=2, max_tokens=0).choices[0].logprobs
    count = len(made.token_ids)
    assert echoed.token_logprobs[0] is None
    assert echoed.tokens[-count:] == made.logprobs.tokens
    assert echoed.token_logprobs[-count:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)


def test_structured_answers(client: openai.OpenAI) -> None:
    assert complete(client, guided_choice=["yes", "no"]).choices[0].text in ("yes", "no")
    answer = complete(client, structured_outputs={"regex": "[0-9]{3}x"}).choices[0]
    assert re.fullmatch("[0-9]{3}x", answer.text)
    assert answer.finish_reason == "stop"
    schema = {"type": "object", "properties": {"ok": {"enum": [True, False]}}, "required": ["ok"]}
    wrapped = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
    }
    answer = complete(client, response_format=wrapped, max_tokens=200, logit_bias=NO_BLANKS).choices[0]
    assert json.loads(answer.text).keys() == {"ok"}
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, guided_regex="[")
    assert refused.value.param == "guided_regex"


NO_BLANKS = {str(byte): -100 for byte in b" \t\r\n"}


def test_biases_and_penalties_reach_the_sampler(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    first = str(ord(plain[0]))
    assert not complete(client, logit_bias={first: -100}).choices[0].text.startswith(plain[0])
    forced = complete(client, logit_bias={"122": 100}, max_tokens=5).choices[0].text
    assert forced == "zzzzz"
    varied = complete(client, logit_bias={"122": 10}, frequency_penalty=2, presence_penalty=2, max_tokens=40)
    assert varied.choices[0].text.count("z") < 40


def test_choices_and_usage_in_a_stream(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            n=3,
            seed=7,
            temperature=1.5,
            stream=True,
            stream_options=options,
        )
    )
    counts: list[Any] = [chunk.usage.completion_tokens if chunk.usage else None for chunk in chunks]
    assert counts == sorted(counts)
    assert {chunk.choices[0].index for chunk in chunks[:-1]} == {0, 1, 2}
    whole = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], n=3, seed=7, temperature=1.5
    )
    for choice in whole.choices:
        parts = [c.choices[0].delta.content or "" for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(parts) == choice.message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == counts[-1]


def test_tokens(application: LocalCluster) -> None:
    def post(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            application.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    found = post("/tokenize", prompt=PROMPT)
    assert found["count"] == len(found["tokens"]) == len(PROMPT)
    assert post("/detokenize", tokens=found["tokens"]) == {"prompt": PROMPT}


def test_tools_need_a_template_that_knows_them(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], tools=tools)
