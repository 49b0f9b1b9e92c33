"""Links: framed, multiplexed, bidirectional streams between two processes; the data plane.

`frames` is pure bytes <-> values, `authentication` the mutual proof of the secret, `connection` one socket,
`client` and `server` the two ends, `pool` a client's links to all replicas of a deployment. Nothing here knows
of experts, routers, torch or Ray.
"""

from .addresses import Endpoint, choose_address
from .client import LinkClient
from .connection import LinkLimits
from .messages import Call, Packed, Reply
from .pool import LinkPool
from .sent import SentCall
from .server import LinkServer

__all__ = [
    "Call",
    "Endpoint",
    "LinkClient",
    "LinkLimits",
    "LinkPool",
    "LinkServer",
    "Packed",
    "Reply",
    "SentCall",
    "choose_address",
]
