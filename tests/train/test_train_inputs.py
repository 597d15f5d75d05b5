"""Normalisation, crop and interpolation of data: against timm's own transforms, Pillow and plain arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from widthkit.errors import OptionError
from widthkit.modules.inputs import InputForm
from widthkit.train import load_data
from widthkit.train.images import decode, resize


def picture(height, width, seed=0):
    """A smooth picture with some noise, as photographs are."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + random.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("stored", "size", "crop_pct"),
    [((90, 130), 32, 0.875), ((131, 77), 32, 0.95), ((60, 60), 28, 1.0), ((20, 31), 32, 0.9), ((37, 200), 24, 0.904)],
)
def test_files_are_prepared_as_timm_prepares_them(tmp_path, stored, size, crop_pct, interpolation):
    Image.fromarray(picture(*stored)).save(tmp_path / "a.png")
    transform = create_transform(size, interpolation=interpolation, crop_pct=crop_pct, mean=(0,) * 3, std=(1,) * 3)
    truth = 255 * transform(Image.open(tmp_path / "a.png"))
    ours = decode(str(tmp_path / "a.png"), (size, size), 3, interpolation, crop_pct)
    # The same filter at the same places; sums may be rounded to the neighbouring grey level.
    assert (ours.double() - truth.double()).abs().max() <= 1.01


def test_very_long_images_need_no_memory(tmp_path):
    Image.new("L", (60000, 1), 9).save(tmp_path / "a.png")
    assert decode(str(tmp_path / "a.png"), (64, 64), 1).unique().tolist() == [9]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_arrays_are_resized_and_cropped_like_files(interpolation):
    image = picture(48, 48)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None], (28, 28), interpolation, 0.875)[0]
    scaled = tv.resize(Image.fromarray(image), 32, InterpolationMode(interpolation))
    truth = torch.from_numpy(np.asarray(tv.center_crop(scaled, 28)).copy()).permute(2, 0, 1)
    # PyTorch and Pillow round the weights of the filter differently.
    assert (ours.int() - truth.int()).abs().max() <= 2


def test_large_and_small_sets_are_cropped_alike(tmp_path):
    from widthkit.train.augment import Augmentation
    from widthkit.train.datasets import ArrayDataset, Preparation

    images = torch.from_numpy(np.stack([picture(20, 20, seed) for seed in range(3)])).permute(0, 3, 1, 2)
    preparation = Preparation(
        (16, 16), 3, (0.0,), (1.0,), augment=Augmentation(), flip=False, crop_pct=0.8, interpolation="bicubic"
    )
    now, later = (ArrayDataset(images, torch.arange(3), preparation, most_bytes=most) for most in (2**20, 1))
    assert (now.images.shape[-1], later.images.shape[-1]) == (16, 20)
    assert torch.equal(now.pixels(torch.arange(3)), later.pixels(torch.arange(3)))
    assert torch.equal(now.pixels(torch.arange(3)), images[:, :, 2:18, 2:18])


def write_npz(path, channels):
    shape = (40, 8, 8, channels) if channels > 1 else (40, 8, 8)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 4)


@pytest.mark.parametrize(("stored", "channels"), [(3, 3), (1, 3), (1, 1)])
def test_given_mean_and_deviation(tmp_path, stored, channels):
    write_npz(tmp_path / "a.npz", stored)
    mean, std = (0.2, 0.4, 0.6)[:channels], (0.1, 0.2, 0.3)[:channels]
    data = load_data(f"npz:{tmp_path}/a.npz", in_channels=channels, mean=mean, std=std)
    raw = load_data(f"npz:{tmp_path}/a.npz", in_channels=channels, mean=[0], std=[1])
    assert raw.train[0][0].min() >= 0
    assert raw.train[0][0].max() <= 1
    for (image, _), (share, _) in zip(data.train, raw.train, strict=True):
        truth = (share - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        torch.testing.assert_close(image, truth, rtol=0, atol=1e-5)
    form = InputForm(mean, std, (8, 8), 1.0, "bilinear", "the given mean and deviation")
    assert data.inputs.mean == pytest.approx(form.mean)
    assert (data.inputs.size, data.inputs.crop_pct, data.inputs.source) == (form.size, 1.0, form.source)


def test_splits_say_what_was_used(tmp_path):
    write_npz(tmp_path / "a.npz", 3)
    data = load_data(f"npz:{tmp_path}/a.npz", image_size=12, crop=0.75, interpolation="bicubic")
    assert (data.inputs.size, data.inputs.crop_pct, data.inputs.interpolation) == ((12, 12), 0.75, "bicubic")
    assert data.inputs.source == "the training images"
    pixels = torch.stack([image for image, _ in load_data(f"npz:{tmp_path}/a.npz", mean=[0], std=[1]).train])
    assert data.inputs.mean == pytest.approx(pixels.double().mean((0, 2, 3)).tolist(), abs=1e-6)
    for label in "ab":
        (tmp_path / "f" / label).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(picture(20, 20, index)).save(tmp_path / "f" / label / f"{index}.png")
    files = load_data(f"folder:{tmp_path}/f", image_size=12, crop=0.75)
    assert (files.inputs.source, files.inputs.size, files.inputs.crop_pct) == ("ImageNet", (12, 12), 0.75)
    assert files.inputs.mean == pytest.approx((0.485, 0.456, 0.406))
    assert files.train[0][0].shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "mean needs std"),
        ({"mean": [0.5] * 2, "std": [0.5] * 2}, "mean has 2 values; the model takes 3 channels"),
        ({"crop": 0.0}, "crop=0.0: the share of an image"),
        ({"crop": 1.2}, "crop=1.2: the share of an image"),
        ({"interpolation": "nearest"}, "interpolation='nearest': choose from bilinear, bicubic"),
    ],
)
def test_forms_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        load_data("digits", **options)
