"""torchvision's classifiers, converted: torch's numbers, by none of torch's convolutions, poolings and rectifiers.

    python tests/torchvision_models.py                    # all of them, into docs/models.md
    python tests/torchvision_models.py --only resnet18    # some, onto the screen

A model runs twice on the same two random images, before and after cnnops.convert: forward, and backward from a random
linear function of its outputs (auxiliary classifiers included). The relative L2 error of an output or gradient is

    |ours - torch's| / (|torch's| + |the model's largest| / 1000)

since some gradients are zero but for rounding, as those of a bias before a normalization. Images are as small as the
architecture takes; where a layer normalizes by running statistics these are taken from the same images.
"""

import argparse
import gc
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import cnnops

NAMES = torchvision.models.list_models(module=torchvision.models)
SIZES = [32, 64, 96, 128, 224, 299]
# Of the errors above. A number that rounds to the other side of 0 before a ReLU, or of its neighbour in a window,
# switches a path of the gradient on or off: in float32 hardly one of a million, but that is 1e-3 of a gradient's norm.
OUTPUT_BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}
GRADIENT_BOUND = {torch.float32: 1e-2, torch.float64: 1e-9}
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


@dataclass
class Row:
    """What a run of a model came to."""

    model: str
    parameters: int
    size: int
    dtype: torch.dtype
    output_error: float
    gradient_error: float
    operators: list[str]  # of ours
    torchs: list[str]  # of torch's that should not have run
    left_alone: list[str]

    @property
    def passed(self) -> bool:
        return (
            self.output_error <= OUTPUT_BOUND[self.dtype]
            and self.gradient_error <= GRADIENT_BOUND[self.dtype]
            and not self.torchs
        )


def build(name: str, size: int) -> nn.Module:
    """The model with weights that keep signals alive, also where torchvision begins with zeros."""
    more = {}
    if name in ("googlenet", "inception_v3"):
        more["init_weights"] = False  # it takes a minute, and these are drawn anew
    if name.startswith("vit_"):
        more["image_size"] = size // 14 * 14 if name.endswith("14") else size
    model = torchvision.models.get_model(name, **more)
    with torch.no_grad():
        for module in model.modules():
            normalizes = "Norm" in type(module).__name__
            for parameter_name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    p.normal_(std=(2 / (p.numel() / len(p))) ** 0.5)
                else:
                    p.normal_(mean=float(normalizes and parameter_name == "weight"), std=0.1)
    return model


def settle(model: nn.Module, images: Tensor) -> None:
    """Training mode, for the auxiliary classifiers, but nothing random, and fixed statistics from these images."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth):
            module.eval()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.running_var += norm.running_var.mean()  # of two images some channel's is near zero
        norm.eval()


def prepared(name: str, dtype: torch.dtype, size: int | None) -> tuple[nn.Module, Tensor]:
    """The model and images of this size, or the smallest that it takes."""
    for attempt in [size] if size else SIZES:
        torch.manual_seed(2)
        model = build(name, attempt).to(dtype)
        images = torch.randn(2, 3, *[getattr(model, "image_size", attempt)] * 2, dtype=dtype)
        try:
            settle(model, images)
            return model, images
        except (RuntimeError, ValueError, AssertionError) as error:
            too_small = error
    raise too_small


def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    y = model(images)
    return list(y) if isinstance(y, tuple) else [y]


def backward(outputs: list[Tensor]) -> None:
    torch.manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])


class Asked(TorchFunctionMode):
    """Counts the means that a model takes itself; other ones are torch's way of pooling everything."""

    means = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.means += func in (torch.mean, Tensor.mean)
        return func(*args, **(kwargs or {}))


