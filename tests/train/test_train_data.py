import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from widthkit.errors import DataError, OptionError
from widthkit.train import load_data, make_loader
from widthkit.train.augment import Augmentation
from widthkit.train.datasets import ArrayDataset, Preparation
from widthkit.train.images import crop_and_flip, resize, to_grey
from widthkit.train.split import stratified_order

DATA = Path(os.environ.get("WIDTHKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def everything(dataset):
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def write_npz(path, n=60, shape=(8, 8, 3), classes=3, **other):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        "train_labels": np.arange(n) % classes,
        "test_images": rng.integers(0, 256, (12, *shape), dtype=np.uint8),
        "test_labels": np.arange(12) % classes,
    }
    arrays.update(other)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


def test_a_stratified_order_keeps_every_prefix_in_proportion():
    rng = np.random.default_rng(3)
    labels = rng.choice(4, size=500, p=[0.6, 0.3, 0.09, 0.01])
    order = stratified_order(labels, 7)
    assert sorted(order.tolist()) == list(range(500))
    share = np.bincount(labels, minlength=4) / 500
    for k in range(1, 501):
        # Each class is off by less than one sample plus the rounding of the others.
        assert np.all(np.abs(np.bincount(labels[order[:k]], minlength=4) - k * share) < 2)
    assert not np.array_equal(order, stratified_order(labels, 8))
    assert np.array_equal(order, stratified_order(labels, 7))


def test_digits_are_divided_without_overlap_and_loss():
    data = load_data("digits", in_channels=1, seed=1)
    truth = load_digits()
    parts = [everything(part) for part in (data.train, data.valid, data.test)]
    mean = np.round(truth.images * 255 / 16)
    pooled = torch.cat([part[0] for part in parts]).flatten(1).double()
    # Undo the normalisation through its two unknowns: the images must be the stored ones, each exactly once.
    low, high = pooled.min(), pooled.max()
    restored = ((pooled - low) / (high - low) * 255).round().numpy()
    rows = {tuple(row) for row in restored.astype(int).tolist()}
    assert rows == {tuple(row) for row in mean.reshape(len(mean), -1).astype(int).tolist()}
    assert sum(len(part[1]) for part in parts) == 1797
    # Normalised by the training split.
    assert abs(parts[0][0].mean()) < 1e-4
    assert abs(parts[0][0].std() - 1) < 1e-3
    assert (data.channels, data.native_size, data.class_names[3]) == (1, (8, 8), "3")


def test_the_seed_changes_the_validation_split_but_not_the_test_split():
    a, b = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(a.test.labels, b.test.labels)
    assert torch.equal(a.test.images, b.test.images)
    assert not torch.equal(a.valid.images, b.valid.images)


def test_a_limit_is_a_stratified_prefix_and_keeps_the_normalisation():
    whole, few = load_data("digits"), load_data("digits", limit=30)
    for name in ("train", "valid", "test"):
        full, part = getattr(whole, name), getattr(few, name)
        assert len(part) == 30
        assert np.bincount(part.labels.numpy()).tolist() == [3] * 10
        assert torch.equal(part[29][0], full[29][0])


def test_grey_meets_colour_stems_and_colour_meets_grey_ones(tmp_path):
    grey = load_data("digits", image_size=12)
    image, label = grey.train[0]
    assert image.shape == (3, 12, 12)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    write_npz(tmp_path / "a.npz")
    assert load_data(f"npz:{tmp_path}/a.npz", in_channels=1).train[0][0].shape == (1, 8, 8)
    with pytest.raises(DataError, match="images have 3 channels, the model takes 4"):
        load_data(f"npz:{tmp_path}/a.npz", in_channels=4)


def test_luminance_is_pillow_s():
    images = torch.randint(0, 256, (5, 3, 7, 6), dtype=torch.uint8)
    truth = [np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).convert("L")) for x in images]
    assert np.array_equal(to_grey(images)[:, 0].numpy(), np.stack(truth))


