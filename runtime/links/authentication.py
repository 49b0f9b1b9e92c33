"""Mutual proof of the application's link secret, before anything else is read from a peer.

Challenge and response with HMAC-SHA-256 over both sides' nonces and the prover's role; the role keeps a
reflected proof from being accepted. The secret itself never travels.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 32
_CONTEXT = b"pimoe-link-1|"


def new_nonce() -> bytes:
    """A fresh challenge."""
    return secrets.token_bytes(NONCE_BYTES)


def new_secret() -> str:
    """A fresh application secret, as text that fits into a configuration."""
    return secrets.token_hex(32)


def prove(secret: bytes, role: bytes, own_nonce: bytes, peer_nonce: bytes) -> bytes:
    """Proof that `role` ("client" or "server") knows `secret`, bound to both nonces."""
    return hmac.digest(secret, _CONTEXT + role + b"|" + own_nonce + peer_nonce, hashlib.sha256)


def verify(secret: bytes, role: bytes, peer_nonce: bytes, own_nonce: bytes, proof: object) -> bool:
    """Whether `proof` is the one that the peer in `role` must have sent; constant time."""
    if not isinstance(proof, bytes) or len(peer_nonce) != NONCE_BYTES:
        return False
    return hmac.compare_digest(prove(secret, role, peer_nonce, own_nonce), proof)
