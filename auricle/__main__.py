"""Runs the command line: `python -m auricle`."""

import sys

from auricle import main

if __name__ == "__main__":
    sys.exit(main())
