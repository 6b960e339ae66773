"""raytickets: search early-bird lottery tickets on a laptop or a Ray cluster.

from raytickets import load_space, load_ticket, search
sweep = search(load_space("digits"))
best = sweep.report()["winners"][0]
network = load_ticket(sweep.path / best["path"]).network()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytickets.config import InputError, SearchSpace
    from raytickets.driver import SweepFailed, compare, search
    from raytickets.lease import Held
    from raytickets.spaces import load_space
    from raytickets.sweep import Sweep
    from raytickets.ticket import DamagedTicket, Ticket, load_ticket

__all__ = [
    "DamagedTicket",
    "Held",
    "InputError",
    "SearchSpace",
    "Sweep",
    "SweepFailed",
    "Ticket",
    "compare",
    "load_space",
    "load_ticket",
    "search",
]

_HOME = {
    "DamagedTicket": "ticket",
    "Held": "lease",
    "InputError": "config",
    "SearchSpace": "config",
    "Sweep": "sweep",
    "SweepFailed": "driver",
    "Ticket": "ticket",
    "compare": "driver",
    "load_space": "spaces",
    "load_ticket": "ticket",
    "search": "driver",
}


def __getattr__(name: str) -> Any:
    # Each name is imported when it is asked for: torch and Ray take seconds, and bad input is to
    # be refused before them.
    if name not in _HOME:
        raise AttributeError(f"module 'raytickets' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"raytickets.{_HOME[name]}"), name)
