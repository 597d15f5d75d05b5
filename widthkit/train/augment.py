"""Augmentation: what happens to training images at random.

All random numbers follow from torch's global generator, so a seeded run repeats, in worker processes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BeforeValidator, Field, field_validator, model_validator
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels_of

from widthkit.checked import CheckedSettings, Number, checked, refusal
from widthkit.errors import Option, OptionError, first_line
from widthkit.train.images import crop_and_flip, resize
from widthkit.train.rng import seeded

Box = tuple[int, int, int, int]
_ASPECTS = (3 / 4, 4 / 3)


class Augmentation(CheckedSettings):
    """How training images are changed at random; by default not at all.

    Attributes:
        crop: Cut every image at its own size out of a black border of so many pixels, or of such a share of its size
            where it is below 1.
        flip: Mirror half of the images, left to right; data sets in which that changes the class (digits) stay as
            they are.
        resized_crop: Cut out a part of at least this share of the area, with an aspect ratio from 3/4 to 4/3, and
            resize it (Szegedy et al. 2015, section 6). Image files are cut before they are resized.
        color_jitter: Change brightness, contrast and saturation by up to this share.
        auto_augment: A policy as timm writes it: ``rand-m9-mstd0.5-inc1``, ``augmix-m3-w3``, ``original``, ``v0``.
        random_erasing: Probability with which a rectangle of an image becomes noise (Zhong et al. 2017).
        mixup: Alpha of mixup (Zhang et al. 2018), which gives targets that are class probabilities; 0 turns it off.
        cutmix: Alpha of CutMix (Yun et al. 2019), likewise. With both, every batch takes one of them.

    >>> checked(Augmentation, {"crop": 4, "resized_crop": 0.08})
    Traceback (most recent call last):
    widthkit.errors.OptionError: crop=4 and resized_crop=0.08 cut the same image twice; turn one of them off.
    """

    crop: Number = Field(default=0.0, ge=0)
    flip: bool = False
    resized_crop: Number | None = Field(default=None, gt=0, le=1)
    color_jitter: Number | None = Field(default=None, gt=0)
    auto_augment: str | None = None
    random_erasing: Number = Field(default=0.0, ge=0, le=1)
    mixup: Number = Field(default=0.0, ge=0)
    cutmix: Number = Field(default=0.0, ge=0)

    @field_validator("crop")
    @classmethod
    def _pixels_or_share(cls, crop: float) -> float:
        if crop > 1 and crop != int(crop):
            raise refusal(f"crop={crop:g} is neither a whole number of pixels nor a share below 1.")
        return crop

    @field_validator("auto_augment")
    @classmethod
    def _known_policy(cls, policy: str | None) -> str | None:
        if policy is not None:
            _check_policy(policy)
        return policy

    @model_validator(mode="after")
    def _one_crop(self) -> Augmentation:
        if self.crop and self.resized_crop is not None:
            both = f"crop={self.crop:g} and resized_crop={self.resized_crop:g}"
            raise refusal(f"{both} cut the same image twice; turn one of them off.")
        return self

    def check(self, size: tuple[int, int], channels: int, classes: int) -> None:
        """Refuse images that cannot be augmented like this.

        Args:
            size: Their height and width.
            channels: Their channels as stored.
            classes: Number of classes.

        Raises:
            OptionError: If so.
        """
        if self.crop >= min(size):
            raise OptionError(Option("crop", self.crop), f" is too wide a border for images of {size[0]}x{size[1]}.")
        for name in ("color_jitter", "auto_augment"):
            if getattr(self, name) is not None and channels not in (1, 3):
                raise OptionError(Option(name), f" needs grey or RGB images, these have {channels} channels.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) and classes < 2:
                raise OptionError(Option(name), f" needs at least 2 classes, these images have {classes}.")

    def change(self, pixels: Tensor, mirror: bool, mean: tuple[float, ...]) -> Tensor:
        """Crop, mirror and recolour images; parts of other sizes are cut out before (:func:`random_part`).

        Args:
            pixels: ``(N, c, H, W)``, uint8.
            mirror: Whether mirrored images keep their class.
            mean: Per channel, in grey levels of 0..255; fills what a policy moves into the image.

        Returns:
            Images of the same shape and type.
        """
        if self.crop or (self.flip and mirror):
            pixels = crop_and_flip(pixels, self.flip and mirror, self.crop)
        if self.auto_augment is not None:
            fill = tuple(round(value) for value in (mean * 3 if len(mean) == 1 else mean))
            policy = _policy(self.auto_augment, min(pixels.shape[-2:]), fill)
            # Policies draw from Python and NumPy; inside, both follow from torch's generator.
            with seeded(int(torch.randint(2**63 - 1, ()))):
                pixels = torch.stack([_recoloured(image, policy) for image in pixels])
        if self.color_jitter is not None:
            jitter = v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)
            pixels = torch.stack([jitter(image) for image in pixels])
        return pixels

    def erase(self, images: Tensor) -> Tensor:
        """Put noise (normal, deviation 1) into a rectangle of some images, in place.

        Args:
            images: ``(N, C, H, W)``, normalised.
        """
        if self.random_erasing:
            erasing = v2.RandomErasing(self.random_erasing, value="random", inplace=True)
            for image in images:
                erasing(image)
        return images

    def mix(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mix every image of a batch with another one.

        Args:
            images: ``(N, C, H, W)``.
            labels: ``(N,)``, int64.
            classes: Number of classes.

        Returns:
            Images of the same shape, and class probabilities ``(N, classes)``; without mixup and CutMix both as they
            are.
        """
        if not self.mixup and not self.cutmix:
            return images, labels
        mixed: tuple[Tensor, Tensor] = _mixing(self.mixup, self.cutmix, classes)(images, labels)
        return mixed


