"""HTTP over aiohttp: one session, a bounded pool of kept-alive connections, no cookies, no needless headers.

`load_tests/compare_http_clients.py` measures why aiohttp.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager

import aiohttp
from yarl import URL

from .errors import ConnectionFailed, PimoeClientError, ProtocolError
from .settings import Limits
from .transport import Buffer, HttpRequest, HttpResponse

# Up to here, one copy costs less than further writes do (measured: a quarter less at 64 KB, equal at 1 MB).
_JOIN_BYTES = 2**21
# What asyncio cannot send at once it copies, and sends even after the call was given up: so, a little at a time.
_WRITE_BYTES = 2**18


class AiohttpTransport:
    """A `Transport` over the network.

    Args:
        base_url: scheme, host, port and, behind a proxy, a path prefix.
        session: use this one (own TLS, proxy or tracing) rather than a new one; closing it is the giver's part.
    """

    def __init__(
        self, base_url: str, limits: Limits | None = None, session: aiohttp.ClientSession | None = None
    ) -> None:
        self._base_url = base_url
        self._limits = limits or Limits()
        self._session = session
        self._owns_session = session is None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, request: HttpRequest) -> HttpResponse:
        """See `Transport.send`."""
        headers = dict(request.headers)
        session = self._running_session()
        with _translated(self._base_url):
            response = await session.request(
                request.method,
                URL(self._base_url + request.path, encoded=True),
                data=_payload(request.body, headers),
                headers=headers,
                allow_redirects=False,
            )
        return _AiohttpResponse(response, self._base_url)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._session is not None and self._owns_session:
            await self._session.close()

    def _running_session(self) -> aiohttp.ClientSession:
        # Made at the first request: only then is it certain that a loop runs.
        loop = asyncio.get_running_loop()
        if self._session is None:
            self._session = _new_session(self._limits)
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("an AsyncClient belongs to the event loop of its first call: make another here")
        return self._session


class _AiohttpResponse:
    def __init__(self, response: aiohttp.ClientResponse, base_url: str) -> None:
        self._response = response
        self._base_url = base_url

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read_some(self) -> bytes:
        with _translated(self._base_url):
            return await self._response.content.readany()

    def close(self) -> None:
        # aiohttp gives the connection back to its pool by itself once the body has been read to its end.
        self._response.close()


def _new_session(limits: Limits) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limits.max_connections, keepalive_timeout=limits.keepalive_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_timeout_s),
    )


def _payload(body: tuple[Buffer, ...], headers: dict[str, str]) -> bytes | AsyncIterator[Buffer] | None:
    """What aiohttp sends: small bodies as one, large ones piece by piece and uncopied."""
    if not body:
        return None
    nbytes = sum(len(piece) for piece in body)
    if nbytes <= _JOIN_BYTES:
        return b"".join(body)
    headers["Content-Length"] = str(nbytes)  # or aiohttp would use chunked encoding
    return _pieces(body)


async def _pieces(body: tuple[Buffer, ...]) -> AsyncIterator[Buffer]:
    for piece in body:
        for start in range(0, len(piece), _WRITE_BYTES):
            yield piece[start : start + _WRITE_BYTES]


@contextmanager
def _translated(base_url: str) -> Iterator[None]:
    """aiohttp's errors as ours."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        raise _translate(error, base_url) from error


def _translate(error: Exception, base_url: str) -> PimoeClientError:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return ConnectionFailed(f"the host of {base_url} is not known: {error.os_error}")
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.ECONNREFUSED:
        return ConnectionFailed(f"nothing listens at {base_url}; start it with `pimoe serve`")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return ConnectionFailed(f"no connection to {base_url} in time; is its address right?")
    if isinstance(error, aiohttp.ClientConnectorError):
        return ConnectionFailed(f"no connection to {base_url}: {error.os_error}")
    if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientResponseError):
        return ProtocolError(f"{base_url} does not answer in HTTP: {error}")
    return ConnectionFailed(f"the connection to {base_url} broke: {str(error) or type(error).__name__}")
