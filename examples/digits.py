"""The digits as tensors: read once, normalised once, kept in memory."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BUNDLE = Path(__file__).parent / "data" / "mnist"
FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}  # as torchvision calls them
CLASSES = {
    "mnist": list("0123456789"),
    "fashion": ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
}


@dataclass
class Digits:
    """Images (N x 1 x 28 x 28, mean 0 and deviation 1 over the training set) and their labels (N)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All of them in order, for testing."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))

    def shuffled_batches(self, size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for training, epoch after epoch without end, beginning with batch number `start`.

        The order within an epoch depends on nothing but (seed, epoch): a resumed run sees what it would have seen.
        """
        steps = -(-len(self) // size)  # rounded up
        epoch, done = divmod(start, steps)
        while True:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 10_000 + epoch))
            for chosen in order.to(self.labels.device).split(size)[done:]:
                yield self.images[chosen], self.labels[chosen]
            epoch, done = epoch + 1, 0


def load(
    root: Path | str = BUNDLE,
    dataset: str = "mnist",
    download: bool = False,
    limit: int | None = None,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Digits, Digits]:
    """The training and the test digits. `root` is laid out by torchvision, or holds the four files itself."""
    root = Path(root)
    if download:
        from torchvision import datasets  # only needed here

        getattr(datasets, FOLDERS[dataset])(root, download=True)
    raw = root / FOLDERS[dataset] / "raw"
    folder = raw if raw.is_dir() else root

    train_images = read_idx(folder / "train-images-idx3-ubyte")[:limit] / 255
    train_labels = read_idx(folder / "train-labels-idx1-ubyte")[:limit]
    test_images = read_idx(folder / "t10k-images-idx3-ubyte") / 255
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte")

    mean, deviation = train_images.mean(), train_images.std()

    def digits(images: Tensor, labels: Tensor) -> Digits:
        images = ((images - mean) / deviation).unsqueeze(1)
        return Digits(images.to(device).contiguous(memory_format=memory_format), labels.long().to(device))

    return digits(train_images, train_labels), digits(test_images, test_labels)


def read_idx(file: Path) -> Tensor:
    """An IDX file, or its .gz: a magic number that ends in the number of dimensions, the sizes, then the bytes."""
    packed = file.with_name(file.name + ".gz")
    if file.exists():
        data = file.read_bytes()
    elif packed.exists():
        data = gzip.decompress(packed.read_bytes())
    else:
        raise FileNotFoundError(f"neither {file.name} nor {packed.name} is in {file.parent}")
    dimensions = data[3]
    sizes = [int.from_bytes(data[4 * i + 4 : 4 * i + 8], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 * dimensions + 4).view(sizes)