def spelled_out(value: Any) -> Any:
    """Turn an augmentation, or true and false where one is wanted, into settings by name; anything else stays.

    >>> spelled_out(True), spelled_out(False)
    ({'crop': 0.125, 'flip': True}, {})
    """
    if isinstance(value, bool):
        return {"crop": 0.125, "flip": True} if value else {}
    return value.model_dump() if isinstance(value, Augmentation) else value


AnyAugmentation = Annotated[Augmentation, BeforeValidator(spelled_out)]
"""A field that also takes true (crop out of a border of an eighth, and mirror) and false."""


def augmentation(value: bool | Mapping[str, Any] | Augmentation) -> Augmentation:
    """Read an augmentation.

    Args:
        value: Its settings; ``True`` crops out of a border of an eighth and mirrors, ``False`` leaves images as they
            are.

    Raises:
        OptionError: If a setting is not known or makes no sense.

    >>> augmentation(True) == augmentation({"crop": 0.125, "flip": True})
    True
    """
    return value if isinstance(value, Augmentation) else checked(Augmentation, spelled_out(value))


def random_part(image: Tensor | Image.Image, least: float) -> Box:
    """Draw a part of an image, as for ``resized_crop``.

    Args:
        image: ``(C, H, W)``, or a Pillow image.
        least: Smallest share of the area.

    Returns:
        Its top, left, height and width.
    """
    top, left, height, width = v2.RandomResizedCrop.get_params(image, (least, 1.0), _ASPECTS)
    return int(top), int(left), int(height), int(width)


def random_parts(images: Tensor, size: tuple[int, int], least: float, interpolation: str = "bilinear") -> Tensor:
    """Cut a random part out of every image and resize it.

    Args:
        images: ``(N, C, H, W)``, uint8.
        size: Height and width to resize to.
        least: Smallest share of the area.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        ``(N, C, *size)``, uint8.
    """
    parts = []
    for image in images:
        top, left, height, width = random_part(image, least)
        parts.append(resize(image[None, :, top : top + height, left : left + width], size, interpolation))
    return torch.cat(parts)


def _recoloured(image: Tensor, policy: Callable[[Image.Image], Image.Image]) -> Tensor:
    whole = pixels_of.to_pil_image(image)
    # Policies fill with a colour, so grey images are RGB meanwhile; equal channels stay equal.
    changed: Tensor = pixels_of.pil_to_tensor(policy(whole.convert("RGB")).convert(whole.mode))
    return changed


def _check_policy(text: str) -> None:
    try:
        # timm passes over sections that it cannot read.
        unread = [part for part in text.split("-")[1:] if not re.match(r"[a-z]+\d|t[a-z]", part)]
        if unread:
            raise ValueError(f"'{unread[0]}' has no value")
        _policy(text, 32, (128, 128, 128))
    except (AssertionError, ValueError, KeyError) as error:
        raise refusal(
            f"auto_augment '{text}' is no policy of timm ({first_line(error)}); write it like 'rand-m9-mstd0.5-inc1'."
        ) from None


@cache
def _policy(text: str, side: int, fill: tuple[int, ...]) -> Any:
    """Make timm's transform of Pillow images; distances and fill are those of timm's own training."""
    hparams: dict[str, Any] = {"translate_const": int(side * 0.45), "img_mean": fill}
    if text.startswith("rand"):
        return rand_augment_transform(text, hparams)
    if text.startswith("augmix"):
        return augment_and_mix_transform(text, {**hparams, "translate_pct": 0.3})
    return auto_augment_transform(text, hparams)


@cache
def _mixing(mixup: float, cutmix: float, classes: int) -> Any:
    ways = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    ways += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(ways) if len(ways) > 1 else ways[0]
