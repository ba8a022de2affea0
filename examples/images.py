"""Labelled images for training, from folders or shards, decoded by background threads.

Folders contain `root/class_name/*.jpg` (or .png, ...); classes are numbered in alphabetical order. Shards are pairs of
memory-mapped files `images_000.npy`, u8[N, H, W, 3], and `labels_000.npy`, integers [N].

A source returns images by index, and a loader makes batches. The image in row `i` of epoch `e`, and its random crop,
depend only on the seed, `e` and `i`, so a run can stop at any step and resume with the same batches. If grain is
installed, its threads read the images; otherwise this file starts threads. The batches are the same.
"""

import collections
import dataclasses
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
PADDING = -1  # the label of the rows that pad the last batch
FAKE_CLASSES = 4
HAS_GRAIN = importlib.util.find_spec("grain") is not None

Batch = dict[str, np.ndarray]  # "image": u8[N, S, S, 3], "label": i32[N]
Crop = Callable[[Image.Image, int, np.random.Generator], Image.Image]


class Source(Protocol):
    """Images by index, each with a label in 0..classes-1."""

    labels: np.ndarray  # i32[N]
    classes: int

    def name(self, index: int) -> str:
        """The location of the image, for error messages."""

    def image(self, index: int) -> Image.Image:
        """The image; it may be decoded lazily."""


class Folder:
    """A folder that contains one folder of images per class."""

    def __init__(self, root: Path, class_names: Sequence[str] | None = None):
        """Lists the images; `class_names` sets the order of the classes, which is alphabetical by default."""
        found = {d.name: sorted(f for f in os.listdir(d) if Path(f).suffix.lower() in SUFFIXES) for d in folders(root)}
        self.class_names = list(found if class_names is None else class_names)
        unknown = found.keys() - set(self.class_names)
        if unknown:
            raise ValueError(f"{root} has classes that are missing in train: {', '.join(sorted(unknown)[:5])}")
        number = {name: i for i, name in enumerate(self.class_names)}
        self.root, self.classes = root, len(number)
        self._files = [os.path.join(name, file) for name, files in found.items() for file in files]
        self.labels = np.array([number[name] for name, files in found.items() for _ in files], np.int32)
        if not self._files:
            raise ValueError(f"{root} contains neither class_name/*.jpg (or {', '.join(SUFFIXES)}) nor images_*.npy")

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])

    def image(self, index: int) -> Image.Image:
        return Image.open(self.name(index))


