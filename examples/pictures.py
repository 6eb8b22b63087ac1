"""The picture of a training run: its curves, the first layer's filters, and digits with what the network reads."""

from pathlib import Path

import numpy as np
import torch
from digits import Digits
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter
from torch import nn

RIGHT, WRONG = "#2e7d32", "#c62828"
# The twin is drawn broad and pale, below; where the two agree, ours runs along the middle of it.
STYLES = {
    "cnnops": dict(color="#0d47a1", linewidth=1.4, zorder=3),
    "torch.nn": dict(color="#ffb74d", linewidth=5, zorder=2),
}
PER_ROW = 16


def draw_run(path: str, model_name: str, history: dict, model: nn.Module, test: Digits, classes: list[str]) -> None:
    """Draw everything into one PNG, 1200 pixels wide."""
    figure = Figure(figsize=(12, 7.6), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    curves, filters, digits = figure.subfigures(3, 1, height_ratios=[3.9, 1.2, 2.2])
    draw_curves(curves, model_name, history)
    draw_filters(filters, model)
    draw_digits(digits, model, test, classes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def loss_difference(history: dict) -> np.ndarray:
    """How far apart the losses of the two networks are, step by step."""
    ours, twins = (np.array(of["loss"]) for of in history.values())
    return np.abs(ours - twins)


def smooth(values: list[float], window: int = 25) -> np.ndarray:
    """The mean of the last `window` values: the loss of single batches jumps about."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(figure: SubFigure, model_name: str, history: dict) -> None:
    twins = len(history) > 1
    axes = figure.subplots(1, 3 if twins else 2)
    figure.suptitle(f"The “{model_name}” network learns", fontsize=15, fontweight="bold")

    for name, of in history.items():
        axes[0].plot(np.arange(1, len(of["loss"]) + 1), smooth(of["loss"]), label=name, **STYLES[name])
        epochs = np.arange(1, len(of["accuracy"]) + 1)
        axes[1].plot(epochs, 100 * np.array(of["accuracy"]), label=name, marker="o", **STYLES[name])
    axes[0].set(title="training loss (mean of 25 steps)", xlabel="step", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")  # 0.1, not a power of ten
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set(title="test accuracy", xlabel="epoch", ylabel="%", xticks=epochs)
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False, loc="lower right")

    if twins:
        difference = np.maximum(loss_difference(history), 1e-9)  # 0 has no place on a logarithmic axis
        axes[2].plot(np.arange(1, len(difference) + 1), difference, color="#6a1b9a", linewidth=0.8)
        axes[2].set(title="difference of the two losses", xlabel="step", yscale="log")
    for ax in axes:
        ax.grid(color="#e0e0e0", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)


def draw_filters(figure: SubFigure, model: nn.Module) -> None:
    """The weights of the first layer as images: red adds, blue subtracts."""
    layer = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    weights = layer.weight.detach().cpu().numpy()
    weights = weights[:, 0] if weights.ndim == 4 else weights.reshape(-1, 28, 28)
    shown, size = weights[:PER_ROW], "×".join(map(str, weights.shape[1:]))
    count = f"{len(weights)}" if len(shown) == len(weights) else f"{len(shown)} of the {len(weights)}"
    figure.suptitle(f"{count} filters of the first layer, {size}, as cnnops learnt them", fontsize=12)
    for ax, weight in zip(figure.subplots(1, PER_ROW), shown, strict=False):
        limit = np.abs(weight).max()
        ax.imshow(weight, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(xticks=[], yticks=[])


@torch.no_grad()
def draw_digits(figure: SubFigure, model: nn.Module, test: Digits, classes: list[str]) -> None:
    """A row of test digits as they come, and a row of mistakes."""
    model.eval()
    read = torch.cat([model(images).argmax(1) for images, _ in test.batches(500)])
    mistakes = (read != test.labels).nonzero().flatten()
    rows = torch.arange(min(PER_ROW, len(test))), mistakes[:PER_ROW]

    few = "some of them below" if len(mistakes) > PER_ROW else "shown below"
    figure.suptitle(
        f"Test images and what cnnops reads in them: {len(mistakes):,} of {len(test):,} wrong, {few}", fontsize=12
    )
    for axes, chosen in zip(figure.subplots(2, PER_ROW), rows, strict=True):
        for ax in axes:
            ax.set_axis_off()
        for ax, index in zip(axes, chosen.tolist(), strict=False):
            draw_digit(ax, test.images[index, 0].cpu().numpy(), classes[test.labels[index]], classes[read[index]])


def draw_digit(ax: Axes, image: np.ndarray, truth: str, read: str) -> None:
    right = truth == read
    ax.set_axis_on()
    ax.imshow(image, cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=RIGHT if right else WRONG, linewidth=1 if right else 2.5)
    short = len(truth) == len(read) == 1  # a digit, not "T-shirt"
    arrow = " → " if short else "\n→ "
    title = read if right else truth + arrow + read
    ax.set_title(title, color=RIGHT if right else WRONG, fontsize=11 if short else 8)
