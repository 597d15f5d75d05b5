"""Which models a run of the zoo measures."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Sequence

from widthkit.errors import OptionError, close_matches

SOURCES = ("torchvision", "timm")
ALL = "all"
"""The name for both sources together."""


def model_names(
    source: str = ALL,
    only: Sequence[str] = (),
    shard: str | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> list[str]:
    """List ``source/model`` names in the order of the libraries.

    Args:
        source: ``torchvision``, ``timm``, or ``all`` for both.
        only: Patterns such as ``resnet*``; a model is taken if it matches any of them.
        shard: ``i/n`` takes every n-th of these models, starting with the i-th (1 to n).
        sample: Draw this many models at random, before they are divided into shards.
        seed: Seed of the draw.

    Raises:
        OptionError: If the source, a pattern, the sample or the shard makes no sense.
    """
    if source not in (*SOURCES, ALL):
        raise OptionError(f"unknown source '{source}': {close_matches(source, (*SOURCES, ALL))}")
    known = [f"{s}/{name}" for s in (SOURCES if source == ALL else (source,)) for name in _list(s)]
    for pattern in only:
        if not any(_matches(name, pattern) for name in known):
            raise OptionError(f"--only '{pattern}' matches no model of {source}; see the library's list_models()")
    chosen = [name for name in known if not only or any(_matches(name, pattern) for pattern in only)]
    if sample is not None:
        if not 1 <= sample <= len(chosen):
            raise OptionError(f"--sample {sample}: there are 1 to {len(chosen)} models to draw")
        drawn = set(random.Random(seed).sample(chosen, sample))
        chosen = [name for name in chosen if name in drawn]
    first, step = _shard(shard)
    return chosen[first::step]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a model's own name, without its source."""
    return fnmatch.fnmatchcase(name.partition("/")[2], pattern)


def _list(source: str) -> list[str]:
    if source == "timm":
        import timm

        return list(timm.list_models())
    from torchvision import models

    return list(models.list_models())


def _shard(text: str | None) -> tuple[int, int]:
    """Read ``i/n`` as a start and a step.

    >>> _shard("2/3"), _shard(None)
    ((1, 3), (0, 1))
    """
    if text is None:
        return 0, 1
    first, slash, count = text.partition("/")
    if not slash or not first.isdigit() or not count.isdigit() or not 1 <= int(first) <= int(count):
        raise OptionError(f"--shard '{text}' is not of the form i/n with i from 1 to n, such as 1/2")
    return int(first) - 1, int(count)