def test_resizing_is_the_antialiased_filter():
    images = torch.randint(0, 256, (3, 2, 16, 16), dtype=torch.uint8)
    truth = torch.nn.functional.interpolate(images.double(), (5, 7), mode="bilinear", antialias=True)
    # Fixed-point arithmetic and rounding to whole grey levels.
    assert (resize(images, (5, 7)).double() - truth).abs().max() <= 1.0


def test_large_sets_are_resized_batch_by_batch_with_the_same_result():
    images, labels = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8), torch.arange(9)
    preparation = Preparation((20, 20), 1, (100.0,), (50.0,), Augmentation(), flip=False)
    now, later = (ArrayDataset(images, labels, preparation, most_bytes=most) for most in (9 * 20 * 20, 9 * 20 * 20 - 1))
    assert (now.images.shape[-1], later.images.shape[-1]) == (20, 8)
    assert torch.equal(everything(now)[0], everything(later)[0])


def test_normalisation_is_per_channel(tmp_path):
    arrays = write_npz(tmp_path / "a.npz", n=40)
    arrays["train_images"][..., 2] //= 10
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_data(f"npz:{tmp_path}/a.npz")
    images = everything(data.train)[0].double()
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_batches_are_the_items():
    data = load_data("digits", limit=50)
    loader = make_loader(data.valid, 20, train=False)
    plain = torch.utils.data.DataLoader(data.valid, 20)
    for (images, labels), (plain_images, plain_labels) in zip(loader, plain, strict=True):
        assert torch.equal(images, plain_images)
        assert torch.equal(labels, plain_labels)
        assert labels.dtype == torch.int64
    assert torch.equal(torch.cat([x for x, _ in loader]), everything(data.valid)[0])
    subset = torch.utils.data.Subset(data.valid, [5, 3])
    assert next(iter(make_loader(subset, 2, train=False)))[1].tolist() == [data.valid[5][1], data.valid[3][1]]


def test_a_training_loader_shuffles_by_its_seed_and_drops_the_rest():
    data = load_data("digits", limit=50)
    orders = [torch.cat([y for _, y in make_loader(data.train, 16, train=True, seed=s)]).tolist() for s in (0, 0, 1)]
    assert len(orders[0]) == 48
    assert orders[0] == orders[1] != orders[2]
    assert len(list(make_loader(data.train, 64, train=True))) == 1


def test_augmented_images_are_shifts_of_the_originals():
    torch.manual_seed(0)
    images = torch.arange(1, 2 * 64 + 1).view(1, 2, 8, 8).expand(200, -1, -1, -1)
    out = crop_and_flip(images, flip=True)
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    candidates = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    candidates += [c.flip(-1) for c in candidates]
    which = [next(i for i, c in enumerate(candidates) if torch.equal(c, image)) for image in out]
    assert len(set(which)) == 18
    assert torch.equal(crop_and_flip(images, flip=False)[0].flip(-1), out[0]) is False


def test_augmentation_touches_training_images_only_and_follows_the_global_seed():
    data = load_data("digits", augment=True, limit=40)
    assert not data.train.preparation.flip
    torch.manual_seed(3)
    first = data.train.__getitems__(range(40)).batch[0]
    torch.manual_seed(3)
    assert torch.equal(first, data.train.__getitems__(range(40)).batch[0])
    assert not torch.equal(first, data.train.__getitems__(range(40)).batch[0])
    assert torch.equal(everything(data.valid)[0], everything(load_data("digits", limit=40).valid)[0])


def test_npz_with_official_splits_and_names(tmp_path):
    extra = {
        "val_images": np.zeros((5, 8, 8, 3), np.uint8),
        "val_labels": np.array([[0], [1], [2], [0], [1]]),
        "class_names": np.array(["a", "b", "c"]),
    }
    write_npz(tmp_path / "a.npz", **extra)
    data = load_data(f"npz:{tmp_path}/a.npz")
    assert (len(data.train), len(data.valid), len(data.test)) == (60, 5, 12)
    assert data.class_names == ("a", "b", "c")


