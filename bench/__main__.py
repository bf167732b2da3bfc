"""``python -m bench``: the same as ``kvstore bench micro``."""

import sys

from kvstore.cli import main

main(["bench", "micro", *sys.argv[1:]], prog_name="kvstore")
