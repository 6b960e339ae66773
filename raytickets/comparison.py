"""What a comparison found, from its events alone: the table, and what may be claimed from it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from raytickets.halving import drawn
from raytickets.journal import Event

OPPONENTS = ("random", "dense", "progressive")
"""What `early_bird` is tested against at every prune ratio, where the comparison has it."""

LEVEL = 0.05
"""Below this p value a difference is called a win or a loss."""

COSTS = ("macs", "seconds", "joules")

_FOUND_BY = {"early_bird_reinit": "early_bird", "random": "early_bird"}
_FOUND_BY |= {"lottery_ticket": "progressive"}
"""Sources that are called otherwise than the method (see `raytickets.methods`)."""


@dataclass(frozen=True)
class PairedTest:
    """A paired t test of whether differences have a mean of 0 (Student 1908)."""

    n: int
    mean: float
    low: float | None
    """End of the 95 % interval of the mean; None where n < 2 or all differences are equal."""
    high: float | None
    p: float | None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test differences, one a seed and at least one; their unit is that of the result.

    Differences without spread have no interval and no p value: t would be infinite, and certainty
    from a handful of seeds is an illusion of the few images they are counted in.
    """
    n, mean = len(differences), fmean(differences)
    # Equal accuracies differ in the last bits of their differences.
    if n < 2 or stdev(differences) < 1e-9:
        return PairedTest(n, mean, None, None, None)
    from scipy import stats

    error = stdev(differences) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return PairedTest(n, mean, mean - reach, mean + reach, p)


def report(events: Sequence[Event]) -> dict[str, Any]:
    """What a comparison found and what it cost, as plain JSON values.

    `events` is the journal, its first event the opening. Keys: `kind` ("comparison"), `name`,
    `space`, `network`, `data` (the space's), `state` (done, failed, interrupted or
    unfinished), `penalty`, `prune_ratios`, `seeds`, `methods`, `epochs` (of the retraining),
    `table` (see `table`), `claims` (see `claims`), `runs` (see `runs`) and `failures` (lines about
    what failed or diverged).
    """
    opening, endings = events[0], [e for e in events if e["event"] == "end"]
    failed = bool(endings) and endings[-1]["state"] == "failed"
    sources = _last(events, "trajectory", "trajectory").values()
    lost: dict[str, list[str]] = {"failed": [], "diverged": []}
    for event in sources:
        if event["state"] in lost:
            lost[event["state"]].append(f"{event['trajectory']}: {event['reason']}")
    reasons = [endings[-1]["reason"]] if failed else lost["failed"]
    return {
        "kind": "comparison",
        "name": opening["name"],
        "space": opening["space"]["name"],
        "network": opening["space"]["network"],
        "data": opening["space"]["data"],
        "state": endings[-1]["state"] if endings else "unfinished",
        **{key: opening[key] for key in ("penalty", "prune_ratios", "seeds", "methods")},
        "epochs": opening["space"]["retraining"]["epochs"],
        "table": table(events),
        "claims": claims(events),
        "runs": runs(events),
        "failures": reasons + lost["diverged"],
    }


