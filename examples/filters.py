"""Draw what a filter does: a digit through four 3x3 filters, each followed by ReLU and max pooling.

    python examples/filters.py                  the digit of the documentation's picture
    python examples/filters.py --index 7        another one of the bundled test digits

The pictures that a CNN's first layer hands to its second look like these, only that it finds its filters by itself.
"""

import argparse
from pathlib import Path

import torch
from digits import load
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import cnnops.functional as F

FILTERS = {
    "outline": [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]],
    "emboss": [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]],
    "blur": [[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]],
    "diagonal": [[2, -1, -1], [-1, 2, -1], [-1, -1, 2]],  # ink along the diagonal, none beside it
}
WHAT = {
    "outline": "nothing where all is\nalike, much at an edge",
    "emboss": "light that falls in\nfrom one corner",
    "blur": "the mean of the\nneighbourhood",
    "diagonal": "strokes that go\ndown to the right",
}


def apply(image: Tensor, weights: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of a CNN, step by step: convolution, ReLU, max pooling."""
    convolved = F.conv2d(image[None, None], torch.tensor(weights)[None, None].float(), padding=1)
    activated = F.relu(convolved)
    pooled = F.max_pool2d(activated, 2)
    return convolved[0, 0], activated[0, 0], pooled[0, 0]


def show(ax: Axes, values: Tensor, limit: float) -> None:
    """Red is above zero, blue below, white is zero."""
    ax.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[])


def draw(image: Tensor) -> Figure:
    """A row for each filter; the digit stands at the left."""
    figure = Figure(figsize=(12, 10.6), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.suptitle("What a filter does", fontsize=16, fontweight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 3.6])

    digit = left.subplots()
    digit.imshow(image.numpy(), cmap="gray_r")
    digit.set(xticks=[], yticks=[])
    digit.set_title("the digit, 28×28", fontsize=13)

    axes = right.subplots(len(FILTERS), 4, width_ratios=[0.75, 1, 1, 1])
    for row, (name, weights) in zip(axes, FILTERS.items(), strict=True):
        kernel = torch.tensor(weights)
        show(row[0], kernel, 1.6 * kernel.abs().max().item())  # pale, so that the numbers can be read
        for (y, x), weight in zip(torch.ones(3, 3).nonzero().tolist(), kernel.flatten().tolist(), strict=True):
            row[0].text(x, y, f"{weight:.4g}".replace("-", "−"), ha="center", va="center", fontsize=9.5)
        row[0].set_title(name, fontsize=13, fontweight="bold")
        row[0].set_xlabel(WHAT[name], fontsize=10)

        steps = apply(image, weights)
        for ax, values in zip(row[1:], steps, strict=True):
            show(ax, values, steps[0].abs().max().item())
    for ax, title in zip(axes[0, 1:], ["convolved, 28×28", "after ReLU: no blue", "max pooled, 14×14"], strict=True):
        ax.set_title(title, fontsize=13)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what a filter does.")
    parser.add_argument(
        "--index", type=int, default=35, help="which of the bundled test digits, 0 to 1999 (%(default)s)"
    )
    parser.add_argument(
        "--picture", default="runs/filters.png", metavar="FILE", help="where the picture goes (%(default)s)"
    )
    options = parser.parse_args(arguments)

    _, test = load()
    image = test.images[options.index, 0]
    paper, ink = image.min(), image.max()
    Path(options.picture).parent.mkdir(parents=True, exist_ok=True)
    draw((image - paper) / (ink - paper)).savefig(options.picture)  # paper is 0, ink is 1
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
