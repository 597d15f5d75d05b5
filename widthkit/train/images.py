"""Pixels: channels, sizes, statistics and augmentation, on whole batches of uint8 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from widthkit.errors import DataError
from widthkit.modules.inputs import scaled

# What networks pretrained on ImageNet expect, in grey levels of 0..255.
IMAGENET_MEAN: tuple[float, ...] = (123.675, 116.28, 103.53)
IMAGENET_STD: tuple[float, ...] = (58.395, 57.12, 57.375)
_CHUNK = 4096


def check_channels(stored: int, wanted: int, where: str) -> None:
    """Refuse images that a model's stem cannot take.

    Args:
        stored: Channels of the images.
        wanted: Channels the model takes.
        where: The data set, for the message.

    Raises:
        DataError: Unless the numbers agree, or one is 1 and the other 3.
    """
    if wanted < 1 or (stored != wanted and {stored, wanted} != {1, 3}):
        raise DataError(
            f"{where}: images have {stored} channels, the model takes {wanted}; only grey and RGB convert into each "
            f"other. Give the model in_channels={stored}."
        )


def to_grey(images: Tensor) -> Tensor:
    """Turn RGB into luminance (ITU-R 601, to the last digit as Pillow does it).

    Args:
        images: ``(N, 3, H, W)``, uint8.

    Returns:
        ``(N, 1, H, W)``, uint8.

    >>> to_grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)).item()
    76
    """
    red, green, blue = (images[:, channel].int() for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8).unsqueeze(1)


def resize(images: Tensor, size: tuple[int, int], interpolation: str = "bilinear", crop_pct: float = 1.0) -> Tensor:
    """Resize images with an antialiased filter, and keep their centre.

    Args:
        images: ``(N, C, H, W)``, uint8.
        size: Height and width of the result.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: Images are resized to ``size / crop_pct``; the centre of ``size`` is kept.

    Returns:
        ``(N, C, *size)``, uint8.

    >>> resize(torch.full((2, 1, 8, 8), 7, dtype=torch.uint8), (4, 4)).unique().tolist()
    [7]
    """
    whole = [scaled(side, crop_pct) for side in size]
    if list(images.shape[-2:]) != whole and len(images):
        parts = torch.split(images, _CHUNK)
        images = torch.cat([F.interpolate(part, whole, mode=interpolation, antialias=True) for part in parts])
    return center_crop(images, list(size)) if whole != list(size) else images


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of every channel over all images and pixels.

    Args:
        images: ``(N, C, H, W)``, uint8, N at least 1.

    Returns:
        Means and deviations, in grey levels of 0..255; a deviation is at least 1, so that one can divide by it.

    >>> statistics(torch.tensor([0, 10], dtype=torch.uint8).view(2, 1, 1, 1))
    ((5.0,), (5.0,))
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in torch.split(images, _CHUNK):
        # One float copy of a chunk at a time: the whole set in double precision would need eight times its memory.
        values = part.double()
        total += values.sum(dim=(0, 2, 3))
        squares += values.square_().sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1)
    return tuple(mean.tolist()), tuple(deviation.tolist())


def border(crop: float, side: int) -> int:
    """Return the pixels of a border that is given in pixels or, below 1, as a share of an image's side.

    >>> border(4, 32), border(0.125, 32), border(0.125, 5)
    (4, 4, 1)
    """
    return int(crop) if crop >= 1 else max(1, int(side * crop))


def crop_and_flip(images: Tensor, flip: bool, crop: float = 0.125) -> Tensor:
    """Shift every image at random by up to the border's size, black coming in; mirror half of them if ``flip``.

    Random numbers come from torch's global generator.

    Args:
        images: ``(N, C, H, W)``, any type.
        flip: Whether to mirror.
        crop: The border, as in :func:`border`; 0 shifts nothing.

    Returns:
        Images of the same shape.
    """
    count, channels, height, width = images.shape
    if not crop:
        return torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images) if flip else images
    pad_y, pad_x = border(crop, height), border(crop, width)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows = torch.randint(0, 2 * pad_y + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * pad_x + 1, (count, 1)) + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def decode(
    path: str,
    size: tuple[int, int],
    channels: int,
    interpolation: str = "bilinear",
    crop_pct: float = 1.0,
    part: Callable[[Image.Image], tuple[int, int, int, int]] | None = None,
) -> Tensor:
    """Read an image file, resize it without changing its proportions, and keep its centre, as timm does.

    Args:
        path: The file.
        size: Height and width of the result.
        channels: 1 for grey, 3 for RGB.
        interpolation: ``bilinear`` or ``bicubic``.
        crop_pct: The image is resized to cover ``size / crop_pct``; the centre of ``size`` is kept.
        part: Chooses the part that is kept instead: its top, left, height and width.

    Returns:
        ``(channels, *size)``, uint8.

    Raises:
        DataError: If the file is no readable image.
    """
    method = Image.Resampling[interpolation.upper()]
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
            if part is None:
                image = image.resize(size[::-1], method, box=_centre(image.size, size[::-1], crop_pct))
            else:
                top, left, height, width = part(image)
                image = image.crop((left, top, left + width, top + height)).resize(size[::-1], method)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {' '.join(str(error).split())}; replace or delete it.") from error
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, channels).permute(2, 0, 1)


def _centre(stored: tuple[int, int], size: tuple[int, int], crop_pct: float) -> tuple[float, float, float, float]:
    """Return what a centre crop after resizing shows of the stored image: left, top, right, bottom in its pixels.

    Args:
        stored: Width and height of the image.
        size: Width and height of the crop.
        crop_pct: The share of the resized image's shorter side that the crop keeps.
    """
    covered = [scaled(side, crop_pct) for side in size]
    tight = 0 if covered[0] * stored[1] >= covered[1] * stored[0] else 1
    # Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them.
    resized = [covered[tight] * side // stored[tight] for side in stored]
    starts = [round((whole - side) / 2) for whole, side in zip(resized, size, strict=True)]
    factors = [side / whole for side, whole in zip(stored, resized, strict=True)]
    left, top = (start * factor for start, factor in zip(starts, factors, strict=True))
    right, bottom = (
        min((start + side) * factor, whole)
        for start, side, factor, whole in zip(starts, size, factors, stored, strict=True)
    )
    return left, top, right, bottom


def image_form(path: str) -> tuple[tuple[int, int], int]:
    """Read an image file's height, width and number of channels (1 or 3).

    Raises:
        DataError: If the file is no readable image.
    """
    try:
        with Image.open(path) as file:
            return (file.height, file.width), 1 if file.mode[0] in "L1IF" else 3
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {' '.join(str(error).split())}; replace or delete it.") from error
