"""
Hosts of one's own on one machine: network namespaces joined by a bridge, each behind a token bucket. Needs root and
iproute2.

    with Hosts(4, mbit_per_s=100) as hosts:
        hosts.launch("recipes/image/train.py", "--max_steps", "24")
        print(hosts.bytes_sent(0))

Everything is in namespaces of its own, and goes with the `with` block, also after an error or Ctrl-C.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "configs" / "cpu_two_processes.yaml"
PORT = 29500
RT_LIMIT = Path("/proc/sys/kernel/sched_rt_runtime_us")
LATENCY_MS = 50  # of a full token bucket's queue: about 100 full packets at 20 Mbit/s


def why_not() -> str | None:
    """Why there can be no hosts here, and what to do; None where they can be."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2 (Debian: apt install iproute2)."
    if os.geteuid() != 0:
        return "network namespaces need root: run this as root, for example with sudo."
    tried = subprocess.run(["ip", "netns", "add", f"slowmo-{os.getpid()}-try"], capture_output=True, text=True)
    if tried.returncode:
        return (
            f"network namespaces cannot be made here ({tried.stderr.strip()}): a container needs CAP_SYS_ADMIN "
            "and CAP_NET_ADMIN."
        )
    _run("ip", "netns", "delete", f"slowmo-{os.getpid()}-try")
    return None


