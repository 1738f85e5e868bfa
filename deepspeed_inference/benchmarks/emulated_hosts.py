"""Hosts that this machine only plays: network namespaces, each behind a link of a chosen rate, joined by a switch.

    host 0: ranks ─ eth0 ══════ port0 ┐
    host 1: ranks ─ eth0 ══════ port1 ┤ bridge, in a namespace of its own        ══ a link: limited both ways
    …                                 ┘

What runs in a host reaches the others through its link and nothing else, so ranks on several of them measure a network
that is not there. Processor and memory are shared all the same. Linux only, and root: namespaces and queueing are
made by `ip` and `tc`. The limit is a token bucket (tc-tbf(8)) at each end of a link, in the direction that leaves it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import IPPROTO_TCP, SHUT_WR, TCP_NODELAY, create_connection, create_server, socket

from deepspeed_inference.benchmarks.benchmarking import Launch, launched

INTERFACE = "eth0"
DEFAULT_TIMEOUT_SECONDS = 600.0
_PORT = 29500  # free: nobody else is in the namespace
_NAMESPACES = Path("/run/netns")
_OURS = re.compile(r"ssm-(\d+)-\d+-\w+")
_CLONE_NEWNET = 0x40000000
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
# The kernel hands packets of up to 64 KiB to an adapter, which cuts them. Here the bucket would cut them, with a timer
# for every 1.5 KB: so they are made no larger than what the link takes in this time.
_PACKET_SECONDS = 100e-6
_PACKET_BYTES = 3200, 65536  # at least, at most
_PACKETS_AT_ONCE = 2  # a real adapter sends nothing faster than its rate; the bucket needs some room
# Of the queue before a link, in bytes: nothing is dropped, as in a network with flow control.
_QUEUE = 64 << 20
_serial = itertools.count()


class EmulationUnavailable(RuntimeError):
    """This machine, or this user, cannot make emulated hosts."""


@dataclass(frozen=True)
class EmulatedHost:
    """One of them.

    Attributes:
        number: from 0.
        namespace: of the network, as `ip netns` calls it; None for that of this machine itself.
        address: at which the other hosts reach it, through its `INTERFACE`.
    """

    number: int
    namespace: str | None
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put this thread into the host: sockets and processes that it makes meanwhile belong there for good."""
        if self.namespace is None:
            yield
            return
        with open("/proc/thread-self/ns/net") as home, open(_NAMESPACES / self.namespace) as there:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())


THIS_MACHINE = EmulatedHost(0, None, "127.0.0.1")


@dataclass(frozen=True)
class MeasuredLink:
    """What a plain TCP connection between two hosts gets.

    Attributes:
        one_way: bytes a second while one of them sends.
        both_ways: bytes a second in each direction while both send, as ranks do that exchange something.
        round_trip: seconds for a byte there and one back.
    """

    one_way: float
    both_ways: float
    round_trip: float


