"""Augmentation: geometry and colours against other libraries and closed forms, and what must not change."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import nn
from torchvision.transforms import v2

import widthkit as wk
from widthkit.checked import checked
from widthkit.errors import OptionError
from widthkit.train.augment import Augmentation
from widthkit.train.datasets import ArrayDataset, FileDataset, Preparation
from widthkit.train.losses import count_correct, cross_entropy

CLASSES = 5


def dataset(augment, images, size=None, flip=True, mean=0.0, std=1.0):
    """Images in memory whose items are ``(pixels - mean) / std``."""
    n, channels, *own = images.shape
    how = checked(Augmentation, augment)
    preparation = Preparation(size or tuple(own), channels, (mean,) * channels, (std,) * channels, how, flip, CLASSES)
    return ArrayDataset(images, torch.arange(n) % CLASSES, preparation)


def noise(n=12, channels=3, side=16, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def served(data, seed=0):
    """Return all images of a data set as one batch, and their labels."""
    torch.manual_seed(seed)
    return data.__getitems__(range(len(data))).batch


def batch_of(data, seed=0):
    """Return all images as the one batch of a training loader, in the data's order."""
    torch.manual_seed(seed)
    return wk.make_loader(data, len(data), train=True).collate_fn(data.__getitems__(range(len(data))))


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "pad"), [(4, 4), (1, 1), (0.25, 3), (0.125, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_every_image_is_one_window_of_the_padded_image(crop, pad, flip):
    one = torch.arange(1, 145).view(1, 1, 12, 12).byte()
    images, _ = served(dataset({"crop": crop, "flip": flip}, one.expand(900, -1, -1, -1)))
    padded = F.pad(one[0], (pad,) * 4)
    steps = range(2 * pad + 1)
    windows = [padded[:, y : y + 12, x : x + 12] for y in steps for x in steps]
    windows += [w.flip(-1) for w in windows] if flip else []
    which = {next(i for i, w in enumerate(windows) if torch.equal(w.float(), image)) for image in images}
    assert len(which) > 0.97 * len(windows)  # 900 draws leave out a few of 162 at most


def test_flipping_alone_mirrors_half_of_the_images():
    images = noise(400, side=4)
    out, _ = served(dataset({"flip": True}, images))
    mirrored = [torch.equal(a, b.flip(-1).float()) for a, b in zip(out, images, strict=True)]
    same = [torch.equal(a, b.float()) for a, b in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240  # four standard deviations


def test_what_must_not_be_mirrored_never_is():
    images = noise(40, side=8)
    out, _ = served(dataset({"flip": True}, images, flip=False))
    assert torch.equal(out, images.float())


def test_random_parts_are_those_of_torchvision():
    images = noise(20, side=24)
    out, _ = served(dataset({"resized_crop": 0.1}, images, size=(9, 9)))
    reference = v2.RandomResizedCrop((9, 9), scale=(0.1, 1.0), antialias=True)
    torch.manual_seed(0)
    truth = torch.stack([reference(image.double()) for image in images])
    # Fixed-point arithmetic and rounding to whole grey levels.
    assert (out - truth).abs().max() <= 1.0
    assert (out - truth).abs().mean() < 0.5


def test_random_parts_of_files_are_cut_before_they_are_resized(tmp_path):
    files = []
    for index, image in enumerate(noise(6, side=40)):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image[:, : 20 + index].permute(1, 2, 0).numpy()).save(files[-1])
    how = checked(Augmentation, {"resized_crop": 0.2})
    preparation = Preparation((8, 10), 3, (0.0,) * 3, (1.0,) * 3, how, True)
    out, _ = served(FileDataset(files, torch.zeros(6, dtype=torch.int64), preparation))
    reference = v2.Compose([v2.RandomResizedCrop((8, 10), scale=(0.2, 1.0)), v2.PILToTensor()])
    torch.manual_seed(0)
    truth = torch.stack([reference(Image.open(file)) for file in files])
    assert torch.equal(out, truth.float())


# --- colours ----------------------------------------------------------------------------------------------------------


def test_jitter_stays_within_its_strength():
    even = torch.full((200, 3, 4, 4), 100, dtype=torch.uint8)
    out, _ = served(dataset({"color_jitter": 0.3}, even))
    # Contrast and saturation leave an even grey image as it is, so only its brightness changes.
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    levels = out[:, 0, 0, 0]
    assert (levels.min(), levels.max()) >= (69, 100)
    assert 69 <= levels.min() < 75
    assert 125 < levels.max() <= 130
    grey, _ = served(dataset({"color_jitter": 0.3}, even[:, :1]))
    assert grey.std() > 10


def test_policies_are_timm_s():
    images = noise(10, side=20)
    out, _ = served(dataset({"auto_augment": "rand-m9-n2-mstd0.5-inc1"}, images, mean=128.0))
    torch.manual_seed(0)
    seed = int(torch.randint(2**63 - 1, ()))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    policy = rand_augment_transform("rand-m9-n2-mstd0.5-inc1", {"translate_const": 9, "img_mean": (128,) * 3})
    truth = [np.array(policy(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    assert torch.equal(out + 128, torch.from_numpy(np.stack(truth)).permute(0, 3, 1, 2).float())
    assert not torch.equal(out + 128, images.float())


@pytest.mark.parametrize("policy", ["rand-m9-n3-p1", "augmix-m5-w2", "original", "v0-mstd0.5", "3a"])
def test_policies_keep_the_form_of_grey_and_colour(policy):
    grey = noise(8, channels=1)
    out, labels = served(dataset({"auto_augment": policy}, grey))
    assert out.shape == grey.shape
    assert not torch.equal(out, grey.float())
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert out.min() >= 0
    assert out.max() <= 255
    assert served(dataset({"auto_augment": policy}, noise(3)))[0].shape == (3, 3, 16, 16)


def test_erasing_leaves_the_rest_untouched():
    images = torch.full((400, 3, 20, 20), 7, dtype=torch.uint8)
    out, _ = served(dataset({"random_erasing": 0.4}, images, mean=2.0))
    erased = [image for image in out if not torch.equal(image, torch.full((3, 20, 20), 5.0))]
    assert 120 < len(erased) < 200  # four standard deviations
    values = []
    for image in erased:
        hole = (image != 5).all(0)
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert hole[top:bottom, left:right].all()
        assert torch.equal(image != 5, hole.expand(3, -1, -1))
        assert 0.01 < hole.float().mean() < 0.36  # 2 to 33 % before rounding to pixels
        values.append(image[:, hole].flatten())
    pixels = torch.cat(values)
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02


# --- mixing -----------------------------------------------------------------------------------------------------------


def shares(targets, labels):
    """Return every target's share of its own label, where its partner (the one before) has another."""
    other = labels != labels.roll(1)
    return targets[other, labels[other]]


def test_mixup_is_its_formula():
    data = dataset({"mixup": 0.7}, noise(15))
    images, targets = batch_of(data, seed=3)
    plain, labels = served(data, seed=3)
    share = shares(targets, labels)
    lam = float(share[0])
    assert 0 < lam < 1
    torch.testing.assert_close(share, torch.full_like(share, lam))
    truth = lam * plain.double() + (1 - lam) * plain.double().roll(1, 0)
    torch.testing.assert_close(images.double(), truth, rtol=0, atol=1e-4)  # values up to 255 in single precision
    hot = F.one_hot(labels, CLASSES).double()
    torch.testing.assert_close(targets.double(), lam * hot + (1 - lam) * hot.roll(1, 0), rtol=0, atol=1e-6)


def test_alpha_is_the_beta_distribution_s():
    data = dataset({"mixup": 50.0}, noise(5, side=2))
    drawn = torch.tensor([float(batch_of(data, seed=s)[1][0, 0]) for s in range(300)])
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(drawn.std() - 1 / (2 * (2 * 50 + 1) ** 0.5)) < 0.01  # of Beta(50, 50)


def test_cutmix_takes_every_pixel_from_one_of_two_images():
    data = dataset({"cutmix": 1.0}, noise(15))
    for seed in range(5):
        images, targets = batch_of(data, seed=seed)
        plain, labels = served(data, seed=seed)
        own, other = (images == plain).all(1), (images == plain.roll(1, 0)).all(1)
        assert (own | other).all()
        share = own.float().mean((1, 2))
        torch.testing.assert_close(share, torch.full((15,), float(share[0])))
        expected = shares(targets, labels)
        torch.testing.assert_close(expected, torch.full_like(expected, float(share[0])))


def test_with_both_every_batch_takes_one_of_them():
    data = dataset({"mixup": 1.0, "cutmix": 1.0}, noise(15))
    plain = data.images.float()
    kinds = set()
    for seed in range(20):
        images, targets = batch_of(data, seed=seed)
        torch.testing.assert_close(targets.sum(1), torch.ones(15))
        kinds.add(bool(((images == plain) | (images == plain.roll(1, 0))).all()))
    assert kinds == {True, False}


def test_only_batches_of_a_training_are_mixed():
    data = dataset({"mixup": 1.0}, noise(15))
    assert data[3][1] == 3
    assert torch.equal(data[3][0], data.images[3].float())
    images, labels = next(iter(wk.make_loader(data, 15, train=False)))
    assert torch.equal(images, data.images.float())
    assert labels.tolist() == data.labels.tolist()
    _, targets = next(iter(wk.make_loader(data, 5, train=True)))
    assert targets.shape == (5, CLASSES)


@pytest.mark.parametrize("augment", [True, {"resized_crop": 0.3, "color_jitter": 0.4, "auto_augment": "rand-m5"}])
def test_class_labels_stay(augment):
    data = wk.load_data("digits", limit=40, augment=augment)
    _, labels = next(iter(wk.make_loader(data.train, 40, train=True)))
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == sorted(data.train.labels.tolist())


def test_loss_and_accuracy_of_class_probabilities():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]])
    log = logits.log_softmax(1)
    expected = -(0.7 * log[0, 0] + 0.3 * log[0, 1] + 0.2 * log[1, 1] + 0.8 * log[1, 2]) / 2
    torch.testing.assert_close(cross_entropy()(logits, targets), expected)
    assert count_correct(logits, targets, cross_entropy()) == 1
    assert count_correct(logits, targets, nn.BCEWithLogitsLoss()) is None  # several labels are no classes
    data = wk.load_data("digits", limit=60, augment={"mixup": 0.2, "cutmix": 1.0})
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    loader = wk.make_loader(data.train, 20, train=True)
    result = wk.train(net, loader, 2, label_smoothing=0.1, device="cpu", progress=False)
    assert np.isfinite([result.loss, result.accuracy]).all()
    assert 0 <= result.accuracy <= 1


# --- random numbers ---------------------------------------------------------------------------------------------------

EVERYTHING = {
    "crop": 2,
    "flip": True,
    "color_jitter": 0.2,
    "auto_augment": "rand-m9-mstd0.5",
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 0.4,
}


def test_torch_s_seed_alone_repeats_everything():
    data = dataset(EVERYTHING, noise(12))
    first = batch_of(data, seed=5)
    random.seed(1)
    np.random.seed(1)
    again, other = batch_of(data, seed=5), batch_of(data, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    before = random.getstate(), np.random.get_state()[1].tolist()
    batch_of(data, seed=5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_worker_processes_repeat_and_differ():
    same = noise(1).expand(8, -1, -1, -1)
    data = dataset({"auto_augment": "rand-m9-n2-p1-mstd1", "crop": 2}, same)

    def epoch():
        loader = wk.make_loader(data, 4, train=True, workers=2)
        loader.generator.manual_seed(7)
        return [images for images, _ in loader]

    one, two = epoch()
    assert not torch.equal(one, two)  # each batch came from another process
    assert all(torch.equal(a, b) for a, b in zip((one, two), epoch(), strict=True))


def test_another_augmentation_shares_the_images():
    data = wk.load_data("digits", limit=40, image_size=16)
    other = data.train.augmented(checked(Augmentation, {"crop": 2}))
    assert other.images is data.train.images
    assert not torch.equal(served(other)[0], served(data.train)[0])
    assert torch.equal(served(data.train)[0], served(other.augmented(Augmentation()))[0])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"crops": 4}, "unknown setting 'crops': did you mean crop?"),
        ({"crop": -1}, "crop must be at least 0, not -1."),
        ({"crop": 2.5}, "crop=2.5 is neither a whole number of pixels nor a share below 1."),
        ({"crop": 4, "resized_crop": 0.1}, "crop=4 and resized_crop=0.1 cut the same image twice"),
        ({"crop": 8}, "crop=8.0 is too wide a border for images of 8x8."),
        ({"resized_crop": 0}, "resized_crop must be greater than 0, not 0."),
        ({"resized_crop": 1.5}, "resized_crop must be at most 1, not 1.5."),
        ({"auto_augment": "randaug"}, "auto_augment 'randaug' is no policy of timm"),
        ({"auto_augment": "rand-m9-strong"}, "('strong' has no value); write it like 'rand-m9-mstd0.5-inc1'."),
        ({"auto_augment": "rand-q9"}, "(Unknown RandAugment config section)"),
        ({"random_erasing": 2}, "random_erasing must be at most 1, not 2."),
        ({"mixup": "much"}, "mixup must be a number, not 'much'."),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_one_line(augment, message):
    with pytest.raises(OptionError) as refused:
        wk.load_data("digits", augment=augment)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match="auto_augment needs grey or RGB images, these have 4 channels"):
        dataset({"auto_augment": "original"}, noise(channels=4))
    with pytest.raises(OptionError, match="mixup needs at least 2 classes, these images have 1"):
        Preparation((8, 8), 1, (0.0,), (1.0,), checked(Augmentation, {"mixup": 1}), True, 1)
