"""Seeds that follow from the position in a run, and a scope that restores the user's generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
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
    # Where CUDA is not in use, its generators are left alone: a seed set now would outlive the scope.
    cuda_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if cuda_in_use else 0)):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if cuda_in_use:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, as plain values and tensors.

    Args:
        device: The device that a network computes on; the state of its generator is included if it is a CUDA device.

    >>> cpu = torch.device("cpu")
    >>> states = random_states(cpu)
    >>> drawn = random.random(), np.random.rand(), torch.rand(()).item()
    >>> set_random_states(states, cpu)
    >>> drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    True
    """
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(place), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set what :func:`random_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
