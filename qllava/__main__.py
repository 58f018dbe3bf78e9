"""Entry point of `python -m qllava`, which is the command `qllava`."""

from __future__ import annotations

import sys

from qllava.cli import main

if __name__ == "__main__":
    sys.exit(main())
