"""Emulated hosts: what reaches what and how fast, what ranks on them are told, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeed_inference.benchmarks import emulated_hosts as module
from deepspeed_inference.benchmarks.emulated_hosts import EmulationUnavailable, emulated_hosts, measure_link, on_hosts

GBIT = 1e9 / 8


@pytest.fixture(scope="module")
def privileged() -> None:
    """Skip where this user cannot make networks; by commands of its own, so that a defect of ours does not skip."""
    name = f"probe-{os.getpid()}"
    bucket = "tbf rate 1gbit burst 64kb limit 1mb"
    command = f"ip netns add {name} && tc -n {name} qdisc add dev lo root {bucket}; code=$?; ip netns delete {name}"
    ended = subprocess.run(["sh", "-c", f"{command}; exit $code"], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"needs root and the kernel's namespaces and tbf: {ended.stderr.strip()}")


@pytest.fixture
def clean(privileged):
    """Nothing of ours is left behind the test."""
    yield
    assert not _ours()


def _ours() -> list[str]:
    folder = Path("/run/netns")
    return [path.name for path in folder.glob(f"ssm-{os.getpid()}-*")] if folder.is_dir() else []


def test_hosts_reach_one_another_and_no_other_network(clean):
    with emulated_hosts(2) as pair, emulated_hosts(3) as three:
        with three[2].inside(), socket.create_server((three[2].address, 0)) as listener:
            place = listener.getsockname()
            assert _reaches(three[0], place)
            assert _reaches(three[2], place)
            assert not _reaches(pair[0], place)
        with socket.create_server(("127.0.0.1", 0)) as listener:  # this machine's own
            assert not _reaches(pair[0], listener.getsockname())
        with pair[0].inside():
            assert [name for _, name in socket.if_nameindex()] == ["lo", "eth0"]
    assert len(socket.if_nameindex()) >= 1


def _reaches(host, place: tuple[str, int]) -> bool:
    try:
        with host.inside(), socket.create_connection(place, timeout=0.3):
            return True
    except OSError:
        return False


def test_a_link_has_its_rate_in_both_directions(clean):
    with emulated_hosts(2, 0.2) as hosts:
        link = measure_link(*hosts)
        assert 0.1 * GBIT < link.both_ways <= link.one_way * 1.1 < 0.22 * GBIT
        assert 1e-6 < link.round_trip < 20e-3
        # A few hundred KB at once take their time too: no more than two packets pass for free.
        assert _seconds(hosts, 400_000) > 0.8 * 400_000 / (0.2 * GBIT)
    with emulated_hosts(2) as hosts:
        assert measure_link(*hosts, seconds=0.2).one_way > 0.5 * GBIT


def _seconds(hosts, nbytes: int) -> float:
    with module._connected(*hosts) as (near, far):
        began = time.perf_counter()
        near.sendall(bytes(nbytes))
        left = nbytes
        while left:
            left -= len(far.recv(min(left, 1 << 16)))
        return time.perf_counter() - began


def test_ranks_are_told_where_they_are_and_leave_nothing(clean):
    answers = on_hosts(_where, 2, 2, 1.0, "x", timeout=60)
    assert [answer[:5] for answer in answers] == [
        ("0", "4", "0", "2", "emulated-0"),
        ("1", "4", "1", "2", "emulated-0"),
        ("2", "4", "0", "2", "emulated-1"),
        ("3", "4", "1", "2", "emulated-1"),
    ]
    for rank, (*_, argument, sent, outside) in enumerate(answers):
        assert argument == "x"
        assert sent >= (100_000 if rank == 2 else 0), "what the connection sent is counted at the link"
        assert not outside, "the machine's own network is out of reach"


def _where(argument: str) -> tuple:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MEGATRON_SSM_HOST_ID")
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0":
        with socket.create_server(place) as listener:
            connection, _ = listener.accept()
            with connection:
                while connection.recv(1 << 16):
                    pass
    if os.environ["RANK"] == "2":
        with _connect(place) as connection:
            connection.sendall(bytes(100_000))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # returns when rank 0 has read all of it, and so the link has passed it
    outside = [name for _, name in socket.if_nameindex() if name not in ("lo", os.environ["GLOO_SOCKET_IFNAME"])]
    return *(os.environ[name] for name in names), argument, module.sent_bytes(), outside


def _connect(place: tuple[str, int]) -> socket.socket:
    for _ in range(300):  # rank 0 may be slower
        try:
            return socket.create_connection(place, timeout=10)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("rank 0 did not listen")


def test_a_rank_that_dies_or_hangs_ends_all_of_them(clean, capfd):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of the benchmark died"):
        on_hosts(_fail_or_hang, 2, 1, None, "1", timeout=100)
    assert "the rank's own error" in capfd.readouterr().err
    assert not _ours()
    with pytest.raises(RuntimeError, match=r"ranks \[0\] of the benchmark did not answer in 0.5 s"):
        on_hosts(_fail_or_hang, 1, 1, None, "none", timeout=0.5)
    assert time.monotonic() - began < 50


def _fail_or_hang(failing: str) -> None:
    if os.environ["RANK"] == failing:
        raise ValueError("the rank's own error")
    time.sleep(1000)


def test_nothing_is_left_by_exceptions_signals_and_the_dead(clean):
    with pytest.raises(KeyError), emulated_hosts(2):
        assert len(_ours()) == 3  # the switch too
        raise KeyError
    assert not _ours()
    handler = signal.getsignal(signal.SIGTERM)
    code = (
        "import os, signal, time\nfrom deepspeed_inference.benchmarks.emulated_hosts import emulated_hosts\n"
        "with emulated_hosts(1):\n print(os.getpid(), flush=True)\n time.sleep(100)\n"
    )
    for number, remains in ((signal.SIGTERM, 0), (signal.SIGKILL, 2)):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            pid = int(process.stdout.readline())
            process.send_signal(number)
            process.wait(20)
        assert len(list(Path("/run/netns").glob(f"ssm-{pid}-*"))) == remains
    with emulated_hosts(1):
        assert not list(Path("/run/netns").glob(f"ssm-{pid}-*")), "whoever comes next removes what the dead have left"
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_cannot_be_is_refused(monkeypatch):
    for hosts, rate in ((0, None), (251, None), (2, 0.0), (2, -1.0), (2, float("nan"))):
        with pytest.raises(ValueError, match="expected"), emulated_hosts(hosts, rate):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(module, "_effective_capabilities", lambda: 1 << 12)
        with pytest.raises(EmulationUnavailable, match=r"root .*lacks CAP_SYS_ADMIN$"), emulated_hosts(2):
            pass
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EmulationUnavailable, match="no ip and no tc"), emulated_hosts(2):
        pass
