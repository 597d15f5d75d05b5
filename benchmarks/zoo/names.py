"""Which models a run of the zoo goes through."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from widthkit.errors import OptionError, close_matches

SOURCES = ("torchvision", "timm")


def model_names(source: str, only: Sequence[str] = (), shard: str | None = None) -> list[str]:
    """List ``source/model`` names in the library's order.

    Args:
        source: ``torchvision`` or ``timm``.
        only: Patterns such as ``resnet*``; a model is taken if it matches any of them.
        shard: ``i/n`` takes every n-th model, starting with the i-th (1 to n).

    Raises:
        OptionError: If the source, a pattern or the shard makes no sense.
    """
    if source not in SOURCES:
        raise OptionError(f"unknown source '{source}': {close_matches(source, SOURCES)}")
    known = _list(source)
    for pattern in only:
        if not fnmatch.filter(known, pattern):
            raise OptionError(f"--only '{pattern}' matches no {source} model; see {source}'s list_models()")
    chosen = [n for n in known if not only or any(fnmatch.fnmatchcase(n, p) for p in only)]
    first, step = _shard(shard)
    return [f"{source}/{name}" for name in chosen[first::step]]


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
