"""`pimoe generate` against a gateway that echoes: what it sends, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_gateway import FakeGateway, served
from pimoe.deployments.cli import cli
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[FakeGateway, str]]:
    gateway = FakeGateway()
    with served(gateway) as host:
        yield gateway, f"http://{host}"


@pytest.fixture
def gateway(address: tuple[FakeGateway, str]) -> FakeGateway:
    address[0].generated.clear()
    address[0].bypasses.clear()
    return address[0]


def generate(address: tuple[FakeGateway, str], *arguments: str, given: str | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["generate", "--url", address[1], *arguments], input=given)
    return done.exit_code, done.output


def test_plain(address: tuple[FakeGateway, str], gateway: FakeGateway) -> None:
    assert generate(address, "one\\ntwo") == (0, "one\ntwo\n")
    sampling = gateway.generated[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_k) == (0.0, 128, 0)
    assert gateway.bypasses == [None]


def test_from_standard_input(address: tuple[FakeGateway, str], gateway: FakeGateway) -> None:
    assert generate(address, "-", given="a\n") == (0, "a\n\n")


def test_a_mode_brings_its_own_and_what_is_given_wins(
    address: tuple[FakeGateway, str], gateway: FakeGateway
) -> None:
    assert generate(address, "x", "--mode", "speed", "--temperature", "1")[0] == 0
    assert (
        generate(address, "x", "--mode", "speed", "--temperature", "1", "--top-k", "7", "--max-tokens", "9")[0]
        == 0
    )
    assert generate(address, "x", "--mode", "none")[0] == 0
    found = [(request.sampling.top_k, request.sampling.max_tokens) for request in gateway.generated]
    assert found == [(50, 256), (7, 9), (0, 128)]


def test_sampling_options(address: tuple[FakeGateway, str], gateway: FakeGateway) -> None:
    options = ("--temperature", "0.5", "--top-p", "0.5", "--seed", "3", "--stop", "c", "--stop", "z", "--no-cache")
    assert generate(address, "abcd", *options) == (0, "ab\n")
    sampling = gateway.generated[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.5, 3)
    assert gateway.bypasses == ["asked"]


def test_chats(address: tuple[FakeGateway, str], gateway: FakeGateway) -> None:
    assert generate(address, "hi", "--chat", "--system", "be short")[0] == 0
    assert bytes(gateway.generated[0].prompt_token_ids) == b"system: be short\nuser: hi\n"


@pytest.mark.parametrize("wrong", [("--system", "s"), ("--mode", "fast"), ("--max-tokens", "0"), ("--top-p", "2")])
def test_wrong_options(address: tuple[FakeGateway, str], wrong: tuple[str, str]) -> None:
    code, output = generate(address, "x", *wrong)
    assert code == 2
    assert wrong[0] in output
