"""Seeds that follow from the run's position, and scopes that give the user's generators back untouched."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mix(*parts: int) -> int:
    """Turn several integers into one seed, so that neighbouring positions give unrelated streams.

    Args:
        parts: Any integers, such as the run's seed, the process index and the step.

    Returns:
        A seed in ``[0, 2**63)`` that is the same on every machine.

    >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0), mix(1, 23) == mix(12, 3)
    (True, False, False)
    """
    digest = hashlib.blake2b(repr(tuple(int(part) for part in parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside the scope; put their states back afterwards, whatever happens.

    Args:
        seed: A seed in ``[0, 2**63)``.

    >>> before = torch.get_rng_state()
    >>> with seeded(1):
    ...     first = torch.rand(2)
    >>> with seeded(1):
    ...     bool(torch.equal(first, torch.rand(2)))
    True
    >>> bool(torch.equal(before, torch.get_rng_state()))
    True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # A run on the CPU must not wake the GPUs: a seed given to them now would outlive the scope.
    awake = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if awake else 0)):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if awake:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def seeded_generators(loader: Any, seed: int) -> Iterator[None]:
    """Seed the generators that a data loader owns inside the scope, and put their states back afterwards.

    Without this the order of a resumed epoch would depend on how many epochs the generator had already served.
    Each generator's own seed takes part, so loaders made with different seeds still differ.

    Args:
        loader: A ``DataLoader``, or any other iterable, which has none.
        seed: A seed in ``[0, 2**63)``.
    """
    generators = _generators(loader)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(mix(seed, generator.initial_seed()))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """Find the distinct generators of a loader, its samplers and the samplers they wrap."""
    found: dict[int, torch.Generator] = {}
    pending, seen = [loader], set()
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        pending += [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
    return list(found.values())