class Ran(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        return sorted({name.removeprefix("cnnops::") for name in self.names if name.startswith("cnnops::")})

    def torchs(self, asked: Asked) -> list[str]:
        """Those that we replace, under any of the names that torch has for them."""
        found = {n for n in self.names if n.startswith("aten::") and re.search("conv|pool|relu|threshold|hardtanh", n)}
        more_means = self.names.count("aten::mean") > asked.means
        return sorted(found) + ["aten::mean"] * more_means


def worst(errors: list[Tensor], norms: list[Tensor]) -> float:
    norms = torch.stack(norms)
    return (torch.stack(errors) / (norms + norms.max() / 1000)).max().item()  # torch's max keeps a NaN


def check(name: str, dtype: torch.dtype = torch.float32, size: int | None = None) -> Row:
    model, images = prepared(name, dtype, size)
    leaves = [images.requires_grad_(), *model.parameters()]
    with Asked() as asked:
        expected = outputs_of(model, images)
    backward(expected)
    expected = [y.detach() for y in expected]
    gradients = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}

    # Gradients are compared and dropped as they come: the largest models have 2.5 GB of them.
    norms, errors = [], []

    def compare(leaf):
        gradient = gradients.pop(leaf)
        norms.append(gradient.norm())
        errors.append(gradient.sub_(leaf.grad).norm())
        leaf.grad = None

    for leaf in leaves:
        leaf.grad = None
        leaf.register_post_accumulate_grad_hook(compare)
    cnnops.convert(model)
    with Ran() as ran:
        outputs = outputs_of(model, images)
        backward(outputs)
    assert not gradients  # all have been compared
    return Row(
        name,
        sum(p.numel() for p in model.parameters()),
        images.shape[-1],
        dtype,
        worst([(y - e).detach().norm() for y, e in zip(outputs, expected, strict=True)], [e.norm() for e in expected]),
        worst(errors, norms),
        ran.ours(),
        ran.torchs(asked),
        [f"{row.name} ({row.class_name}): {row.reason}" for row in cnnops.left_alone(model)],
    )


def markdown(rows: list[Row]) -> str:
    def line(*cells):
        return f"| {' | '.join(map(str, cells))} |"

    header = ["model", "parameters", "image", "outputs", "gradients", "our operators", "left alone"]
    table = [line(*header), line("---", *["---:"] * 4, "---", "---")]
    for row in rows:
        forward = [name for name in row.operators if not re.search("backward|grad|sum", name)]
        torchs = [f"**by torch: {', '.join(row.torchs)}**"] if row.torchs else []
        table.append(
            line(
                row.model,
                f"{row.parameters:,}",
                row.size,
                f"{row.output_error:.0e}",
                f"{row.gradient_error:.0e}",
                ", ".join(forward + torchs),
                "; ".join(row.left_alone) or "none",
            )
        )
    return "\n".join(table)


def page(rows: list[Row], dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"""# torchvision's models on cnnops

Written by `make models` with torch {torch.__version__} and torchvision {torchvision.__version__}: {len(rows)} models,
each before and after `cnnops.convert`, in {name}. *outputs* and *gradients* are the largest relative L2 errors (bounds:
{OUTPUT_BOUND[dtype]:.0e} and {GRADIENT_BOUND[dtype]:.0e}). No convolution, pooling or rectifier of torch's ran, forward
or backward. [tests/torchvision_models.py](../tests/torchvision_models.py) says how it is measured.

{markdown(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="MODEL", default=None)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    arguments = parser.parse_args()
    rows, failures, dtype = [], {}, getattr(torch, arguments.dtype)
    for name in (progress := tqdm(arguments.only or NAMES)):
        progress.set_description(name)
        try:
            rows.append(check(name, dtype))
            if not rows[-1].passed:
                failures[name] = "beyond the bounds, or not ours alone"
        except Exception as error:
            failures[name] = repr(error)
        gc.collect()
    if arguments.only or failures:
        Console().print(markdown(rows), markup=False, soft_wrap=True)
    else:
        PAGE.write_text(page(rows, dtype))
    if failures:
        sys.exit("\n".join(f"{name}: {why}" for name, why in failures.items()))


if __name__ == "__main__":
    main()