def test_npz_in_other_forms(tmp_path):
    images, labels = np.zeros((50, 9, 7), np.uint8), np.arange(50, dtype=np.uint8) % 5
    np.savez(tmp_path / "keras.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    data = load_data(f"npz:{tmp_path}/keras.npz")
    assert (len(data.train), len(data.valid), len(data.test), data.num_classes) == (40, 10, 10, 5)
    assert data.train[0][0].shape == (3, 9, 7)
    np.savez(tmp_path / "one.npz", images=images, labels=labels)
    data = load_data(f"npz:{tmp_path}/one.npz", image_size=4)
    assert (len(data.train), len(data.valid), len(data.test)) == (32, 8, 10)
    assert np.bincount(data.test.labels.numpy()).tolist() == [2] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "no train_labels"),
        ({"train_images": None}, "it needs train_images"),
        ({"train_labels": np.arange(59)}, "60 images but 59 labels"),
        ({"train_labels": np.zeros(60)}, "labels must be whole numbers"),
        ({"train_labels": np.full(60, -1)}, "labels go from -1"),
        ({"test_labels": np.full(12, 2**40)}, "labels go from"),
        ({"train_images": np.zeros((60, 8, 8, 3), np.float32)}, "images must be uint8"),
        ({"train_images": np.zeros((0, 8, 8, 3), np.uint8)}, "not empty"),
        ({"train_images": np.zeros((60, 64), np.uint8)}, "images must be uint8"),
        ({"test_images": np.zeros((12, 8, 8, 2), np.uint8)}, "images have 2 channels"),
        ({"class_names": np.array(["a"])}, "class_names must be 3 names"),
        ({"train_images": np.zeros((4, 8, 8), np.uint8), "train_labels": np.zeros(4, int)}, "too few to hold some out"),
        ({"train_labels": np.array([{}] * 60, dtype=object)}, "not a readable npz"),
    ],
)
def test_wrong_npz_files_are_refused_in_one_line(tmp_path, change, message):
    write_npz(tmp_path / "a.npz", **change)
    with pytest.raises(DataError, match=message) as caught:
        load_data(f"npz:{tmp_path}/a.npz")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    write_npz(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[400:500] = bytes(100)
    (tmp_path / "flip.npz").write_bytes(damaged)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"images": 1}))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("cut.npz", "flip.npz", "pickle.npz", "one.npy", "empty.npz"):
        with pytest.raises(DataError, match="not a readable npz") as caught:
            load_data(f"npz:{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="there is no file"):
        load_data(f"npz:{tmp_path}/none.npz")


def write_folder(path, count=4, classes=("cat", "dog"), size=(20, 12), mode="RGB"):
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(count):
            colour = (index * 20, label * 200, 0) if mode == "RGB" else label * 200
            Image.new(mode, size, colour).save(path / name / f"{index}.png")


def test_folders_with_and_without_splits(tmp_path):
    write_folder(tmp_path / "a" / "train", 10)
    write_folder(tmp_path / "a" / "val", 3)
    data = load_data(f"folder:{tmp_path}/a")
    assert (len(data.train), len(data.valid), len(data.test)) == (16, 4, 6)
    assert (data.class_names, data.native_size, data.channels) == (("cat", "dog"), (12, 20), 3)
    image, label = data.test[0]
    assert image.shape == (3, 12, 12)
    expected = (label * 200 - 116.28) / 57.12
    assert torch.allclose(image[1], torch.full((12, 12), expected))
    write_folder(tmp_path / "a" / "test", 5)
    data = load_data(f"folder:{tmp_path}/a", image_size=6, limit=5)
    assert (len(data.train), len(data.valid), len(data.test)) == (5, 5, 5)
    write_folder(tmp_path / "b", 10, mode="L")
    data = load_data(f"folder:{tmp_path}/b", in_channels=1, augment=True)
    assert (len(data.train), len(data.valid), len(data.test), data.channels) == (13, 3, 4, 1)
    images, _ = next(iter(make_loader(data.train, 4, train=True, workers=1)))
    assert images.shape == (4, 1, 12, 12)


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        load_data(f"folder:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_data(f"folder:{tmp_path}/empty")
    (tmp_path / "empty" / "class").mkdir()
    with pytest.raises(DataError, match="no class folders") as caught:
        load_data(f"folder:{tmp_path}/empty")
    assert "\n" not in str(caught.value)
    write_folder(tmp_path / "a" / "train", 10)
    write_folder(tmp_path / "a" / "val", 3, classes=("cat", "emu"))
    with pytest.raises(DataError, match="training folder lacks: emu"):
        load_data(f"folder:{tmp_path}/a")
    (tmp_path / "a" / "train" / "cat" / "3.png").write_bytes(b"no image")
    data = load_data(f"folder:{tmp_path}/a/train")
    with pytest.raises(DataError, match=r"cannot read image .*3\.png"):
        [everything(part) for part in (data.train, data.valid, data.test)]


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def fashion(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    write_idx(raw / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (50, 28, 28), dtype=np.uint8))
    write_idx(raw / "train-labels-idx1-ubyte", (np.arange(50) % 10).astype(np.uint8))
    write_idx(raw / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (20, 28, 28), dtype=np.uint8))
    write_idx(raw / "t10k-labels-idx1-ubyte.gz", (np.arange(20) % 10).astype(np.uint8))
    return raw


@pytest.mark.parametrize("up", [0, 1, 2])
def test_fashion_mnist_is_found_packed_or_not(fashion, up):
    data = load_data("fashion-mnist", data_dir=[fashion, *fashion.parents][up], image_size=32)
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 10, 20)
    assert data.class_names[9] == "Ankle boot"
    assert data.train[0][0].shape == (3, 32, 32)


