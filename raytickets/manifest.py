"""What a ticket's manifest may hold: a ticket may come from a stranger, so nothing else is read."""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

from raytickets.config import InputError, Method, Network, Rule

SCHEMA = 1
WEIGHTS = "ticket.safetensors"
LARGEST = 4 * 2**20
"""Bytes of a manifest; that of torchvision's widest network has under a tenth."""

_NUMBERS = 10_000
"""What the numbers in a network's options may add up to: builders repeat layers by them."""


def parse(text: bytes) -> dict[str, Any]:
    """The manifest that is written so; ValueError or RecursionError unless every field is right.

    Fields are of the types that `raytickets.ticket.Ticket` documents, numbers finite and below
    2**63, strings printable, masks as long as their cuts, and no field is doubled or unknown.
    """
    if len(text) > LARGEST:
        raise ValueError(f"the manifest has over {LARGEST} bytes")
    manifest = json.loads(
        text.decode(),
        object_pairs_hook=_fields,
        parse_int=_whole_number,
        parse_float=_finite,
        parse_constant=_finite,
    )
    _check(manifest, _MANIFEST, "manifest")
    for group in manifest["groups"]:
        if len(group["mask"]) != len(group["cut"]):
            raise ValueError(f"mask and cut of group {group['name']} differ in length")
    _check_size(manifest["network"]["name"], manifest["network"]["options"])
    return manifest


def check_storable(network: Network, groups: Iterable[str]) -> None:
    """InputError if no manifest may hold this network, or channel groups of these names.

    So that it is known before anything is trained.
    """
    options = json.dumps(network.options)
    try:
        options = json.loads(options, parse_int=_whole_number, parse_float=_finite)
        _check(network.name, _network, "network.name")
        _check(options, _OPTIONS, "network.options")
        _check(list(groups), [_LAYER], "the name of a layer")
        _check_size(network.name, options)
    except ValueError as error:
        raise InputError("network.name", network.name, f"no ticket can hold it: {error}") from error


def _check_size(name: str, options: dict[str, Any]) -> None:
    if ":" not in name and _total(options) > _NUMBERS:
        raise ValueError(f"the numbers in network.options add up to over {_NUMBERS}")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or not abs(int(digits)) < 2**63:
        raise ValueError(f"the number {digits[:20]}... is too large")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return float(digits)


def _total(value: Any) -> float:
    """The sum of all numbers in plain values."""
    if isinstance(value, dict | list):
        return sum(map(_total, value.values() if isinstance(value, dict) else value))
    return abs(value) if isinstance(value, int | float) else 0


def _check(value: Any, form: Any, place: str) -> None:
    """Raise ValueError unless a value has the form.

    A form is a pattern for a string, a function that says whether a value will do, a list with the
    form of each entry, a tuple of a form that may be null, or a dict of the fields' forms: those
    whose names end in `?` may be missing, and the name `*` stands for every name.
    """
    if isinstance(form, tuple):
        if value is not None:
            _check(value, form[0], place)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} is not a list")
        for entry in value:
            _check(entry, form[0], f"{place}[]")
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{place} has no fields")
        forms = {name.removesuffix("?"): of for name, of in form.items()}
        if "*" in form:
            forms = dict.fromkeys(filter(_text, value), form["*"])
        missing = [name for name in form if name not in value and not name.endswith(("?", "*"))]
        if missing:
            raise ValueError(f"{place} has no field {missing[0]}")
        for name, entry in value.items():
            if name not in forms:
                raise ValueError(f"{place} has an unknown field {name[:50]!a}")
            _check(entry, forms[name], f"{place}.{name}")
    elif isinstance(form, str):
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise ValueError(f"{place} cannot be {value!a:.50}")
    elif not form(value):
        raise ValueError(f"{place} cannot be {value!a:.50}")


def _whole(least: int, most: int = 2**63) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 300


def _network(value: Any) -> bool:
    """Whether it can be a network's name: those that timm fetches from a hub are none."""
    return _text(value) and not (value.startswith("timm/") and ":" in value)


def _plain(value: Any) -> bool:
    """Whether it can be an option: values as JSON has them, with printable text."""
    if isinstance(value, dict):
        return all(map(_text, value)) and all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    return _text(value) or value is None or isinstance(value, int | float)


_LAYER = r"\w[\w ./-]{0,299}"
_HEX = r"[0-9a-f]{%s}"
_SHARE = _number(0, 1)
_OPTIONS: Any = {"*": _plain}
_MANIFEST: Any = {
    "schema": _whole(SCHEMA, SCHEMA),
    "id": _HEX % 16,
    "files": {WEIGHTS: _HEX % 64},
    "network": {
        "name": _network,
        "options": _OPTIONS,
        "in_channels": _whole(1, 2**16),
        "num_classes": _whole(1, 2**20),
        "image_size": _whole(1, 2**16),
    },
    "groups": [{"name": _LAYER, "mask": "0*1[01]*", "cut": "[01]+"}],
    "min_channels": {"least": _whole(1), "acted_on": [_LAYER]},
    "round_to": _whole(1),
    "penalty": _number(0),
    "prune_ratio": _SHARE,
    "learning_rate": (_number(0),),
    "seed": _whole(0),
    "precision": "float32|bfloat16",
    "stop_rule": (
        {
            "rule": "|".join(get_args(Rule)),
            "window": _whole(1),
            "threshold": _number(0),
            "checks_per_epoch?": _whole(1),
            "distances": [_number(0)],
        },
    ),
    "draw": ({"check": _whole(0), "epoch": _number(0)},),
    "space": {"name": r"[\w.-]{1,300}", "fingerprint": _text},
    "macs": _whole(0),
    "params": _whole(0),
    "data?": {"fingerprint": _text},
    "method?": "|".join(get_args(Method)),
    "threads?": _whole(1),
    "versions?": {"*": _text},
    "retrained?": {
        "from": _HEX % 16,
        "epochs": _whole(1),
        "num_workers": _whole(1),
        "validation_accuracy": _SHARE,
        "test_accuracy": _SHARE,
    },
}