class Hosts:
    """
    Args:
        count (`int`): Hosts, with addresses 10.77.0.1, 10.77.0.2, ...
        mbit_per_s (`float`, *optional*): What each may send, and receive; None is as fast as the machine.
        mtu (`int`, *optional*, defaults to `1500`): Bytes of a packet.
        real_time (`bool`, *optional*, defaults to `False`): Programs run at once when they can (SCHED_RR). Hosts share
            cores here, and Linux's fair scheduler lets a thread that a message wakes wait for a slice of 3 ms: with it
            a gather of 64 bytes takes 3.4 ms between two idle processes, without it 0.2 ms. Hosts with cores of their
            own have no such wait. Meanwhile the kernel's limit on such programs is lifted: after a second of full load
            it would stop all for 50 ms.
        mates (`int`, *optional*, defaults to `1`): So many neighbouring hosts stand for the processes of one machine:
            they reach each other by links of their own, as fast as the machine, and others behind their token buckets.

    Raises:
        RuntimeError: There is no root, no iproute2, or the kernel refuses.
    """

    def __init__(
        self,
        count: int,
        mbit_per_s: float | None = None,
        mtu: int = 1500,
        real_time: bool = False,
        mates: int = 1,
    ) -> None:
        self.count, self.mbit_per_s, self.mtu, self.mates = count, mbit_per_s, mtu, mates
        self._scheduler = ["chrt", "--rr", "10"] if real_time else []
        self._rt_limit_before = RT_LIMIT.read_text() if real_time and RT_LIMIT.exists() else None
        self._prefix = f"slowmo-{os.getpid()}"
        self._printed: dict[
            subprocess.Popen[str], IO[str]
        ] = {}  # files: a pipe that nobody reads would stop the program that fills it

    def __enter__(self) -> Hosts:
        refusal = why_not()
        if refusal:
            raise RuntimeError(f"no hosts of one's own: {refusal}")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that it cleans up
        try:
            if self._rt_limit_before is not None:
                RT_LIMIT.write_text("-1")
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    # ---- the network ----

    def _build(self) -> None:
        switch = self._name("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "mtu", str(self.mtu), "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in range(self.count):
            name, port = self._name(host), f"port{host}"
            _run("ip", "netns", "add", name)
            _run(
                "ip",
                "-n",
                switch,
                "link",
                "add",
                port,
                "mtu",
                str(self.mtu),
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            _run("ip", "-n", name, "link", "set", "eth0", "mtu", str(self.mtu))
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
        for one, other in itertools.combinations(range(self.count), 2):
            if one // self.mates == other // self.mates:
                self._join(one, other)
        self.throttle(self.mbit_per_s)

    def _join(self, one: int, other: int) -> None:
        """
        Two hosts by a link that nothing else takes. Their addresses stay those of eth0, which gloo gives to all.
        """
        link = ["link", "add", f"mate{other}", "mtu", str(self.mtu), "type", "veth"]
        _run("ip", "-n", self._name(one), *link, "peer", "name", f"mate{one}", "netns", self._name(other))
        for here, there in ((one, other), (other, one)):
            name, device = self._name(here), f"mate{there}"
            _run("ip", "-n", name, "link", "set", device, "mtu", str(self.mtu), "up")
        for here, there in ((one, other), (other, one)):
            way = [self.address(there), "dev", f"mate{there}", "src", self.address(here)]
            _run("ip", "-n", self._name(here), "route", "add", *way)

    def throttle(self, mbit_per_s: float | None) -> None:
        """Give every host another rate, in both directions."""
        self.mbit_per_s = mbit_per_s
        for host in range(self.count):
            for name, link in ((self._name(host), "eth0"), (self._name("switch"), f"port{host}")):
                subprocess.run(["tc", "-n", name, "qdisc", "delete", "dev", link, "root"], capture_output=True)
                if mbit_per_s is not None:
                    rate = f"{round(1000 * mbit_per_s)}kbit"
                    # What the rate gives in 4 ms, the kernel's tick.
                    burst = str(max(65536, round(mbit_per_s * 1e6 / 8 / 250)))
                    _run(
                        "tc",
                        "-n",
                        name,
                        "qdisc",
                        "add",
                        "dev",
                        link,
                        "root",
                        "tbf",
                        "rate",
                        rate,
                        "burst",
                        burst,
                        "latency",
                        f"{LATENCY_MS}ms",
                    )

    def address(self, host: int) -> str:
        """Of one host, as the others see it."""
        return f"10.77.0.{host + 1}"

    def bytes_sent(self, host: int) -> int:
        """What its interface has sent, headers included."""
        return int(_run("ip", "netns", "exec", self._name(host), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def _name(self, host: int | str) -> str:
        return f"{self._prefix}-{host}"

    def _remove(self) -> None:
        for host in [*range(self.count), "switch"]:
            name = self._name(host)
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # its links and queues go with it
        if self._rt_limit_before is not None:
            RT_LIMIT.write_text(self._rt_limit_before)
        for process, printed in self._printed.items():
            process.wait()
            printed.close()

    # ---- programs ----

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Run a program on one host."""
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **environment}
        whole = [*self._scheduler, "ip", "netns", "exec", self._name(host), *command]
        printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(whole, env=variables, stdout=printed, stderr=subprocess.STDOUT, text=True)
        self._printed[process] = printed
        return process

    def printed(self, process: subprocess.Popen[str]) -> str:
        """What a program has printed so far."""
        file = self._printed[process]
        file.seek(0)
        return file.read()

    def launch(self, *script: str, timeout_seconds: float = 600, **environment: str) -> list[str]:
        """
        `accelerate launch` a script on every host, one process each, as several machines do.

        Returns:
            `list[str]`: What each host's processes printed.

        Raises:
            RuntimeError: A host failed, or the time is over; with what it printed last.
        """
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        common = ["--config_file", str(CONFIG), "--num_machines", str(self.count), "--num_processes", str(self.count)]
        common += ["--main_process_ip", self.address(0), "--main_process_port", str(PORT)]
        started = [
            self.start(host, accelerate, "launch", *common, "--machine_rank", str(host), *script, **environment)
            for host in range(self.count)
        ]
        deadline = time.monotonic() + timeout_seconds
        printed = []
        for host, process in enumerate(started):
            try:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"host {host} still runs after {timeout_seconds:g} s.") from error
            printed.append(self.printed(process))
            if process.returncode:
                raise RuntimeError(f"host {host} ended with code {process.returncode}:\n{printed[-1][-4000:]}")
        return printed


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
