"""``python -m widthkit`` is the command line."""

from widthkit.cli import main

main()
