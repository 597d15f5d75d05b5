"""Do supernets rank networks as stand-alone training does, and what does a training step of each strategy cost?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.learn.cost import measure
from benchmarks.learn.records import Records, Say, Setup
from benchmarks.learn.table import write_tables
from widthkit.errors import OptionError, close_matches
from widthkit.registry import PluginChoice

PARTS = ("all", "dense", "supernets", "cost", "table")


def run(
    setups: Sequence[Setup],
    choices: Sequence[PluginChoice],
    data_dir: str | None,
    folder: Path,
    out: Path,
    part: str,
    repeats: int,
    say: Say,
) -> None:
    """Make the records that are missing, and the table of all that are there.

    Args:
        setups: One per model.
        choices: The strategies.
        data_dir: Folder of the data set.
        folder: Folder for the records; one folder per model in it.
        out: Folder for ``learn.json`` and ``learn.md``.
        part: One of :data:`PARTS`; ``cost`` is measured anew.
        repeats: Timed steps of the cost.
        say: Called with one line per record.

    Raises:
        OptionError: If the part is unknown.
    """
    if part not in PARTS:
        raise OptionError(f"unknown part '{part}': {close_matches(part, PARTS)}")
    models = [Records(setup, folder / setup.model, data_dir, say) for setup in setups]
    if part in ("all", "supernets", "cost"):
        for choice in choices:
            models[0].supernet(choice)  # a wrong name or option is refused before an hour of work
    for records in models:
        if part in ("all", "cost"):
            measure(records, choices, repeats, again=part == "cost")
        if part in ("all", "dense"):
            records.train_dense()
        for choice in choices if part in ("all", "supernets") else ():
            records.train_supernet(choice)
        write_tables(folder, out)
    write_tables(folder, out)
