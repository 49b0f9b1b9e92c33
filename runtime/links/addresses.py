"""Where replicas listen. An address is `unix:/path/to.sock` or `tcp:host:port`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError

_FOLDER_PREFIX = "pimoe-"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One replica as discovery describes it.

    Attributes:
        replica_id: unique among all replicas, also over restarts.
        node_id: replicas with the same one share a machine, and so can use Unix sockets.
        info: whatever else the replica tells of itself (experts held, digest, load).
    """

    replica_id: str
    node_id: str
    addresses: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)


def choose_address(endpoint: Endpoint, own_node_id: str) -> str | None:
    """The best address of `endpoint` from `own_node_id`: a Unix socket on the same node, else TCP."""
    unix = [a for a in endpoint.addresses if a.startswith("unix:")]
    if unix and endpoint.node_id == own_node_id:
        return unix[0]
    return next((a for a in endpoint.addresses if a.startswith("tcp:")), None)


def split_tcp(address: str) -> tuple[str, int]:
    """`tcp:host:port` -> (host, port).

    Raises:
        ConfigurationError: not such an address.
    """
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    if not address.startswith("tcp:") or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"address {address!r} is not of the form tcp:host:port")
    return host, int(port)


def new_unix_address(names: Sequence[str] = ("pimoe",)) -> str:
    """A Unix address in a fresh directory that only this user can enter: below PIMOE_SOCKET_FOLDER if that is set.

    The path is short on purpose: the kernel allows 107 bytes.
    """
    folder = tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=os.environ.get("PIMOE_SOCKET_FOLDER"))  # mode 0700
    return "unix:" + os.path.join(folder, "-".join(names)[:40] + ".sock")


def remove_unix_address(address: str) -> None:
    """Remove the socket, and its directory when `new_unix_address` made that."""
    path = address.removeprefix("unix:")
    folder = os.path.dirname(path)
    with contextlib.suppress(OSError):  # newer Pythons remove a socket when its server closes
        os.unlink(path)
    if os.path.basename(folder).startswith(_FOLDER_PREFIX):
        with contextlib.suppress(OSError):  # others use it too
            os.rmdir(folder)
