"""Load data sets by name, with a validation split that is never trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from widthkit.errors import DataError, Option, OptionError
from widthkit.modules.inputs import INTERPOLATIONS, InputForm, check_normalisation
from widthkit.train.augment import Augmentation, augmentation
from widthkit.train.datasets import ArrayDataset, FileDataset, ImageDataset, Preparation, collate, collate_mixed
from widthkit.train.images import IMAGENET_MEAN, IMAGENET_STD, check_channels, image_form, statistics, to_grey
from widthkit.train.parts import Part, Source
from widthkit.train.sources import read_source
from widthkit.train.split import stratified_order

_LARGEST_VALID = 5000
_LARGEST_FOLDER_SIZE = 224


@dataclass(frozen=True)
class DataSplits:
    """A data set in three disjoint parts.

    Items are ``(float32 [in_channels, H, W] normalised per channel, int label)``. Every part is in a fixed shuffled
    order in which each stretch has all classes in proportion, so that every batch is representative.

    Attributes:
        train: For training.
        valid: For searches and calibration.
        test: For the final figures only.
        num_classes: Number of classes.
        class_names: Their names, by label.
        native_size: Height and width of the images as stored (in folders: of the first one).
        channels: Channels of the images as stored, 1 for grey.
        name: The name it was loaded by.
        inputs: What happened to the images: normalisation, size, crop, interpolation, and where they come from.
    """

    train: ImageDataset
    valid: ImageDataset
    test: ImageDataset
    num_classes: int
    class_names: tuple[str, ...]
    native_size: tuple[int, int]
    channels: int
    name: str
    inputs: InputForm


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    in_channels: int = 3,
    seed: int = 0,
    limit: int | None = None,
    augment: bool | Mapping[str, Any] | Augmentation = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
) -> DataSplits:
    """Load a data set; nothing is ever downloaded.

    The validation split is the data set's own if it comes with validation and test, else a stratified fifth of the
    training images, at most 5,000, chosen by ``seed``. The test split is the official one (for ``digits`` a fixed
    fifth); data that come without get a fifth, chosen by ``seed``.

    Args:
        name: ``digits`` (comes with scikit-learn), ``fashion-mnist``, ``cifar10``, ``folder:DIR`` (class folders in
            ``DIR/train`` and ``DIR/val`` or ``DIR/test``, or in ``DIR`` itself) or ``npz:FILE`` (``train_images``,
            ``train_labels``, ``test_images``, ``test_labels``, or ``x_train`` and so on, or ``images`` and
            ``labels``; images uint8 ``(N, H, W)`` or ``(N, H, W, C)``).
        data_dir: Where the files of ``fashion-mnist`` and ``cifar10`` lie.
        image_size: Height and width to resize to. ``None`` keeps the stored size; for folders it takes the shorter
            side of the first image, at most 224.
        in_channels: Channels the model takes. Grey is repeated for 3, RGB becomes luminance for 1.
        seed: Chooses the splits that the data set does not come with.
        limit: Keep at most this many samples of each part, classes in proportion.
        augment: What happens to training images at random: the settings of
            :class:`widthkit.train.augment.Augmentation`. ``True`` crops them out of a black border of an eighth of
            their size and mirrors half of them (except digits). Random numbers come from torch's global generator.
        mean: Means with which pixels are normalised, as shares of 0..1, one per channel of the model or one for all;
            by default those of the training split, in folders ImageNet's.
        std: Deviations, likewise; both or neither.
        crop: Resize images to ``image_size / crop`` and keep their centre of ``image_size``, as timm's ``crop_pct``.
            By default all of the image is kept, in folders its largest centred square.
        interpolation: ``bilinear`` (default) or ``bicubic``, for resizing.

    Returns:
        The splits.

    Raises:
        DataError: If the name is unknown, an option is out of range, or the data are missing, damaged or of the
            wrong form.
        OptionError: If ``mean``, ``std``, ``crop`` or ``interpolation`` is wrong, or if the images cannot be augmented
            like this.

    >>> data = load_data("digits", image_size=16)
    >>> len(data.train), len(data.valid), len(data.test), data.num_classes
    (1151, 287, 359, 10)
    >>> image, label = data.train[0]
    >>> image.shape, image.dtype, type(label)
    (torch.Size([3, 16, 16]), torch.float32, <class 'int'>)
    """
    for option, value, low in (("image_size", image_size, 1), ("limit", limit, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise DataError(Option(option), f" must be a whole number of at least {low}, not {value!r}.")
    how = augmentation(augment)
    given = check_normalisation(mean, std, in_channels)
    _check_resizing(crop, interpolation)
    source = read_source(name, None if data_dir is None else Path(data_dir).expanduser())
    native_size, channels = _form(source.train)
    for part in (source.valid, source.test):
        check_channels(channels if part is None else _form(part)[1], in_channels, name)
    parts = _split(source, seed, name)
    quiet, origin = _preparation(parts[0], image_size, in_channels, source, given)
    quiet = replace(quiet, crop_pct=crop or 1.0, interpolation=interpolation or "bilinear")
    train, valid, test = (part if limit is None else part.take(np.arange(len(part.labels))[:limit]) for part in parts)
    return DataSplits(
        train=_dataset(train, replace(quiet, augment=how)),
        valid=_dataset(valid, quiet),
        test=_dataset(test, quiet),
        num_classes=len(source.class_names),
        class_names=source.class_names,
        native_size=native_size,
        channels=channels,
        name=name,
        inputs=_input_form(quiet, origin),
    )


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, train: bool, seed: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """Make a loader of batches ``(images [N, C, H, W], labels [N])``.

    Args:
        dataset: Any map-style data set with a length.
        batch_size: Images per batch.
        train: Shuffle, mix images if their augmentation says so, and leave a last, smaller batch out (batch norm
            suffers from it); else nothing of this.
        seed: Makes the order.
        workers: Processes that load data; worth it for folders, not for data in memory.

    Raises:
        OptionError: If ``batch_size`` or ``workers`` is out of range.
        DataError: If the data set is empty.

    >>> loader = make_loader(load_data("digits").valid, 100, train=False)
    >>> [len(labels) for _, labels in loader]
    [100, 100, 87]
    """
    if batch_size < 1 or workers < 0:
        wrong = (Option("batch_size", batch_size), 1) if batch_size < 1 else (Option("workers", workers), 0)
        raise OptionError(wrong[0], f": at least {wrong[1]} is needed.")
    count = len(dataset) if isinstance(dataset, Sized) else 0
    if count == 0:
        raise DataError(f"the data set ({type(dataset).__name__}) is empty; check where it was loaded from.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train and count >= batch_size,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate_mixed if train else collate,
    )


def _split(source: Source, seed: int, name: str) -> tuple[Part, Part, Part]:
    train, valid, test = source.train, source.valid, source.test
    if test is None:
        test, train = _hold_out(train, len(train.labels) // 5, seed, name)
    else:
        test = test.take(stratified_order(test.labels, 0))
    if valid is None:
        valid, train = _hold_out(train, len(train.labels) // 5, seed + 1, name)
    else:
        valid = valid.take(stratified_order(valid.labels, 0))
    return train, valid, test


def _hold_out(part: Part, count: int, seed: int, name: str) -> tuple[Part, Part]:
    """Take a stratified sample out; return it and the rest."""
    count = min(count, _LARGEST_VALID)
    if count == 0:
        raise DataError(f"{name}: {len(part.labels)} images are too few to hold some out; give it at least 10.")
    order = stratified_order(part.labels, seed)
    return part.take(order[:count]), part.take(order[count:])


def _form(part: Part) -> tuple[tuple[int, int], int]:
    if isinstance(part.images, tuple):
        return image_form(part.images[0])
    _, height, width, channels = part.images.shape
    return (height, width), channels


def _check_resizing(crop: float | None, interpolation: str | None) -> None:
    if crop is not None and not 0 < crop <= 1:
        raise OptionError(Option("crop", crop), ": the share of an image that is kept is above 0 and at most 1")
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise OptionError(Option("interpolation", interpolation), f": choose from {', '.join(INTERPOLATIONS)}")


def _preparation(
    train: Part,
    image_size: int | None,
    in_channels: int,
    source: Source,
    given: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> tuple[Preparation, str]:
    """Decide size and normalisation from the whole training split, so that a limit does not change them.

    Returns:
        The preparation, and where its normalisation comes from.
    """
    native, _ = _form(train)
    files = isinstance(train.images, tuple)
    side = min(*native, _LARGEST_FOLDER_SIZE) if files and image_size is None else image_size
    size = native if side is None else (side, side)
    if given is not None:
        mean, std = (tuple(255 * value for value in values) for values in given)
        origin = "the given mean and deviation"
    elif files:
        mean, std, origin = IMAGENET_MEAN, IMAGENET_STD, "ImageNet"
        if in_channels == 1:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    else:
        (mean, std), origin = statistics(_pixels(train, in_channels)), "the training images"
    plain = Preparation(size, in_channels, mean, std, Augmentation(), source.flip, len(source.class_names))
    return plain, origin


def _input_form(preparation: Preparation, origin: str) -> InputForm:
    mean, std = (tuple(value / 255 for value in values) for values in (preparation.mean, preparation.std))
    return InputForm(mean, std, preparation.size, preparation.crop_pct, preparation.interpolation, origin)


def _dataset(part: Part, preparation: Preparation) -> ImageDataset:
    labels = torch.from_numpy(part.labels)
    if isinstance(part.images, tuple):
        return FileDataset(part.images, labels, preparation)
    return ArrayDataset(_pixels(part, preparation.channels), labels, preparation)


def _pixels(part: Part, in_channels: int) -> Tensor:
    """Return ``(N, c, H, W)`` uint8, c being 1 where the stored images or the model are grey."""
    assert not isinstance(part.images, tuple)
    images = torch.from_numpy(part.images).permute(0, 3, 1, 2)
    return to_grey(images) if in_channels == 1 and images.shape[1] == 3 else images.contiguous()