def test_damaged_fashion_mnist_is_refused(fashion):
    file = fashion / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for data in (
        whole[:-900],
        whole[:4],
        b"",
        b"x" * 50,
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b""),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError, match="is damaged") as caught:
            load_data("fashion-mnist", data_dir=fashion)
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        load_data("fashion-mnist", data_dir=fashion)


@pytest.mark.data
def test_the_real_fashion_mnist():
    if not (DATA / "fashion-mnist").is_dir():
        pytest.skip("needs the folder fashion-mnist in the folder that WIDTHKIT_DATA names")
    data = load_data("fashion-mnist", data_dir=DATA / "fashion-mnist", limit=100)
    assert (len(data.train), data.num_classes) == (100, 10)
    # Published statistics of the training images: mean 0.2860, deviation 0.3530.
    assert data.train.preparation.mean[0] / 255 == pytest.approx(0.2860, abs=2e-3)
    assert data.train.preparation.std[0] / 255 == pytest.approx(0.3530, abs=2e-3)


def test_cifar10_comes_from_torchvision_without_a_download(tmp_path, monkeypatch):
    class Fake:
        classes = [str(i) for i in range(10)]

        def __init__(self, root, train, download):
            assert download is False
            assert root == tmp_path
            self.data = np.zeros((100 if train else 20, 32, 32, 3), np.uint8)
            self.targets = [i % 10 for i in range(len(self.data))]

    with pytest.raises(DataError, match="no intact cifar-10-batches-py") as caught:
        load_data("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_data("cifar10", data_dir=str(tmp_path))
    assert (len(data.train), len(data.valid), len(data.test)) == (80, 20, 20)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digitz", {}, "did you mean digits"),
        ("imagenet", {}, "known: cifar10, digits"),
        ("folder:", {}, "names no path"),
        ("cifar10", {}, "needs data_dir"),
        ("fashion-mnist", {"data_dir": "/nowhere"}, "no folder /nowhere"),
        ("digits", {"image_size": 0}, "image_size must be"),
        ("digits", {"limit": 0}, "limit must be"),
        ("digits", {"seed": -1}, "seed must be"),
        ("digits", {"in_channels": 0}, "the model takes 0"),
        ("digits", {"in_channels": 2}, "the model takes 2"),
    ],
)
def test_wrong_requests_are_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        load_data(name, **options)


def test_wrong_loaders_are_refused():
    with pytest.raises(OptionError, match="batch_size=0"):
        make_loader(load_data("digits", limit=3).train, 0, train=True)
    prep = load_data("digits", limit=3).train.preparation
    empty = ArrayDataset(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), prep)
    with pytest.raises(DataError, match="is empty"):
        make_loader(empty, 4, train=False)
