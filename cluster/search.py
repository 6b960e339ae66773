"""What `ray submit cluster.yaml search.py` runs on the head node: `raytickets search` by file.

The arguments are those of `raytickets search`.
"""

import sys

from raytickets.cli import main

if __name__ == "__main__":
    sys.argv = ["raytickets", "search", *sys.argv[1:]]
    main()
