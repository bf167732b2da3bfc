"""``python -m kvstore`` is the command line."""

from kvstore.cli import main

main()
