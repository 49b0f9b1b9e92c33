"""The flags of a local cluster, and what would run on it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from pimoe.deployments import cluster
from pimoe.deployments.cluster import ClusterPorts, LocalCluster, free_port, serve_flags
from pimoe.deployments.plan import plan_table
from pimoe.deployments.settings import AppSettings
from pimoe.runtime.errors import PimoeError

FIRST, LAST = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"


def test_a_users_own_tuning_wins_and_files_are_the_clusters_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "7")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_SOCKET_PATH", "/another/cluster")
    # A cluster that runs in this process has its own there.
    monkeypatch.delenv("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", raising=False)
    flags = serve_flags(str(tmp_path), 60.0)
    assert flags["RAY_worker_niceness"] == "7"
    assert flags["RAY_SERVE_HAPROXY_SOCKET_PATH"] == f"{tmp_path}/admin.sock"
    assert flags["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] == "90"


def test_clusters_do_not_listen_where_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = 7_000, 7_500  # where no cluster of these tests has its own
    monkeypatch.setattr(cluster, "_CLUSTER_PORTS", range(first, first + 1000, 500))
    for port in (first, first + 498, first + 495):
        with socket.socket() as taken:  # of one that was killed
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("", port))
            taken.listen()
            for _ in range(20):
                ports = ClusterPorts()
                assert ports.flags()[FIRST] == str(second), port
                ports.release()
    # Of two that start at the same time neither listens yet.
    for _ in range(10):
        both = [ClusterPorts(), ClusterPorts()]
        assert {ports.flags()[FIRST] for ports in both} == {str(first), str(second)}
        for ports in both:
            ports.release()


def test_no_two_parts_of_a_cluster_listen_on_one_port() -> None:
    ports = ClusterPorts()
    numbers = {name: int(port) for name, port in ports.flags().items()}
    ports.release()
    gateways = range(numbers.pop(FIRST), numbers.pop(LAST) + 1)
    assert len(gateways) > 400
    single = list(numbers.values())
    assert len({*single}) == 4
    assert not {*single} & {*gateways}
    assert all(gateways[0] // 500 == port // 500 for port in single)


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
