"""Tests of examples/images.py: every image once, reproducible order, errors that name the file."""

import importlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
WAYS = ["threads", "grain"]


@pytest.fixture
def images(monkeypatch):
    """The module, imported from the folder of the examples."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("images")


@pytest.fixture
def pictures(rng):
    """Twenty different pictures and their labels, sorted by label."""
    return rng.integers(0, 256, (20, 20, 24, 3)).astype(np.uint8), np.repeat(np.arange(4), 5)


@pytest.fixture
def folder(tmp_path, pictures):
    """The pictures as files, one folder per class."""
    for i, (picture, label) in enumerate(zip(*pictures, strict=True)):
        place = tmp_path / "folder" / "train" / f"class_{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:02}.png")
    return tmp_path / "folder" / "train"


@pytest.fixture
def shards(tmp_path, pictures):
    """The same pictures as shards of 7, 7 and 6."""
    place = tmp_path / "shards" / "train"
    place.mkdir(parents=True)
    for shard, rows in enumerate(np.split(np.arange(20), [7, 14])):
        np.save(place / f"images_{shard:03}.npy", pictures[0][rows])
        np.save(place / f"labels_{shard:03}.npy", pictures[1][rows])
    return place


@pytest.fixture(params=WAYS)
def loader(request, images, folder, monkeypatch):
    """Makes loaders of batches of six, read by threads or, if installed, by grain."""
    if request.param == "grain":
        pytest.importorskip("grain")
    monkeypatch.setattr(images, "HAS_GRAIN", request.param == "grain")

    def loader(source=None, *, train=True, **options):
        crop = images.random_crop if train else images.centre_crop
        source = images.Folder(folder) if source is None else source
        return images.Loader(source, **{"batch_size": 6, "image_size": 16, "crop": crop, "shuffle": train} | options)

    return loader


class Numbered:
    """Images whose pixels are their index; records reads, and can fail."""

    classes = 1

    def __init__(self, count, *, broken=None):
        self.labels, self.broken, self.read = np.arange(count, dtype=np.int32), broken, []

    def name(self, index):
        return f"number {index}"

    def image(self, index):
        self.read.append(index)
        if index == self.broken:
            raise OSError("broken data stream")
        return Image.new("RGB", (8, 8), (index, index, index))


def same(these, those):
    """Whether two sequences of batches are bit-identical."""
    these, those = list(these), list(those)
    assert len(these) == len(those)
    return all(np.array_equal(a[name], b[name]) for a, b in zip(these, those, strict=True) for name in a)


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def test_an_epoch_of_evaluation_has_each_image_once_in_order_and_then_padding(loader):
    batches = list(loader(Numbered(20), train=False).batches())

    assert [len(batch["label"]) for batch in batches] == [6] * 4
    np.testing.assert_array_equal(labels(batches), [*range(20), -1, -1, -1, -1])
    content = np.concatenate([batch["image"] for batch in batches])
    assert content.shape == (24, 16, 16, 3) and content.dtype == np.uint8
    np.testing.assert_array_equal(content[:20], np.broadcast_to(np.arange(20)[:, None, None, None], (20, 16, 16, 3)))


def test_an_epoch_of_training_has_each_image_once_and_whole_batches(loader):
    one, two = (labels(loader(Numbered(18)).batches(epoch)) for epoch in range(2))

    assert sorted(one) == sorted(two) == list(range(18))
    assert not np.array_equal(one, two) and not np.array_equal(one, range(18))
    left_out = labels(loader(Numbered(20)).batches())
    assert len(left_out) == len(set(left_out)) == 18


def test_the_same_seed_and_epoch_give_the_same_batches(loader):
    batches = list(loader(seed=(3, 0)).batches(5))

    assert batches[0]["image"].dtype == np.uint8 and batches[0]["label"].dtype == np.int32
    assert same(batches, loader(seed=(3, 0), workers=1, ahead=1).batches(5))
    assert not same(batches, loader(seed=(3, 1)).batches(5))
    assert not same(batches, loader(seed=(3, 0)).batches(6))


def test_resuming_in_an_epoch_gives_the_batches_that_were_left(loader):
    whole = list(loader().batches(2))

    assert same(whole[2:], loader().batches(2, start=2))
    assert same(whole[1:2], loader().batches(2, start=1, stop=2))
    assert same([], loader().batches(2, start=3))


def test_each_row_of_each_epoch_is_cut_in_its_own_way(loader, rng):
    source, picture = Numbered(12), Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))
    source.image = lambda index: picture.copy()

    crops = [crop.tobytes() for epoch in range(2) for batch in loader(source).batches(epoch) for crop in batch["image"]]
    assert len(crops) == len(set(crops)) == 24


def test_folders_and_shards_of_the_same_pictures_give_the_same(images, loader, shards):
    for train in (True, False):
        assert same(loader(train=train).batches(), loader(images.Shards(shards), train=train).batches())


def test_threads_and_grain_give_the_same(images, loader, monkeypatch):
    pytest.importorskip("grain")
    batches = list(loader().batches())
    monkeypatch.setattr(images, "HAS_GRAIN", not images.HAS_GRAIN)

    assert same(batches, loader().batches())


def test_an_error_in_a_thread_names_the_file_and_comes_after_the_batches_before(loader, folder):
    broken = folder / "class_2" / "13.png"
    broken.write_bytes(broken.read_bytes()[:200])
    batches = loader(train=False).batches()

    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(ValueError, match=r"The image .*class_2.13\.png cannot be read"):
        next(batches)


def test_an_error_in_a_shard_names_file_and_row(images, shards):
    source = images.Shards(shards)

    assert source.name(0).endswith("images_000.npy[0]")
    assert source.name(13).endswith("images_001.npy[6]")
    assert source.name(14).endswith("images_002.npy[0]")


def test_reading_ahead_is_bounded(images, loader):
    source = Numbered(240)
    batches = loader(source, workers=2, ahead=3).batches()

    assert not source.read
    for taken in range(1, 5):
        next(batches)
        assert 6 * taken <= len(source.read) <= 6 * (taken + 3) + (2 if images.HAS_GRAIN else 0)
    threads = threading.active_count()
    batches.close()
    deadline = time.monotonic() + 100
    while threading.active_count() == threads and time.monotonic() < deadline:
        time.sleep(0.01)  # grain does not wait for its threads
    assert threading.active_count() < threads
    assert len(source.read) < 60


def test_random_crops_are_parts_of_the_image_in_both_directions(images, rng):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 2, (32, 64, 3))
    crops = [np.asarray(images.random_crop(Image.fromarray(ramp), 16, rng)).astype(int) for _ in range(200)]

    spans = [crop[0, -1, 0] - crop[0, 0, 0] for crop in crops]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert 70 < sum(span < 0 for span in spans) < 130  # mirrored
    assert min(map(abs, spans)) < 30 and max(map(abs, spans)) > 70
    long = images.random_crop(Image.new("RGB", (2, 900)), 16, rng)
    assert long.size == (16, 16)


def test_centre_crops_leave_an_eighth_out(images, rng):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))
    crop = np.asarray(images.centre_crop(Image.fromarray(ramp), 28, rng))

    np.testing.assert_array_equal(crop, np.broadcast_to(np.arange(18, 46)[None, :, None], (28, 28, 3)))


def test_grey_and_palette_images_have_three_channels(loader, folder):
    Image.new("L", (30, 20), 7).save(folder / "class_0" / "00.png")
    Image.new("P", (30, 20)).save(folder / "class_0" / "01.png")

    batch = next(loader(train=False).batches())
    assert batch["image"].shape == (6, 16, 16, 3)
    assert (batch["image"][0] == 7).all()


def test_made_images_have_both_forms(images, tmp_path):
    images.make_images(tmp_path, 12, 16)
    train, held_out = images.open_images(tmp_path)

    assert isinstance(train, images.Folder) and isinstance(held_out, images.Shards)
    assert train.classes == 4 and len(train.labels) == 12 and len(held_out.labels) == 3
    assert [train.class_names[label] in train.name(i) for i, label in enumerate(train.labels)] == [True] * 12


def save(root, part, images=None, labels=None):
    """Writes shards with one defect."""
    (root / part).mkdir(exist_ok=True)
    np.save(root / part / "images_0.npy", np.zeros((4, 8, 8, 3), np.uint8) if images is None else images)
    np.save(root / part / "labels_0.npy", np.arange(4) if labels is None else labels)


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("train", {"images": np.zeros((4, 8, 8, 3))}, r"must contain u8\[N, H, W, 3\], got float64\[4, 8, 8, 3\]"),
        ("train", {"images": np.zeros((4, 3, 8, 8), np.uint8)}, r"got uint8\[4, 3, 8, 8\]"),
        ("train", {"labels": np.arange(3)}, "has 4 images; the labels must be 4 integers"),
        ("train", {"labels": np.arange(4) / 2}, "must be 4 integers"),
        ("train", {"labels": np.arange(4) - 1}, "0 or more"),
        ("val", {"labels": np.arange(4) + 1}, "has a label 4; .*train has 4 classes"),
    ],
)
def test_malformed_shards_are_errors(images, tmp_path, part, wrong, message):
    save(tmp_path, "train")
    save(tmp_path, "val")
    save(tmp_path, part, **wrong)

    with pytest.raises(ValueError, match=message):
        images.open_images(tmp_path)


def test_malformed_folders_are_errors(images, folder):
    root = folder.parent
    with pytest.raises(ValueError, match="The folder .*val does not exist"):
        images.open_images(root)
    (root / "val").mkdir()
    with pytest.raises(ValueError, match=r"val contains neither class_name/\*.jpg .* nor images_\*.npy"):
        images.open_images(root)
    (root / "val" / "class_3").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val" / "class_3" / "x.JPEG")
    _, held_out = images.open_images(root)
    assert held_out.labels.tolist() == [3]  # as in training, though it is the only class here
    (root / "val" / "zebra").mkdir()
    with pytest.raises(ValueError, match="classes that are missing in train: zebra"):
        images.open_images(root)
