"""`raytickets search` on a Ray cluster, as a file for `ray submit` and `ray job submit`.

The arguments are those of `raytickets search`; `--address` is RAY_ADDRESS, else auto, unless given.
"""

import os
import sys

from raytickets import cli


def main() -> None:
    words = sys.argv[1:]
    if not any(word.partition("=")[0] == "--address" for word in words):
        # Without one Ray would start a cluster of its own beside the one that runs here.
        words += ["--address", os.environ.get("RAY_ADDRESS", "auto")]
    sys.argv = ["raytickets", "search", *words]
    cli.main()


if __name__ == "__main__":
    main()
