"""A table sharded over two hosts by launch/torchrun.sh: one host's losses, also after faults."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.two_hosts import TwoHosts, two_hosts, why_not
from tests.launched import (
    FOUND,
    RESUMED,
    Launched,
    descendants,
    flags,
    launch,
    losses_of,
    printed_losses,
)

STEPS, SAVE_INTERVAL = 120, 20
STALL_SECONDS = 5

pytestmark = pytest.mark.slow


def _arguments(folder: Path) -> list[str]:
    return flags(folder, train_iters=STEPS, save_interval=SAVE_INTERVAL, ultramem_parallel_size=2)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> dict[int, str]:
    """Losses of two ranks of one host."""
    folder = tmp_path_factory.mktemp("one_host")
    with launch(folder, _arguments(folder)) as run:
        assert run.wait() == 0, run.output()
    assert sorted(run.losses()) == [1, *range(3, STEPS + 1)]
    return run.losses()


@pytest.fixture
def hosts(tmp_path) -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path) as both:
        yield both


@contextmanager
def _on(hosts: TwoHosts, node: int, folder: Path, name: str = "") -> Iterator[Launched]:
    settings = {
        "NNODES": "2",
        "NPROC": "1",
        "MASTER_ADDR": "node1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "STALL_SECONDS": str(STALL_SECONDS),
        "JOIN_SECONDS": "60",
    }
    with launch(folder, _arguments(folder), settings, hosts.on(node), name or f"node{node}") as run:
        yield run


def _assert_curve_of_one_host(one_host: dict[int, str], folder: Path) -> None:
    losses: dict[int, str] = {}
    for output in folder.glob("*.log"):  # a rank's own file may have been written over
        losses.update(losses_of(output.read_text()))
    for logs in folder.glob("*_logs"):
        losses.update(printed_losses(logs))
    assert losses == {step: one_host[step] for step in losses if step in one_host}
    assert len(losses) >= STEPS - 4
    assert STEPS in losses


def test_two_hosts_give_the_losses_of_one(one_host, hosts, tmp_path):
    with _on(hosts, 1, tmp_path) as first, _on(hosts, 2, tmp_path) as second:
        assert first.wait() == 0, first.output()
        assert second.wait() == 0, second.output()
    _assert_curve_of_one_host(one_host, tmp_path)


def _wait_for_iteration(step: int, *runs: Launched) -> None:
    """Whichever of the nodes has the rank that prints."""
    until = time.monotonic() + 120
    while not any(step in run.iterations() for run in runs):
        assert time.monotonic() < until, [run.output() for run in runs]
        time.sleep(0.02)


def test_a_link_that_was_cut(one_host, hosts, tmp_path):
    with _on(hosts, 1, tmp_path) as first, _on(hosts, 2, tmp_path) as second:
        _wait_for_iteration(30, first, second)
        hosts.set_link(2, "down")
        cut = time.monotonic()
        first.wait_for(FOUND)
        detected = time.monotonic() - cut
        time.sleep(3)
        hosts.set_link(2, "up")
        up = time.monotonic()
        first.wait_for(RESUMED)
        resumed = time.monotonic() - up
        assert first.wait() == 0, first.output()
        assert second.wait() == 0, second.output()
    print(f"link cut: {detected:.1f} s to detect, {resumed:.1f} s to resume when it is back")
    _assert_curve_of_one_host(one_host, tmp_path)
    assert detected < STALL_SECONDS + 10


def test_a_lost_node_that_comes_back(one_host, hosts, tmp_path):
    with _on(hosts, 1, tmp_path) as first:
        with _on(hosts, 2, tmp_path) as second:
            _wait_for_iteration(30, first, second)
            hosts.set_link(2, "down")
            for process in (second.process.pid, *descendants(second.process.pid)):
                os.kill(process, signal.SIGKILL)
        lost = time.monotonic()
        first.wait_for(FOUND)
        detected = time.monotonic() - lost
        hosts.set_link(2, "up")
        with _on(hosts, 2, tmp_path, "node2_again") as again:
            back = time.monotonic()
            first.wait_for(RESUMED)
            resumed = time.monotonic() - back
            assert first.wait() == 0, first.output()
            assert again.wait() == 0, again.output()
    print(f"node lost: {detected:.1f} s to detect, {resumed:.1f} s to resume when it is back")
    _assert_curve_of_one_host(one_host, tmp_path)
    assert detected < STALL_SECONDS + 10
