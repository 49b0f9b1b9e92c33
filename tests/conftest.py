"""Fixtures for every test. The served application is started once per run: a cluster costs ten seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# Before torch is imported: with more threads than free cores its kernels wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from pimoe.deployments.cluster import LocalCluster


@pytest.fixture
def torch_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are computed by torch, as where there are no native kernels for them."""
    monkeypatch.setattr("pimoe.runtime.experts.loading.has_native", lambda *_: False)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def kernel_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of native kernels that this processor can run."""
    from pimoe.runtime.native import kernels

    try:
        name, magnitudes = kernels.module().use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "_magnitudes", magnitudes)
    yield name
    kernels.module().use(kernels.description())


@pytest.fixture(scope="session")
def application() -> Iterator[LocalCluster]:
    """The embedded model behind HTTP: group-0 with two replicas, group-1 with one."""
    from pimoe.deployments.cluster import LocalCluster, free_port
    from pimoe.deployments.settings import AppSettings

    share = {"num_cpus": 0.1}
    settings = AppSettings.model_validate(
        {
            "groups": [{**share, "num_replicas": 2}, share],
            "router": share,
            "gateway": share,
            "links": {"transport": "both"},
        }
    )
    with LocalCluster(port=free_port()) as cluster:
        cluster.start(settings)
        yield cluster
