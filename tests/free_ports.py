"""Ports for the servers that tests start."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to whoever asks for any, as Ray does all the time."""
    found = []
    # The tests fix the seed of `random`; two runs beside each other are to take other ports.
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} ports are free")
