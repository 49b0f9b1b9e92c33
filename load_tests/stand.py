"""The measuring stand: one local cluster that serves one model after another, and leaves nothing behind."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from pimoe.clients import Client
from pimoe.deployments.cluster import APP_NAME, LocalCluster, free_port, owned_cluster
from pimoe.deployments.local_settings import local_settings
from pimoe.deployments.processes import supervise
from pimoe.deployments.settings import AppSettings
from pimoe.runtime.errors import PimoeError
from report import progress

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
_READY_TIMEOUT_S = 60.0


class Stand:
    """A cluster that starts with the first model."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._started = False

    @property
    def url(self) -> str:
        """Where the application answers."""
        return self._cluster.url

    def serve(self, model: Path | None, groups: int, overrides: dict[str, Any] | None = None) -> None:
        """Serve `model` (None: the embedded one) as `pimoe serve` would, in place of the one before; `overrides`
        as in a file for `pimoe serve --config`."""
        settings = local_settings(None if model is None else str(model.resolve()), groups, overrides=overrides)
        if self._started:
            self._replace(settings)
        else:
            self._cluster.start(settings, progress)
            self._started = True

    def _replace(self, settings: AppSettings) -> None:
        from pimoe.deployments.app import build
        from ray import serve

        progress("serving another model")
        serve.delete(APP_NAME)
        serve.run(build(settings), name=APP_NAME, route_prefix="/", logging_config=QUIET)
        until = time.monotonic() + _READY_TIMEOUT_S
        with Client(self.url) as client:
            while not client.health().ready:
                if time.monotonic() > until:
                    raise TimeoutError(f"the application was not ready within {_READY_TIMEOUT_S:g} s")
                time.sleep(0.1)


@contextmanager
def stand() -> Iterator[Stand]:
    """A stand for the block. Ray's warnings are lines on standard output, which is for results: until the cluster
    has ended that is standard error."""
    with redirect_stdout(sys.stderr), owned_cluster("127.0.0.1", free_port(), progress) as cluster:
        yield Stand(cluster)


def supervised(work: Callable[[], None]) -> NoReturn:
    """Run `work` in a process of its own, and exit when it and all that it started have ended. Interrupts, and
    errors of pimoe's own, end it with one line."""
    sys.exit(supervise(lambda: _exit_code(work)))


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
    except KeyboardInterrupt:
        return 130
    except PimoeError as error:
        print(f"error [{error.code}] {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
