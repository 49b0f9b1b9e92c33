"""Who may use a link: authentication both ways, hostile and silent peers, TLS, sockets on disk, connecting."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl as tls
import stat
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import uvloop
from link_peers import SECRET, Peer, linked, scripted_server, serving, tensor, welcome
from pimoe.runtime.errors import (
    ConfigurationError,
    LinkAuthenticationError,
    LinkClosedError,
    LinkError,
    LinkProtocolError,
    PimoeError,
)
from pimoe.runtime.links import Call, Endpoint, LinkClient, LinkLimits, LinkServer, Reply, choose_address
from pimoe.runtime.links.addresses import new_unix_address, remove_unix_address, split_tcp
from pimoe.runtime.links.authentication import NONCE_BYTES, new_nonce, new_secret, prove, verify
from pimoe.runtime.links.frames import PREFIX, Frame, Kind
from pimoe.runtime.requests import TensorData
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TIMEOUT_S = 20.0
TINY_S = 0.02


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def echo(call: Call) -> Reply:
    return Reply(call.meta, call.tensors)


def must_not_be_called(call: Call) -> Reply:
    raise AssertionError("an unauthenticated peer reached the handler")


# Proofs


def test_a_proof_holds_for_its_secret_role_and_nonces_only() -> None:
    own, peer = new_nonce(), new_nonce()
    proof = prove(b"s", b"client", own, peer)
    assert verify(b"s", b"client", own, peer, proof)
    assert not verify(b"t", b"client", own, peer, proof)
    assert not verify(b"s", b"server", own, peer, proof)  # a reflected proof
    assert not verify(b"s", b"client", peer, own, proof)
    assert not verify(b"s", b"client", new_nonce(), peer, proof)
    for odd in (None, "text", b"", proof[:-1], [proof]):
        assert not verify(b"s", b"client", own, peer, odd)
    assert not verify(b"s", b"client", own[:-1], peer, prove(b"s", b"client", own[:-1], peer))
    assert len(own) == NONCE_BYTES
    assert new_secret() != new_secret()


async def test_a_client_with_another_secret_is_refused() -> None:
    async with serving(must_not_be_called) as server:
        with pytest.raises(LinkAuthenticationError, match="another link secret"):
            await LinkClient.connect(server.addresses[0], b"wrong")
        await eventually(lambda: server.statistics().rejected_peers == 1)
        assert server.statistics().connections == 0


@pytest.mark.parametrize("proof", ["wrong", "reflected", "none"])
async def test_a_server_with_another_secret_is_refused(proof: str) -> None:
    def impostor(peer: Peer, frame: Frame) -> None:
        if frame.kind is Kind.PROOF:
            answers = {"wrong": bytes(32), "reflected": frame.header["proof"], "none": None}
            peer.send(Kind.WELCOME, 0, {"proof": answers[proof], "credits": 1})

    async with scripted_server(impostor) as (address, peers):
        with pytest.raises(LinkAuthenticationError, match="did not prove"):
            await LinkClient.connect(address, SECRET)
        await eventually(lambda: peers[0].closed)


@pytest.mark.parametrize("kind", [Kind.RESPONSE, Kind.ITEM, Kind.CREDIT, Kind.GOAWAY, Kind.PONG])
async def test_a_client_heeds_nothing_from_a_server_that_it_does_not_know(kind: Kind) -> None:
    async with scripted_server(greeting=[(kind, None)]) as (address, _):
        with pytest.raises(LinkProtocolError, match="before it is known"):
            await LinkClient.connect(address, SECRET)


async def test_a_welcome_without_a_challenge_is_refused() -> None:
    async with scripted_server(greeting=[(Kind.WELCOME, {"proof": bytes(32)})]) as (address, _):
        with pytest.raises(LinkAuthenticationError):
            await LinkClient.connect(address, SECRET)


@pytest.mark.parametrize("nonce", [None, 7, "text"])
async def test_a_challenge_without_a_nonce_is_refused(nonce: Any) -> None:
    async with scripted_server(greeting=[(Kind.HELLO, {"nonce": nonce})]) as (address, _):
        with pytest.raises(LinkProtocolError, match="no nonce"):
            await LinkClient.connect(address, SECRET)


# Peers that do not authenticate


async def test_a_peer_that_never_authenticates_is_dropped() -> None:
    async with serving(must_not_be_called, limits=LinkLimits(handshake_timeout_s=TINY_S)) as server:
        peer = await Peer.connect(server.addresses[0], secret=None)
        await eventually(lambda: peer.closed)
        assert server.statistics()[-1] == 1
        assert server.statistics().connections == 0


async def test_the_handshake_timer_ends_with_the_handshake() -> None:
    async with serving(echo, limits=LinkLimits(handshake_timeout_s=TINY_S)) as server:
        client = await LinkClient.connect(server.addresses[0], SECRET)
        loop = asyncio.get_running_loop()
        end = loop.time() + 2 * TINY_S
        await eventually(lambda: loop.time() > end)
        assert (await client.call("m", {"x": 1}, [], TIMEOUT_S)).meta == {"x": 1}
        await client.close()


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (Kind.REQUEST, {"m": "m", "s": 1.0}),
        (Kind.PING, None),
        (Kind.PROOF, {"proof": b""}),
        (Kind.PROOF, {"nonce": "text", "proof": b""}),
        (Kind.PROOF, {"nonce": bytes(32), "proof": "text"}),
        (Kind.HELLO, {"nonce": bytes(32)}),
    ],
)
async def test_anything_but_a_proof_is_dropped(kind: Kind, header: dict[str, Any] | None) -> None:
    async with serving(must_not_be_called) as server:
        peer = await Peer.connect(server.addresses[0], secret=None)
        peer.send(kind, 1, header)
        await eventually(lambda: peer.closed)
        assert server.statistics().rejected_peers == 1


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: pimoe\r\n\r\n",
        PREFIX.pack(b"PMOE", 1, Kind.PROOF, 0, 0, 4097, 0),
        PREFIX.pack(b"PMOE", 1, Kind.PROOF, 0, 0, 16, 1),
        PREFIX.pack(b"PMOE", 1, Kind.PROOF, 0, 0, 2**32 - 1, 2**64 - 1),
        os.urandom(4096),
    ],
    ids=["http", "header", "body", "huge", "noise"],
)
async def test_oversized_frames_and_noise_before_authentication_are_dropped(data: bytes) -> None:
    async with serving(must_not_be_called) as server:
        reader, writer = await asyncio.open_unix_connection(server.addresses[0].removeprefix("unix:"))
        writer.write(data)
        try:
            rest = await within_patience(reader.read())
        except ConnectionResetError:
            rest = b""
        assert len(rest) < 200  # the challenge, and then the end
        assert server.statistics().rejected_peers == 1
        writer.close()


async def test_connections_are_bounded_and_their_places_freed() -> None:
    async with serving(echo, limits=LinkLimits(max_connections=2)) as server:
        first, second = [await LinkClient.connect(server.addresses[0], SECRET) for _ in range(2)]
        with pytest.raises(LinkClosedError):
            await LinkClient.connect(server.addresses[0], SECRET)
        await first.close()
        await eventually(lambda: server.statistics().connections == 1)
        third = await LinkClient.connect(server.addresses[0], SECRET)
        for client in (second, third):
            assert (await client.call("m", {"x": 1}, [], TIMEOUT_S)).meta == {"x": 1}
            await client.close()


# Authenticated peers that misbehave


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (Kind.REQUEST, None),
        (Kind.REQUEST, {"m": "m"}),
        (Kind.REQUEST, {"m": "m", "s": "soon"}),
        (Kind.REQUEST, {"m": "m", "s": float("nan")}),
        (Kind.WELCOME, None),
        (Kind.ITEM, None),
        (Kind.GOAWAY, None),
    ],
)
async def test_a_client_that_breaks_the_protocol_loses_its_own_link_only(
    kind: Kind, header: dict[str, Any] | None
) -> None:
    async with linked(echo) as (server, client):
        peer = await Peer.connect(server.addresses[0])
        peer.send(kind, 1, header)
        await eventually(lambda: peer.closed)
        assert (await client.call("m", {"x": 1}, [], TIMEOUT_S)).meta == {"x": 1}


async def test_a_stream_number_may_not_be_used_twice_at_once() -> None:
    async def never(call: Call) -> Reply:
        await asyncio.Event().wait()
        return Reply()

    async with serving(never) as server:
        peer = await Peer.connect(server.addresses[0])
        for _ in range(2):
            peer.send(Kind.REQUEST, 1, {"m": "m", "s": TIMEOUT_S})
        await eventually(lambda: peer.closed)
        assert server.calls == 1
        assert server.statistics() == (0, 0, 1, 1, 0)


async def test_pings_are_answered_and_cancelling_nothing_is_harmless() -> None:
    async with serving(echo) as server:
        peer = await Peer.connect(server.addresses[0])
        peer.send(Kind.CANCEL, 99)
        peer.send(Kind.PING, 0)
        await peer.frame(Kind.PONG)
        await peer.close()


@pytest.mark.parametrize("kind", [Kind.REQUEST, Kind.CANCEL, Kind.PROOF])
async def test_a_server_that_breaks_the_protocol_loses_the_link(kind: Kind) -> None:
    def odd(peer: Peer, frame: Frame) -> None:
        welcome(peer, frame)
        if frame.kind is Kind.REQUEST:
            peer.send(kind, frame.stream)

    async with scripted_server(odd) as (address, _):
        client = await LinkClient.connect(address, SECRET)
        with pytest.raises(LinkProtocolError, match=f"must not send {kind.name}"):
            await client.call("m", {}, [], TIMEOUT_S)
        assert client.closed


async def test_answers_that_nobody_waits_for_are_ignored() -> None:
    def chatty(peer: Peer, frame: Frame) -> None:
        welcome(peer, frame)
        if frame.kind is Kind.REQUEST:
            for kind in (Kind.RESPONSE, Kind.ITEM, Kind.ERROR):
                peer.send(kind, frame.stream + 1000, {"code": "overloaded"})
            for _ in range(2):
                peer.send(Kind.RESPONSE, frame.stream, {"h": {"x": 1}})

    async with scripted_server(chatty) as (address, _):
        client = await LinkClient.connect(address, SECRET)
        for _ in range(3):
            assert (await client.call("m", {}, [], TIMEOUT_S)).meta == {"x": 1}
        await client.close()


async def test_credits_come_with_the_welcome_and_may_change() -> None:
    async with linked(echo, credits=3) as (server, client):
        assert client.credits == 3
        told = asyncio.Event()
        client.on_credits = told.set
        (peer,) = server._peers
        peer.send(Kind.CREDIT, 0, {"credits": 1})
        await within_patience(told.wait())
        assert client.credits == 1


# Connecting


@pytest.mark.parametrize("address", ["unix:/nonexistent/pimoe.sock", "tcp:127.0.0.1:1", "unix:/" + "x" * 200])
async def test_where_nothing_listens(address: str) -> None:
    with pytest.raises(LinkClosedError, match="cannot connect to"):
        await LinkClient.connect(address, SECRET)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "tcp:host", "tcp::1", "tcp:host:x", "tcp:host:65536", "tcp:h:²"]
)
async def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigurationError, match="is not of the form tcp:host:port"):
        await LinkClient.connect(address, SECRET)


async def test_a_server_that_never_speaks_is_given_up() -> None:
    async with scripted_server(lambda peer, frame: None) as (address, peers):
        with pytest.raises(LinkClosedError, match="no answer within"):
            await LinkClient.connect(address, SECRET, LinkLimits(handshake_timeout_s=TINY_S))
        await eventually(lambda: peers[0].closed)


async def test_a_server_that_hangs_up_at_once() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(LinkClosedError):
        await LinkClient.connect(f"tcp:127.0.0.1:{port}", SECRET)
    server.close()


async def test_a_link_that_is_lost_right_after_the_welcome_is_no_link() -> None:
    def fickle(peer: Peer, frame: Frame) -> None:
        welcome(peer, frame)
        peer.connection._transport.close()  # type: ignore[union-attr]

    async with scripted_server(fickle) as (address, _):
        for _ in range(10):
            try:
                client = await LinkClient.connect(address, SECRET)
            except LinkClosedError:
                continue
            with pytest.raises(LinkClosedError):
                await client.call("m", {}, [], TIMEOUT_S)
            assert client._ping_timer is None or client._ping_timer.cancelled()


@pytest.mark.parametrize("turns", range(12))
async def test_connecting_may_be_cancelled_at_any_moment(turns: int) -> None:
    async with serving(echo) as server:
        connecting = asyncio.create_task(LinkClient.connect(server.addresses[0], SECRET))
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        (outcome,) = await asyncio.gather(connecting, return_exceptions=True)
        if isinstance(outcome, LinkClient):
            await outcome.close()
        else:
            assert isinstance(outcome, asyncio.CancelledError)
        await eventually(lambda: server.statistics().connections == 0)


async def test_a_server_may_close_while_peers_come() -> None:
    # One that asyncio had accepted but not yet handed over is told nothing: it learns at the handshake's time.
    limits = LinkLimits(handshake_timeout_s=0.1)
    for turns in range(8):
        async with serving(echo) as server:
            connecting = asyncio.create_task(LinkClient.connect(server.addresses[0], SECRET, limits))
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.close()
            (outcome,) = await asyncio.gather(connecting, return_exceptions=True)
            if isinstance(outcome, LinkClient):
                await eventually(lambda client=outcome: client.closed)
            else:
                assert isinstance(outcome, LinkError)
            assert server.statistics().connections == 0


# Sockets on disk and addresses


async def test_unix_sockets_are_private_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIMOE_SOCKET_FOLDER", str(tmp_path))
    server = LinkServer(echo, SECRET)
    path = (await server.listen_unix(new_unix_address(("group-0",)))).removeprefix("unix:")
    folder = os.path.dirname(path)
    assert os.path.dirname(folder) == str(tmp_path)
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    await server.close()
    assert os.listdir(tmp_path) == []


async def test_a_folder_that_is_not_ours_stays(tmp_path: Path) -> None:
    server = LinkServer(echo, SECRET)
    await server.listen_unix(f"unix:{tmp_path}/own.sock")
    await server.close()
    assert os.listdir(tmp_path) == []
    remove_unix_address(f"unix:{tmp_path}/own.sock")  # gone already


async def test_a_server_listens_on_several_addresses() -> None:
    async with serving(echo) as server:
        address = await server.listen_tcp("127.0.0.1")
        assert server.addresses == [server.addresses[0], address]
        for each in server.addresses:
            client = await LinkClient.connect(each, SECRET)
            assert (await client.call("m", {"x": each}, [], TIMEOUT_S)).meta == {"x": each}
            await client.close()


def test_long_names_fit_into_a_socket_address() -> None:
    address = new_unix_address(("a-very-long-name-of-a-group" * 5, "replica"))
    assert len(address.removeprefix("unix:")) < 107
    os.rmdir(os.path.dirname(address.removeprefix("unix:")))


def test_the_best_address_is_a_unix_socket_on_the_same_node() -> None:
    both = Endpoint("r", "here", ("tcp:10.0.0.1:5", "unix:/a", "unix:/b"))
    assert choose_address(both, "here") == "unix:/a"
    assert choose_address(both, "there") == "tcp:10.0.0.1:5"
    only_unix = Endpoint("r", "here", ("unix:/a",))
    assert choose_address(only_unix, "there") is None
    assert choose_address(Endpoint("r", "here", ()), "here") is None


def test_tcp_addresses_are_split() -> None:
    assert split_tcp("tcp:10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_tcp("tcp:::1:80") == ("::1", 80)


@pytest.mark.parametrize("name", [field.name for field in fields(LinkLimits)])
def test_limits_are_checked(name: str) -> None:
    wrong = -1 if name == "shared_memory_bytes" else 0  # which may be off
    with pytest.raises(ConfigurationError, match=rf"links.{name} is {wrong}; it must be above 0"):
        LinkLimits(**{name: wrong})


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pimoe"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def server_tls(certificate: tuple[Path, Path]) -> tls.SSLContext:
    context = tls.create_default_context(tls.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


def client_tls(authority: Path | None) -> tls.SSLContext:
    context = tls.create_default_context(tls.Purpose.SERVER_AUTH, cafile=authority)
    context.check_hostname = False
    return context


async def test_tensors_travel_over_tls(certificate: tuple[Path, Path]) -> None:
    async with serving(echo, "tcp", ssl=server_tls(certificate)) as server:
        client = await LinkClient.connect(server.addresses[0], SECRET, ssl=client_tls(certificate[0]))
        large = TensorData("float32", (1_000_000,), os.urandom(4_000_000))
        for tensors in ([], [tensor([1, 2])], [TensorData("int32", (0,), b""), large, tensor([3])]):
            reply = await client.call("m", {"x": 1}, tensors, TIMEOUT_S)
            assert [bytes(back.data) for back in reply.tensors] == [bytes(sent.data) for sent in tensors]
        calls = [client.call("m", {"n": n}, [tensor([n] * 5000)], TIMEOUT_S) for n in range(20)]
        assert [reply.meta["n"] for reply in await asyncio.gather(*calls)] == list(range(20))
        await client.close()
        assert client.closed


async def test_over_tls_the_ends_of_links_are_the_same(certificate: tuple[Path, Path]) -> None:
    async def never(call: Call) -> Reply:
        await asyncio.Event().wait()
        return Reply()

    async with serving(never, "tcp", ssl=server_tls(certificate)) as server:
        client = await LinkClient.connect(server.addresses[0], SECRET, ssl=client_tls(certificate[0]))
        call = asyncio.create_task(client.call("m", {}, [], TIMEOUT_S))
        await eventually(lambda: server.statistics().streams == 1)
        await server.close()
        assert server.statistics()[:2] == (0, 0)
        with pytest.raises(LinkClosedError):
            await call


async def test_a_certificate_of_another_authority_is_refused(certificate: tuple[Path, Path]) -> None:
    async with serving(must_not_be_called, "tcp", ssl=server_tls(certificate)) as server:
        with pytest.raises(LinkClosedError, match="CERTIFICATE_VERIFY_FAILED"):
            await LinkClient.connect(server.addresses[0], SECRET, ssl=client_tls(None))


async def test_tls_does_not_replace_the_secret(certificate: tuple[Path, Path]) -> None:
    async with serving(must_not_be_called, "tcp", ssl=server_tls(certificate)) as server:
        with pytest.raises(LinkAuthenticationError):
            await LinkClient.connect(server.addresses[0], b"wrong", ssl=client_tls(certificate[0]))


async def test_plain_and_tls_do_not_mix(certificate: tuple[Path, Path]) -> None:
    limits = LinkLimits(handshake_timeout_s=0.1)
    async with serving(must_not_be_called, "tcp", ssl=server_tls(certificate)) as server:
        with pytest.raises(PimoeError):
            await LinkClient.connect(server.addresses[0], SECRET, limits)
    async with serving(must_not_be_called, "tcp") as server:
        with pytest.raises(LinkClosedError):
            await LinkClient.connect(server.addresses[0], SECRET, limits, ssl=client_tls(certificate[0]))


async def test_a_peer_that_never_begins_tls_is_dropped(certificate: tuple[Path, Path]) -> None:
    limits = LinkLimits(handshake_timeout_s=TINY_S)
    async with serving(must_not_be_called, "tcp", limits=limits, ssl=server_tls(certificate)) as server:
        host, port = split_tcp(server.addresses[0])
        reader, writer = await asyncio.open_connection(host, port)
        assert await within_patience(reader.read()) == b""
        writer.close()