def on_hosts(
    function: Callable,
    hosts: int,
    ranks_per_host: int,
    rate: float | None,
    *arguments,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> list:
    """What `function(*arguments)` returns on each of `ranks_per_host` fresh ranks on each of `hosts` emulated hosts.

    Args:
        function: of a module's top level.
        rate: of each link, in Gbit/s; None for no limit.
        timeout: seconds until the ranks are ended.

    Raises:
        EmulationUnavailable: there is no root, or no `ip` and `tc`.
        RuntimeError: a rank died, or did not answer in time.
    """
    with emulated_hosts(hosts, rate) as made:
        return on_ranks_of(made, function, ranks_per_host, *arguments, timeout=timeout)


def on_ranks_of(
    hosts: Sequence[EmulatedHost],
    function: Callable,
    ranks_per_host: int,
    *arguments,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> list:
    """`on_hosts` with hosts that are there already."""
    launches = []
    for host, local_rank in itertools.product(hosts, range(ranks_per_host)):
        environment = {
            "RANK": len(launches),
            "WORLD_SIZE": len(hosts) * ranks_per_host,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": ranks_per_host,
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": _PORT,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            # The kernel is the same: without it the ranks would take one another for neighbours.
            "MEGATRON_SSM_HOST_ID": f"emulated-{host.number}",
        }
        launches.append(Launch(environment, host.inside))
    return launched(function, arguments, launches, timeout)


@contextmanager
def emulated_hosts(hosts: int, rate: float | None = None) -> Iterator[list[EmulatedHost]]:
    """Make hosts; they are gone when the context is left, also by an exception or SIGTERM.

    Args:
        hosts: how many.
        rate: of each link, in Gbit/s; None for no limit.

    Raises:
        ValueError: a number is out of range.
        EmulationUnavailable: there is no root, or no `ip` and `tc`.
    """
    if not 1 <= hosts <= 250:
        raise ValueError(f"hosts: expected 1 to 250, found {hosts}")
    if rate is not None and not 0.001 <= rate <= 1000:
        raise ValueError(f"rate: expected 0.001 to 1000 Gbit/s, or None, found {rate}")
    check_available()
    _remove_leftovers()
    prefix = f"ssm-{os.getpid()}-{next(_serial)}"
    with ExitStack() as stack:
        stack.enter_context(_sigterm_unwinds())
        switch = _make_namespace(f"{prefix}-switch", stack)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        made = [EmulatedHost(n, f"{prefix}-host{n}", f"10.77.0.{n + 1}") for n in range(hosts)]
        for host in made:
            _make_namespace(host.namespace, stack)
            _plug_in(host, switch, rate)
        yield made


def measure_link(first: EmulatedHost, second: EmulatedHost, seconds: float = 0.4) -> MeasuredLink:
    """Measure the link between two hosts, for `seconds` each way of using it."""
    with _connected(first, second) as (near, far):
        round_trip = _round_trip(near, far)
    with _connected(first, second) as (near, far):
        one_way = _throughput([(near, far)], seconds)
    with _connected(first, second) as (near, far):
        both_ways = _throughput([(near, far), (far, near)], seconds)
    return MeasuredLink(one_way[0], min(both_ways), round_trip)


def sent_bytes() -> int:
    """All that the host, in which this process runs, has sent through its link so far, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise ValueError(f"expected to run on an emulated host, found no {INTERFACE}")


def check_available() -> None:
    """Raise EmulationUnavailable, in words, where emulated hosts cannot be made."""
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if missing:
        raise EmulationUnavailable(f"emulated hosts need iproute2: found no {' and no '.join(missing)}")
    effective = _effective_capabilities()
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise EmulationUnavailable(
            f"emulated hosts need root ({' and '.join(_CAPABILITIES)}): this process lacks {' and '.join(missing)}"
        )


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("CapEff:")[1].split()[0], 16)


def _make_namespace(name: str, stack: ExitStack) -> str:
    stack.callback(_remove_namespace, name)  # first: a signal may come in between
    _ip("netns", "add", name)
    return name


def _remove_namespace(name: str) -> None:
    if (_NAMESPACES / name).exists():
        _ip("netns", "delete", name)


def _remove_leftovers() -> None:
    """Remove namespaces of ours whose process was killed before it could."""
    for file in _NAMESPACES.glob("ssm-*"):
        match = _OURS.fullmatch(file.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with suppress(RuntimeError):  # another process that starts now may have done so
                _remove_namespace(file.name)


def _plug_in(host: EmulatedHost, switch: str, rate: float | None) -> None:
    port = f"port{host.number}"
    _ip("-n", host.namespace, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        _ip("-n", host.namespace, "link", "set", interface, "up")
    if rate is not None:
        for namespace, interface in ((host.namespace, INTERFACE), (switch, port)):
            _limit(namespace, interface, rate)
    with host.inside():
        # The kernel's classic one: others pace by what they have seen of the link, which a benchmark's pauses disturb.
        Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")


def _limit(namespace: str, interface: str, rate: float) -> None:
    smallest, largest = _PACKET_BYTES
    packet = min(max(smallest, round(rate * 1e9 / 8 * _PACKET_SECONDS)), largest)
    burst = _PACKETS_AT_ONCE * packet
    _ip("-n", namespace, "link", "set", interface, "gso_max_size", f"{packet}")
    bucket = ["tbf", "rate", f"{round(rate * 1e6)}kbit", "burst", f"{burst}b", "limit", f"{_QUEUE}b"]
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *bucket)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise EmulationUnavailable(f"{' '.join(command)} failed: {ended.stderr.strip()}")


def _set_namespace(descriptor: int) -> None:
    # os.setns came with Python 3.12.
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM leave through every `finally`, where nobody has asked for something else."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _connected(first: EmulatedHost, second: EmulatedHost) -> Iterator[tuple[socket, socket]]:
    """A TCP connection: its ends in the two hosts. Sockets stay where they were made, whoever uses them."""
    with ExitStack() as stack:
        with second.inside():
            listener = stack.enter_context(create_server((second.address, 0)))
        listener.settimeout(10)
        with first.inside():
            near = stack.enter_context(create_connection(listener.getsockname(), timeout=10))
        far = stack.enter_context(listener.accept()[0])
        for end in (near, far):
            end.settimeout(10)
            end.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        yield near, far


def _round_trip(near: socket, far: socket, turns: int = 200) -> float:
    def answer() -> None:
        for _ in range(turns):
            far.sendall(far.recv(1))

    with ThreadPoolExecutor(1) as thread:
        answering = thread.submit(answer)
        seconds = []
        for _ in range(turns):
            began = time.perf_counter()
            near.sendall(b"x")
            near.recv(1)
            seconds.append(time.perf_counter() - began)
        answering.result()
    return statistics.median(seconds)


def _throughput(pairs: list[tuple[socket, socket]], seconds: float) -> list[float]:
    """Bytes a second from each sender to its receiver, all at once, behind a warm-up of half the time."""
    begin = time.perf_counter() + seconds / 2
    end = begin + seconds
    with ThreadPoolExecutor(2 * len(pairs)) as threads:
        sending = [threads.submit(_send_until, end, sender) for sender, _ in pairs]
        receiving = [threads.submit(partial(_received_between, begin, end), receiver) for _, receiver in pairs]
        for thread in sending:
            thread.result()
        return [thread.result() / seconds for thread in receiving]


def _send_until(end: float, sender: socket) -> None:
    piece = bytes(1 << 18)
    while time.perf_counter() < end:
        sender.sendall(piece)
    sender.shutdown(SHUT_WR)


def _received_between(begin: float, end: float, receiver: socket) -> int:
    buffer, counted = bytearray(1 << 18), 0
    while received := receiver.recv_into(buffer):
        if begin <= time.perf_counter() < end:
            counted += received
    return counted
