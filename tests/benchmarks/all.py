"""Every figure in one table, as in README.md beside this file.

    uv run python tests/benchmarks/all.py --cifar FOLDER

FOLDER is CIFAR-10 as train/<class>/<image> and test/<class>/<image>. Takes hours with the default
of 5 runs, as rival A alone takes over an hour; `--only sharing masks` measures some, `--runs`
changes how often. Nothing else should run on the machine.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from timing import HEADER, machine

HERE = Path(__file__).parent
SCRIPTS = {
    "sweeps": True,
    "sharing": True,
    "steps": True,
    "data_path": True,
    "trials": False,
    "masks": False,
    "shrunk_retraining": False,
    "workers": True,
    "memory": True,
    "gpu": True,
}
"""By name, and whether it takes the images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--runs", type=int, help="of each figure, in place of the scripts' own")
    parsed = parser.parse_args()
    print(HEADER, flush=True)
    for name in parsed.only:
        command = [sys.executable, str(HERE / f"{name}.py")]
        command += ["--cifar", parsed.cifar] if SCRIPTS[name] else []
        command += ["--runs", str(parsed.runs)] if parsed.runs and name != "gpu" else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("|") and line.rstrip() not in HEADER.splitlines():
                    print(line, end="", flush=True)
        if process.returncode:
            sys.exit(f"{name}.py failed")
    print("\n" + machine("ray", "torchvision", "torch-pruning"))


if __name__ == "__main__":
    main()
