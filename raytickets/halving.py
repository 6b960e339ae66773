"""Successive halving of tickets: which are proved again with more MACs, and which ones win.

What follows from the journal's events alone, so that a sweep that goes on comes to the same.
"""

import math
from collections.abc import Iterable, Sequence

from raytickets.config import SearchSpace
from raytickets.journal import Event


def drawn(events: Iterable[Event]) -> list[Event]:
    """The `ticket` events that count: the newest of each prune ratio.

    A trajectory that ran again as its ticket was damaged may have drawn another one. Of one that
    began anew none of before count.
    """
    found: dict[tuple, Event] = {}
    for event in events:
        if event["event"] == "ticket":
            found[event["trajectory"], event["method"], event["prune_ratio"]] = event
        elif event["event"] == "retry" and event.get("anew"):
            gone = event.get("trajectory")
            found = {key: ticket for key, ticket in found.items() if key[0] != gone}
    return [*found.values()]


def proved(events: Iterable[Event]) -> list[Event]:
    """Every ticket's event once, ordered by id, with its proofs summed up.

    `proof_accuracy` is that of its last rung, which is added as `proof_rung`; `proof_macs` are
    those of all its rungs.
    """
    return [
        rungs[1]
        | {
            "proof_rung": max(rungs),
            "proof_accuracy": rungs[max(rungs)]["proof_accuracy"],
            "proof_macs": sum(proof["proof_macs"] for proof in rungs.values()),
        }
        for rungs in _proofs(events).values()
    ]


def next_proofs(space: SearchSpace, events: Iterable[Event]) -> tuple[int, list[Event]]:
    """The rung to prove next, from 2, and its tickets; none when halving is over."""
    proofs = _proofs(events)
    entrants = list(proofs)
    for rung in range(2, space.proof.rungs + 1):
        if len(entrants) <= space.winners:
            break
        accuracies = [proofs[ticket][rung - 1]["proof_accuracy"] for ticket in entrants]
        macs = [proofs[ticket][1]["macs"] for ticket in entrants]
        entrants = [entrants[place] for place in _better_half(accuracies, macs, space.winners)]
        if waiting := [proofs[ticket][1] for ticket in entrants if rung not in proofs[ticket]]:
            return rung, waiting
    return space.proof.rungs, []


def front(tickets: Sequence[Event]) -> list[Event]:
    """Of `proved` tickets that came to the last rung, the Pareto front, cheapest first."""
    last = max((ticket["proof_rung"] for ticket in tickets), default=1)
    there = [ticket for ticket in tickets if ticket["proof_rung"] == last]
    places = pareto_front([t["proof_accuracy"] for t in there], [t["macs"] for t in there])
    return [there[place] for place in places]


def choose_winners(space: SearchSpace, events: Iterable[Event]) -> list[Event]:
    """The most accurate tickets of the Pareto front, in order of falling proof accuracy."""
    return front(proved(events))[: -space.winners - 1 : -1]


def pareto_front(accuracies: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Places of the points that no other point beats in both, cheapest first.

    Of equal points the first one stands.
    """
    order = sorted(range(len(costs)), key=lambda place: (costs[place], -accuracies[place], place))
    front: list[int] = []
    best = -math.inf
    for place in order:
        if accuracies[place] > best:
            front.append(place)
            best = accuracies[place]
    return front


def hypervolume(accuracies: Sequence[float], shares: Sequence[float]) -> float:
    """The area that points dominate down to accuracy 0 and share 1: from 0, for none, to 1.

    Points are accuracies of tickets and their shares of the dense network's MACs (Zitzler and
    Thiele 1999, IEEE Transactions on Evolutionary Computation 3(4)). Shares above 1 add nothing.
    """
    area = best = last = 0.0
    for share, accuracy in sorted(zip(shares, accuracies, strict=True)):
        if share >= 1:
            break
        area += best * (share - last)
        best, last = max(best, accuracy), share
    return area + best * (1 - last)


def _proofs(events: Iterable[Event]) -> dict[str, dict[int, Event]]:
    """Of each ticket, ordered by id, its proofs by rung: the first one's is its `ticket` event.

    By id, since trajectories that run side by side draw in no fixed order.
    """
    events = list(events)
    found = {ticket["ticket"]: {1: ticket} for ticket in drawn(events)}
    for event in events:
        if event["event"] == "proof" and event["ticket"] in found:
            found[event["ticket"]][event["rung"]] = event
    return dict(sorted(found.items()))


def _better_half(accuracies: Sequence[float], macs: Sequence[int], least: int) -> list[int]:
    """Places of half of the tickets, in order; at least as many as can win.

    They are ranked by one Pareto front after the other (Schmucker et al. 2021, arXiv 2106.12639),
    and within a front by accuracy.
    """
    left, ranked = list(range(len(macs))), []
    while left:
        places = pareto_front([accuracies[p] for p in left], [macs[p] for p in left])
        layer = [left[place] for place in places]
        ranked += reversed(layer)
        left = [place for place in left if place not in layer]
    half = -(-len(macs) // 2)
    return sorted(ranked[: max(half, least)])
