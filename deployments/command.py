"""Entry point of the `pimoe` command: so small that Ctrl-C during the imports of the real one is caught, too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
