"""Data sets that serve whole batches at once: from memory, or from image files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from widthkit.train.augment import Augmentation, random_part, random_parts
from widthkit.train.images import decode, resize


@dataclass(frozen=True)
class Preparation:
    """How stored pixels become what a model sees.

    Attributes:
        size: Height and width.
        channels: Channels the model takes; grey pixels are repeated.
        mean: Per stored channel or per channel that the model takes, in grey levels of 0..255.
        std: Likewise.
        augment: What happens at random.
        flip: Whether mirrored images keep their class.
        classes: Number of classes, for augmentation that mixes them.
        crop_pct: Images are resized to ``size / crop_pct``; the centre of ``size`` is kept.
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        OptionError: If such images cannot be augmented like this.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    flip: bool
    classes: int = 0
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        self.augment.check(self.size, len(self.mean), self.classes)

    def resized(self, pixels: Tensor) -> Tensor:
        """Resize ``(N, c, H, W)`` uint8 pixels of stored images and keep their centre: ``(N, c, *size)``."""
        return resize(pixels, self.size, self.interpolation, self.crop_pct)

    def apply(self, pixels: Tensor) -> Tensor:
        """Augment and normalise ``(N, c, H, W)`` uint8 pixels into ``(N, channels, H, W)`` float32 images."""
        pixels = self.augment.change(pixels, self.flip, self.mean)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        images = self.augment.erase((pixels.float() - mean).div_(std))
        return images.expand(-1, self.channels, -1, -1).contiguous()


class Rows(list[tuple[Tensor, int]]):
    """Samples of one batch, as any collate function takes them, with the whole batch beside them.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``, int64.
        preparation: Says how a training mixes them.
    """

    def __init__(self, images: Tensor, labels: Tensor, preparation: Preparation | None = None) -> None:
        super().__init__(zip(images.unbind(0), labels.tolist(), strict=True))
        self.batch = (images, labels)
        self.preparation = preparation


def collate(samples: Sequence[Any]) -> Any:
    """Make a batch; samples that came as one batch need no work.

    >>> collate(Rows(torch.zeros(2, 1), torch.tensor([3, 4])))[1]
    tensor([3, 4])
    """
    return samples.batch if isinstance(samples, Rows) else default_collate(list(samples))


def collate_mixed(samples: Sequence[Any]) -> Any:
    """Make a batch for training: mixed, if the augmentation of its images says so."""
    if not isinstance(samples, Rows) or samples.preparation is None:
        return collate(samples)
    return samples.preparation.augment.mix(*samples.batch, samples.preparation.classes)


Images = TypeVar("Images", bound="ImageDataset")


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """Images with integer labels; items are ``(float32 [channels, H, W], int)``.

    Args:
        labels: ``(N,)``, int64.
        preparation: What happens to the pixels.
    """

    def __init__(self, labels: Tensor, preparation: Preparation) -> None:
        self.labels = labels
        self.preparation = preparation

    @abstractmethod
    def pixels(self, indices: Tensor) -> Tensor:
        """Return the stored images at ``indices`` ``(n,)``: ``(n, c, H, W)``, uint8."""

    def augmented(self: Images, augment: Augmentation) -> Images:
        """Return the same images with another augmentation; their memory is shared.

        Raises:
            OptionError: If these images cannot be augmented like this.
        """
        other = copy(self)
        other.preparation = replace(self.preparation, augment=augment)
        return other

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return Rows(self.preparation.apply(self.pixels(index)), self.labels[index], self.preparation)


class ArrayDataset(ImageDataset):
    """Images in memory.

    Args:
        images: ``(N, c, H, W)``, uint8, in their stored size.
        labels: ``(N,)``, int64.
        preparation: What happens to the pixels.
        most_bytes: Largest size of all resized images together. Beyond it every batch is resized when it is read:
            CIFAR-10 at 224 pixels would fill 7.5 GB.
    """

    def __init__(self, images: Tensor, labels: Tensor, preparation: Preparation, *, most_bytes: int = 2**29) -> None:
        super().__init__(labels, preparation)
        height, width = preparation.size
        small = images.shape[0] * images.shape[1] * height * width <= most_bytes
        self.stored, self.images = images, preparation.resized(images) if small else images
        self._is_resized = small

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, resized now if they were too many to resize at once."""
        least = self.preparation.augment.resized_crop
        if least is not None:
            return random_parts(self.stored[indices], self.preparation.size, least, self.preparation.interpolation)
        return self.images[indices] if self._is_resized else self.preparation.resized(self.images[indices])


class FileDataset(ImageDataset):
    """Images in files, read when they are asked for.

    Args:
        files: N paths.
        labels: ``(N,)``, int64.
        preparation: What happens to the pixels.
    """

    def __init__(self, files: Sequence[str], labels: Tensor, preparation: Preparation) -> None:
        super().__init__(labels, preparation)
        self.files = tuple(files)

    def pixels(self, indices: Tensor) -> Tensor:
        """Read the images at ``indices``.

        Raises:
            DataError: If a file is no readable image.
        """
        p, least = self.preparation, self.preparation.augment.resized_crop
        part = None if least is None else partial(random_part, least=least)
        return torch.stack(
            [decode(self.files[i], p.size, p.channels, p.interpolation, p.crop_pct, part) for i in indices.tolist()]
        )
