"""Python's garbage collector in processes that serve."""

from __future__ import annotations

import gc

# Objects that are made and not yet freed, until the youngest are looked through; 700 by default. Those of the
# requests under way are as many, and are alive: looking through them again and again took some 8% of a gateway's
# processor time, and found nothing, since what serves a request makes few cycles. Not many more: one may hold
# a body.
_YOUNG = 10_000


def settle() -> None:
    """What exists now stays, and is looked at no more: torch alone is 170,000 objects, which would hold requests
    up for 0.1 s. What comes is looked through less often. Once in a process's life."""
    if gc.get_freeze_count():
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG)
