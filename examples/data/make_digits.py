"""Make the bundled digits from the four files of the real MNIST: 1,000 training and 200 test digits of each class.

    python examples/data/make_digits.py DIR     DIR holds train-images-idx3-ubyte.gz and its three companions

The choice has a fixed seed and the files carry no time: running it again changes nothing.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np

BUNDLE = Path(__file__).parent / "mnist" / "MNIST" / "raw"  # torchvision's layout
SEED = 0
PER_CLASS = {"train": 1000, "t10k": 200}
MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read(folder: Path, name: str) -> np.ndarray:
    """One of the four files as an array, packed or not, after a check that it is the real one."""
    packed = folder / f"{name}.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    if hashlib.md5(data).hexdigest() != MD5[name]:
        raise SystemExit(f"{name} is not the file of the real MNIST: its md5 should be {MD5[name]}")
    header = 16 if "images" in name else 8
    return np.frombuffer(data, np.uint8, offset=header).reshape((-1, 28, 28) if "images" in name else -1)


def write(name: str, array: np.ndarray) -> None:
    """IDX: two zeros, 8 for "unsigned bytes", the number of dimensions, each size as a big-endian int32, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    data = gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0)
    (BUNDLE / f"{name}.gz").write_bytes(data)
    print(f"{name}.gz: {array.shape[0]:,} digits, {len(data):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled digits from the real MNIST.")
    parser.add_argument("folder", type=Path, help="the folder with the four files of MNIST")
    folder = parser.parse_args().folder

    BUNDLE.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    for part, count in PER_CLASS.items():
        images, labels = read(folder, f"{part}-images-idx3-ubyte"), read(folder, f"{part}-labels-idx1-ubyte")
        chosen = [random.choice(np.flatnonzero(labels == digit), count, replace=False) for digit in range(10)]
        chosen = np.sort(np.concatenate(chosen))  # MNIST's own order, which mixes the classes
        write(f"{part}-images-idx3-ubyte", images[chosen])
        write(f"{part}-labels-idx1-ubyte", labels[chosen])


if __name__ == "__main__":
    main()
