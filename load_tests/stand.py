"""The measuring stand: one local cluster with the served application, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pimoe.deployments.cluster import LocalCluster, free_port, owned_cluster
from pimoe.deployments.local_settings import local_settings
from pimoe.runtime.errors import PimoeError
from report import progress


@contextmanager
def served(model: Path | None, groups: int) -> Iterator[LocalCluster]:
    """The default local deployment of `model` (None: the embedded one), as `pimoe serve` starts it."""
    settings = local_settings(None if model is None else str(model.resolve()), groups)
    with owned_cluster("127.0.0.1", free_port(), progress) as cluster:
        cluster.start(settings, progress)
        yield cluster


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Interrupts and pimoe's own errors end the script with one line, not with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except PimoeError as error:
        sys.exit(f"error [{error.code}] {error}")
