"""``python -m benchmarks NAME [options]``, from a checkout of the repository."""

from __future__ import annotations

import sys

from benchmarks.commands import app
from widthkit.errors import WidthkitError


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark; a refusal becomes one line on stderr and exit code 2.

    Args:
        arguments: The command line without the program's name; that of this process by default.
    """
    try:
        app(arguments, prog_name="python -m benchmarks")
    except WidthkitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
