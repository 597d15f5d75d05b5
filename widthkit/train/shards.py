"""Share the batches of a ``DataLoader`` among processes, in one order that all of them know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard, IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

from widthkit.train import parallel
from widthkit.train.rng import mix

_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""Options of a loader that do not say which samples make a batch."""


@runtime_checkable
class _CountsEpochs(Protocol):
    """A sampler or data set whose order depends on the epoch, such as torch's ``DistributedSampler``."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""


def shard(loader: Any) -> Any:
    """Return a loader that gives this process its share of a ``DataLoader``'s batches.

    All processes get equally many batches of equal size: the last ones are filled up with samples from the beginning,
    or left out if the loader drops its last batch. An ``IterableDataset`` is read whole by every process, which keeps
    its share, so it must give the same samples everywhere.

    Args:
        loader: The same on every process. What is no ``DataLoader``, or has been sharded by Accelerate, is returned as
            it is, as is everything in a single process.
    """
    n, index = parallel.processes(), parallel.process_index()
    if n == 1 or not isinstance(loader, DataLoader) or _is_sharded(loader):
        return loader
    kept = {name: getattr(loader, name) for name in _KEPT}
    if isinstance(loader.dataset, IterableDataset):
        size = loader.batch_size or 1
        part = IterableDatasetShard(loader.dataset, size, loader.drop_last, num_processes=n, process_index=index)
        return DataLoader(part, batch_size=loader.batch_size, drop_last=loader.drop_last, **kept)
    if loader.batch_sampler is None:
        sampler = BatchSamplerShard(loader.sampler, num_processes=n, process_index=index)
        return DataLoader(loader.dataset, batch_size=None, sampler=sampler, **kept)
    batches = BatchSamplerShard(loader.batch_sampler, num_processes=n, process_index=index)
    return DataLoader(loader.dataset, batch_sampler=batches, **kept)


def _is_sharded(loader: DataLoader[Any]) -> bool:
    """Whether Accelerate has shared the loader out already."""
    return (
        isinstance(loader, (DataLoaderShard, DataLoaderDispatcher))
        or isinstance(loader.batch_sampler, BatchSamplerShard)
        or isinstance(loader.sampler, BatchSamplerShard)
        or isinstance(loader.dataset, IterableDatasetShard)
    )


@contextmanager
def seeded_order(loader: Any, seed: int, epoch: int) -> Iterator[None]:
    """Let the order of a loader's samples follow from a seed and the epoch inside the scope.

    Without this the order of a resumed epoch would depend on how many epochs the loader had already served. The seed
    of every generator takes part, so loaders made with different seeds still differ. Processes that share a
    ``DataLoader`` use the seeds of process 0, and a sampler without a generator gets one, so that all of them know the
    same order. Everything is put back afterwards.

    Args:
        loader: A ``DataLoader``, or any other iterable.
        seed: A seed in ``[0, 2**63)``, the same on every process.
        epoch: Number of epochs done; told to a ``DataLoader``'s samplers and data set if they have ``set_epoch``.
    """
    samplers, shared = _samplers(loader), isinstance(loader, DataLoader) and parallel.processes() > 1
    if isinstance(loader, DataLoader):
        for part in (*samplers, loader.dataset):
            if isinstance(part, _CountsEpochs):
                part.set_epoch(epoch)
    without = [sampler for sampler in samplers if shared and getattr(sampler, "generator", loader) is None]
    for sampler in without:
        sampler.generator = torch.Generator()
    found = [getattr(part, "generator", None) for part in (loader, *samplers)]
    generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
    states = [generator.get_state() for generator in generators]
    try:
        own = [generator.initial_seed() for generator in generators]
        for generator, start in zip(generators, parallel.gather_objects(own)[0] if shared else own, strict=True):
            generator.manual_seed(mix(seed, start))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for sampler in without:
            sampler.generator = None


def _samplers(loader: Any) -> list[Any]:
    """List the samplers of a loader and those that they wrap."""
    found: list[Any] = []
    pending = [loader]
    while pending:
        owner = pending.pop()
        for part in (getattr(owner, name, None) for name in ("sampler", "batch_sampler")):
            if part is not None and not any(part is other for other in found):
                found.append(part)
                pending.append(part)
    return found
