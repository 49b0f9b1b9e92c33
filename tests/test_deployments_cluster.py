"""The flags of a local cluster, and what would run on it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from pimoe.deployments import cluster
from pimoe.deployments.cluster import IngressPorts, LocalCluster, free_port, serve_flags
from pimoe.deployments.plan import plan_table
from pimoe.deployments.settings import AppSettings
from pimoe.runtime.errors import PimoeError

FIRST, LAST = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"


def test_a_users_own_tuning_wins_and_files_and_ports_are_the_clusters_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "7")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_SOCKET_PATH", "/another/cluster")
    monkeypatch.setenv(FIRST, "30000")
    # A cluster that runs in this process has its own there.
    monkeypatch.delenv("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", raising=False)
    flags = serve_flags(str(tmp_path), 60.0)
    assert flags["RAY_worker_niceness"] == "7"
    assert flags["RAY_SERVE_HAPROXY_SOCKET_PATH"] == f"{tmp_path}/admin.sock"
    assert flags["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] == "90"
    other = serve_flags(str(tmp_path), 60.0)
    for name in ("STATS", "METRICS"):
        assert flags[f"RAY_SERVE_HAPROXY_{name}_PORT"] != other[f"RAY_SERVE_HAPROXY_{name}_PORT"]
    for name in ("HTTP", "GRPC"):  # or it would answer for this cluster when no gateway does
        assert flags[f"RAY_SERVE_FALLBACK_PROXY_{name}_PORT"] != other[f"RAY_SERVE_FALLBACK_PROXY_{name}_PORT"]


def test_gateways_do_not_listen_where_those_of_another_cluster_do(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = 7_000, 7_500  # where no cluster of these tests has its own
    monkeypatch.setattr(cluster, "_INGRESS_PORTS", range(first, first + 1000, 500))
    with socket.socket() as taken:  # of one that was killed
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", first))
        taken.listen()
        for _ in range(20):
            ports = IngressPorts()
            assert ports.flags() == {FIRST: "7500", LAST: "7998"}
            ports.release()
    # Of two that start at the same time neither listens yet.
    for _ in range(10):
        both = [IngressPorts(), IngressPorts()]
        assert {ports.first for ports in both} == {first, second}
        for ports in both:
            ports.release()


def test_the_environment_is_as_it_was_after_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next cluster in this process would take the timeouts of this one for the user's own."""

    def no_ray() -> None:
        raise PimoeError("no Ray today")

    monkeypatch.setattr(cluster, "_import_quietly", no_ray)
    monkeypatch.setenv("RAY_worker_niceness", "7")
    before = dict(os.environ)
    made = LocalCluster(port=free_port())
    with pytest.raises(PimoeError, match="no Ray today"):
        made.start(AppSettings())
    assert os.environ["PIMOE_SOCKET_FOLDER"] == made._files.name
    made.stop()
    assert dict(os.environ) == before


def test_a_plan_counts_a_byte_for_each_number_of_int8_experts() -> None:
    def weights_of_a_group(quantization: str | None) -> str:
        cells = list(
            plan_table(AppSettings.model_validate({"expert_quantization": quantization})).columns[3].cells
        )
        return str(cells[2])

    assert weights_of_a_group(None) == "3.0 MiB"
    assert weights_of_a_group("int8") == "768.0 KiB"