def runs(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Every retrained ticket: `ticket`, `path` (retrained), `method`, `prune_ratio`, `seed`,
    `test_accuracy` (a share), `macs` (of one image forward), `params`, `latency_ms` and
    `relative_latency` (to the dense network), `draw_epoch` (or null), and what search and
    retraining cost together: `total_macs`, `total_seconds`, `total_joules` (null if unavailable)
    and `energy` (where the joules are from)."""
    # Retraining by hand has no ledger.
    retrained = {e["run"]: e for e in events if e["event"] == "retrained" and "ledger" in e}
    return [
        _run(ticket, retrained[ticket["ticket"]])
        for ticket in drawn(events)
        if ticket["ticket"] in retrained
    ]


def _run(ticket: Event, done: Event) -> dict[str, Any]:
    # A search of no work costs nothing, whatever could be measured.
    parts = [part for part in (ticket["search"], done["ledger"]) if part["samples"]]
    known = [part for part in parts if part["joules"] is not None]
    unknown = [part["energy"] for part in parts if part["joules"] is None]
    return {
        "ticket": ticket["ticket"],
        "path": done["path"],
        "method": ticket["method"],
        "prune_ratio": ticket["prune_ratio"],
        "seed": ticket["seed"],
        "test_accuracy": done["test_accuracy"],
        "macs": done["macs"],
        "params": done["params"],
        "latency_ms": done["latency_ms"],
        "relative_latency": done["relative_latency"],
        "draw_epoch": ticket["draw_epoch"],
        "total_macs": sum(part["forward_macs"] + part["backward_macs"] for part in parts),
        "total_seconds": sum(part["seconds"] for part in parts),
        "total_joules": None if unknown else sum(part["joules"] for part in known),
        "energy": " + ".join(dict.fromkeys(unknown or [part["energy"] for part in known])),
    }


def source_count(opening: Event) -> int:
    """How many sources a comparison has."""
    kinds = {_FOUND_BY.get(method, method) for method in opening["methods"]}
    return len(kinds) * len(opening["seeds"])


def table(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One row for the dense network, then one for each prune ratio and method.

    `method`, `prune_ratio`, `n` (seeds that were retrained), `not_drawn` (seeds whose source ended
    without a ticket), and over the n seeds, null where n is 0: `test_accuracy` (mean) and
    `test_accuracy_std` (of the sample; null for one seed), the means of `macs`, `params`,
    `latency_ms`, `relative_macs`, `relative_params`, `relative_latency` (to the dense network's),
    `draw_share` (the draw's epoch relative to the epochs of retraining), `total_macs`,
    `total_seconds`, `total_joules` (search and retraining), `energy` (where the joules are from),
    and `macs_to_dense`, `macs_to_progressive`, and the same for `seconds` and `joules`: the mean
    over seeds of what the ticket cost relative to what the other's of that seed (and prune ratio)
    cost, null where no seed has both or where energy is unavailable for one of them.
    """
    opening, found = events[0], runs(events)
    sources = _last(events, "trajectory", "trajectory").values()
    ended = {(e["method"], e["seed"]) for e in sources if e["state"] != "failed"}
    tickets = {(e["method"], e["prune_ratio"], e["seed"]) for e in drawn(events)}
    lines = [("dense", 0.0)]
    lines += [
        (method, ratio)
        for ratio in opening["prune_ratios"]
        for method in opening["methods"]
        if method != "dense"
    ]

    def row(method: str, ratio: float) -> dict[str, Any]:
        mine = _by_seed(found, method, ratio)
        accuracies = [run["test_accuracy"] for run in mine.values()]
        energies = dict.fromkeys(run["energy"] for run in mine.values())
        means = {
            name: _mean([run[name] for run in mine.values()])
            for name in ("macs", "params", "latency_ms", "relative_latency", "draw_epoch")
        }
        draw_epoch = means.pop("draw_epoch")
        spent = {
            f"total_{cost}": _mean([run[f"total_{cost}"] for run in mine.values()])
            for cost in COSTS
        }
        others = {
            "dense": _by_seed(found, "dense", 0.0),
            "progressive": _by_seed(found, "progressive", ratio),
        }
        return {
            "method": method,
            "prune_ratio": ratio,
            "n": len(mine),
            "not_drawn": sum(
                (_FOUND_BY.get(method, method), seed) in ended
                and (method, ratio, seed) not in tickets
                for seed in opening["seeds"]
            ),
            "test_accuracy": _mean(accuracies),
            "test_accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
            **means,
            "relative_macs": _share(means["macs"], opening["dense"]["macs"]),
            "relative_params": _share(means["params"], opening["dense"]["params"]),
            "draw_share": _share(draw_epoch, opening["space"]["retraining"]["epochs"]),
            **spent,
            "energy": " + ".join(energies) or None,
            **{
                f"{cost}_to_{name}": _relative(mine, other, f"total_{cost}")
                for name, other in others.items()
                for cost in COSTS
            },
        }

    return [row(*line) for line in lines]


def claims(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Whether `early_bird` beats each of `OPPONENTS` at each prune ratio.

    `prune_ratio`, `against`, the `PairedTest` of the differences in test accuracy paired over
    seeds, in percentage points (`n`, `mean`, `low`, `high`, `p`; null where no seed has both),
    `verdict` (beats, is beaten, too close to tell, cannot tell) and the `sentence` that says so.
    Every claim is a test of its own at level 0.05: of twenty of them one would be called a
    win or a loss by chance.
    """
    opening, found = events[0], runs(events)
    if "early_bird" not in opening["methods"]:
        return []
    planned, answers = len(opening["seeds"]), []
    for ratio in opening["prune_ratios"]:
        ours = _by_seed(found, "early_bird", ratio)
        for other in OPPONENTS:
            if other not in opening["methods"]:
                continue
            theirs = _by_seed(found, other, 0.0 if other == "dense" else ratio)
            differences = [
                100 * (ours[seed]["test_accuracy"] - theirs[seed]["test_accuracy"])
                for seed in ours
                if seed in theirs
            ]
            test = paired_test(differences) if differences else None
            verdict, words = _judge(test, other, planned)
            values = (
                asdict(test) if test else dict.fromkeys(("mean", "low", "high", "p")) | {"n": 0}
            )
            answers.append(
                {"prune_ratio": ratio, "against": other}
                | values
                | {"verdict": verdict, "sentence": f"Prune ratio {ratio:g}: {words}"}
            )
    return answers


def _judge(test: PairedTest | None, other: str, planned: int) -> tuple[str, str]:
    """The verdict, and the rest of the sentence."""
    if test is None:
        return "cannot tell", f"no seed has both early_bird and {other}: nothing to compare."
    seeds = f"{test.n} seed{'s' if test.n > 1 else ''}"
    if test.n < planned:
        seeds = f"{test.n} of {planned} seeds"
    place = "above" if test.mean >= 0 else "below"
    distance = f"early_bird is {abs(test.mean):.2f} points {place} {other}"
    if test.n == 1:
        return "cannot tell", f"{distance} ({seeds}): one seed cannot tell."
    if test.p is None or test.low is None or test.high is None:
        if math.isclose(test.mean, 0, abs_tol=1e-9):
            words = f"early_bird and {other} are equal in each of {seeds}: too close to tell."
            return "too close to tell", words
        words = "without spread between seeds, how sure that is cannot be told."
        return "cannot tell", f"{distance} in each of {seeds}: {words}"
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.2g}"
    found = f"{distance} (95 % interval {test.low:.2f} to {test.high:.2f} over {seeds}, {p})"
    if test.p >= LEVEL:
        return "too close to tell", f"{found}: too close to tell."
    if test.mean > 0:
        return "beats", f"{found}: early_bird beats {other}."
    return "is beaten", f"{found}: {other} beats early_bird."


def _by_seed(
    found: Iterable[dict[str, Any]], method: str, ratio: float
) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in found if (r["method"], r["prune_ratio"]) == (method, ratio)}


def _last(events: Iterable[Event], kind: str, key: str) -> dict[str, Event]:
    """The last event of this kind for each value of a field."""
    return {event[key]: event for event in events if event["event"] == kind}


def _relative(mine: dict[int, Any], other: dict[int, Any], cost: str) -> float | None:
    return _mean([_share(mine[seed][cost], other[seed][cost]) for seed in mine if seed in other])


def _share(value: float | None, whole: float | None) -> float | None:
    return value / whole if value is not None and whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there is nothing, or where something is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
