"""How the ranks of a job find each other: rank 0's launcher hosts the store, and tells the others its port.

The store gets a port that the system chooses, so no other program can take it. Under SLURM the other launchers must
learn it. All derive the same candidate ports from the job's number; rank 0 announces the store's port on the first
candidate that is free, and the others ask one candidate after the other.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import torch.distributed as dist

CANDIDATES = 16
REPLY_SECONDS = 2.0  # a foreign program on a candidate port may never reply
PATIENCE_SECONDS = 600.0  # how long a launcher asks for rank 0's, which may start later


def host_store() -> dist.TCPStore:
    """Start the store that the ranks of one start meet at, on a free port of all interfaces."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def candidate_ports(job: int, restarts: int) -> list[int]:
    """Return the ports that all launchers of a job derive alike, others for each start.

    A process of the last start may still hold its port. Linux hands out ports from 32768 on; these are below.
    """
    first = 97 * job + 1009 * restarts
    return [10_000 + (first + 7919 * i) % 22_000 for i in range(CANDIDATES)]


def announce(port: int, job: int, restarts: int) -> None:
    """Tell everybody who asks on the first free candidate port at which port the store is, until this process ends.

    Raises:
        SystemExit: all candidate ports are taken.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for candidate in candidate_ports(job, restarts):
        with contextlib.suppress(OSError):
            server = socket.create_server(("", candidate), family=family, dualstack_ipv6=family == socket.AF_INET6)
            threading.Thread(target=reply, args=(server, f"{name_of(job, restarts)} {port}\n"), daemon=True).start()
            return
        print(f"launch: port {candidate} is taken, trying another one", flush=True)
    raise SystemExit(f"launch: all {CANDIDATES} candidate ports are taken, submit the job again")


def reply(server: socket.socket, message: str) -> None:
    """Send the message to every connection."""
    while True:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.sendall(message.encode())


def ask_for_port(host: str, job: int, restarts: int) -> int:
    """Return the port of the store that rank 0's launcher on `host` announces.

    Raises:
        SystemExit: it does not answer for PATIENCE_SECONDS.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for candidate in candidate_ports(job, restarts):
            with contextlib.suppress(OSError, ValueError):  # ValueError: the reply of another program
                with socket.create_connection((host, candidate), REPLY_SECONDS) as connection:
                    name, _, port = connection.makefile("rb").readline(100).decode().rpartition(" ")
                if name == name_of(job, restarts):
                    return int(port)
        time.sleep(0.2)
    raise SystemExit(f"launch: rank 0 on {host} did not announce its port for {PATIENCE_SECONDS:.0f} s")


def name_of(job: int, restarts: int) -> str:
    """Return what identifies the store of one start of a job."""
    return f"store of job {job}, start {restarts}"
