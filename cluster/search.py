"""`raytickets search` on a Ray cluster, as a file for `ray submit` and `ray job submit`.

The arguments are those of `raytickets search`; `--storage` is RAYTICKETS_STORAGE unless given.
"""

import os
import sys

from raytickets import cli


def main() -> None:
    # Without an address Ray would start a cluster of its own beside the one that runs here.
    os.environ.setdefault("RAY_ADDRESS", "auto")
    words = sys.argv[1:]
    storage = os.environ.get("RAYTICKETS_STORAGE")
    if storage and not any(word.partition("=")[0] == "--storage" for word in words):
        words += ["--storage", storage]
    sys.argv = ["raytickets", "search", *words]
    cli.main()


if __name__ == "__main__":
    main()