class Shards:
    """A folder with pairs of files `images_*.npy` and `labels_*.npy`."""

    def __init__(self, root: Path):
        """Maps the files into memory and checks that images and labels match."""
        self._paths = sorted(root.glob("images_*.npy"))
        self._images = [np.load(path, mmap_mode="r") for path in self._paths]
        labels = [np.load(path.with_name(path.name.replace("images", "labels", 1))) for path in self._paths]
        for path, x, y in zip(self._paths, self._images, labels, strict=True):
            if x.ndim != 4 or x.shape[3] != 3 or x.dtype != np.uint8:
                raise ValueError(f"{path} must contain u8[N, H, W, 3], got {x.dtype}{list(x.shape)}")
            if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or (y < 0).any():
                raise ValueError(f"{path} has {len(x)} images; the labels must be {len(x)} integers, 0 or more")
        self.labels = np.concatenate(labels).astype(np.int32)
        if not self.labels.size:
            raise ValueError(f"The files {root}/images_*.npy contain no images")
        self.classes = int(self.labels.max()) + 1
        self._ends = np.cumsum([len(y) for y in labels])

    def name(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{self._paths[shard]}[{row}]"

    def image(self, index: int) -> Image.Image:
        shard, row = self._find(index)
        return Image.fromarray(self._images[shard][row])

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def folders(root: Path) -> list[Path]:
    """The subfolders in alphabetical order."""
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def open_images(root: Path) -> tuple[Source, Source]:
    """Opens `root/train` and `root/val`; each contains class folders or shards.

    Raises:
        ValueError: If one of them is missing, empty or malformed, or if their classes differ.
    """
    sources: list[Source] = []
    for part in (root / "train", root / "val"):
        if not part.is_dir():
            raise ValueError(f"The folder {part} does not exist")
        like = sources[0].class_names if sources and isinstance(sources[0], Folder) else None
        sources.append(Shards(part) if any(part.glob("images_*.npy")) else Folder(part, like))
    train, held_out = sources
    if held_out.labels.max() >= train.classes:
        raise ValueError(f"{root}/val has a label {held_out.labels.max()}; {root}/train has {train.classes} classes")
    return train, held_out


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random crop with 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, mirrored with probability 1/2."""
    width = height = min(image.size)  # used if no draw fits, which happens with very elongated images
    for _ in range(10):
        side = math.sqrt(image.width * image.height * rng.uniform(0.08, 1))
        stretch = math.sqrt(math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
        w, h = round(side * stretch), round(side / stretch)
        if 0 < w <= image.width and 0 < h <= image.height:
            width, height = w, h
            break
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def centre_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """The centre crop, after the shorter side is resized to 8/7 of `size` (256 for 224). It ignores `rng`."""
    side = min(image.size) * 7 / 8
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of a source: shuffled full batches for training; in order, with a padded last batch, for evaluation.

    Attributes:
        source: The images.
        batch_size: Number of images in each batch.
        image_size: Height and width of the crops.
        crop: `random_crop` or `centre_crop`.
        shuffle: Whether to shuffle each epoch and drop its incomplete last batch.
        seed: Seed of orders and crops.
        workers: Number of threads.
        ahead: Number of batches to prefetch, 1 or more.
    """

    source: Source
    batch_size: int
    image_size: int
    crop: Crop
    shuffle: bool
    seed: tuple[int, ...] = (0,)
    workers: int = 8
    ahead: int = 2

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        images = len(self.source.labels)
        return images // self.batch_size if self.shuffle else -(-images // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yields the batches `start`, `start + 1`, ..., `stop - 1` of an epoch."""
        order = self.order(epoch)
        rows = range(len(order))[start * self.batch_size : None if stop is None else stop * self.batch_size]

        def read(row: int) -> Batch:
            return self.read(int(order[row]), np.random.default_rng([*self.seed, epoch, row]))

        return (by_grain if HAS_GRAIN else by_threads)(read, rows, self)

    def order(self, epoch: int) -> np.ndarray:
        """The image index of each row of an epoch; `PADDING` in the padded rows of the last batch."""
        images, rows = len(self.source.labels), len(self) * self.batch_size
        if self.shuffle:
            # The order depends only on seed and epoch, so a resumed run continues with the same batches.
            return np.random.default_rng([*self.seed, epoch]).permutation(images)[:rows]
        return np.pad(np.arange(images), (0, rows - images), constant_values=PADDING)

    def read(self, index: int, rng: np.random.Generator) -> Batch:
        """One cropped image and its label.

        Raises:
            ValueError: If the image cannot be read; the message contains its location.
        """
        if index == PADDING:
            # Padding keeps the last batch in the shape of the others, so evaluation compiles once.
            black = np.zeros((self.image_size, self.image_size, 3), np.uint8)
            return {"image": black, "label": np.array(PADDING, np.int32)}
        try:
            with self.source.image(index) as image:
                cut = self.crop(image.convert("RGB"), self.image_size, rng)
        except Exception as error:
            raise ValueError(f"The image {self.source.name(index)} cannot be read: {error}") from error
        return {"image": np.asarray(cut), "label": self.source.labels[index]}


def by_threads(read: Callable[[int], Batch], rows: range, loader: Loader) -> Iterator[Batch]:
    """Yields the batches in order; an error in a thread is raised in place of its batch."""
    pool = ThreadPoolExecutor(loader.workers, "images")
    batches = iter([rows[i : i + loader.batch_size] for i in range(0, len(rows), loader.batch_size)])
    started = ([pool.submit(read, row) for row in batch] for batch in batches)
    # Generators submit lazily: only `ahead` batches are in memory at any time.
    under_way = collections.deque(itertools.islice(started, loader.ahead))
    try:
        while under_way:
            under_way.extend(itertools.islice(started, 1))
            examples = [future.result() for future in under_way.popleft()]
            yield {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    finally:
        pool.shutdown(cancel_futures=True)


def by_grain(read: Callable[[int], Batch], rows: range, loader: Loader) -> Iterator[Batch]:
    """Yields the same batches, read by the threads of grain."""
    import grain

    options = grain.ReadOptions(num_threads=loader.workers, prefetch_buffer_size=loader.ahead * loader.batch_size)
    batches = iter(grain.MapDataset.source(rows).map(read).to_iter_dataset(options).batch(loader.batch_size))
    try:
        yield from batches
    finally:
        batches.close()


def make_images(root: Path, count: int, size: int, seed: int = 0) -> None:
    """Writes `root/train`, class folders with `count` images, and `root/val`, shards with a quarter as many.

    There are `FAKE_CLASSES` classes. The colour of an image depends on its class, with some noise.
    """
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 128, (FAKE_CLASSES, 3))

    def image(label: int, height: int, width: int) -> np.ndarray:
        return np.asarray(colours[label] + rng.integers(0, 128, (height, width, 3)), np.uint8)

    for i in range(count):
        folder = root / "train" / f"class_{i % FAKE_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(size, 2 * size, 2).tolist()
        Image.fromarray(image(i % FAKE_CLASSES, height, width)).save(folder / f"{i:06}.png", compress_level=1)
    (root / "val").mkdir()
    labels = (np.arange(max(count // 4, 1)) % FAKE_CLASSES).tolist()
    np.save(root / "val" / "images_000.npy", np.stack([image(label, size, size) for label in labels]))
    np.save(root / "val" / "labels_000.npy", labels)
