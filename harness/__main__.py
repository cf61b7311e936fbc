"""The entry point: ``harness`` and ``python -m harness``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; errors made on purpose are one line on stderr and exit code 2."""
    try:
        from harness.cli.app import run
    except KeyboardInterrupt:  # the first tenths of a second are imports
        sys.exit(130)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
