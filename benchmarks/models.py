"""``python -m benchmarks.models``: whole models, ours beside torch's and other libraries'.

Training steps (forward, cross entropy, backward, SGD) and inference, each contestant its own copy of the same weights,
taking turns as the operators do in measure.py. Every contestant's first result is compared with torch in float64: an
inference's outputs, a step's gradients. Dropout is left out, since no two draws are alike.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import cnnops
from benchmarks import measure, peers
from benchmarks.report import markdown, milliseconds

EFFORT = measure.Effort(seconds=20, least=5, most=60)
QUICK = measure.Effort(seconds=1, least=2, most=5)
# Relative L2 against float64. A rectifier or maximum at a tie may flip, and a gradient with it.
OUTPUTS, GRADIENTS = 1e-5, 1e-2


@dataclass(frozen=True)
class Load:
    model: str
    n: int
    training: bool
    goal: float

    @property
    def name(self) -> str:
        return f"{self.model}, {'training step' if self.training else 'inference'}, N = {self.n}"

    def make(self) -> tuple[nn.Module, Tensor, Tensor]:
        """torch's model, a batch and its classes."""
        torch.manual_seed(0)
        if self.model in ("lecture", "two-layer"):
            from examples.models import MODELS

            model, size, classes = MODELS[self.model].build(nn), (1, 28, 28), 10
        else:
            import torchvision

            model, size, classes = getattr(torchvision.models, self.model)(weights=None), (3, 224, 224), 1000
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train(self.training), torch.randn(self.n, *size), torch.randint(classes, (self.n,))


LOADS = [
    Load("lecture", 64, True, 2.0),
    Load("two-layer", 64, True, 2.5),
    Load("vgg16", 1, False, 1.4),
    Load("vgg16", 8, False, 1.6),
    Load("vgg16", 8, True, 2.0),
    Load("resnet18", 1, False, 1.0),
    Load("resnet18", 8, False, 1.0),
    Load("resnet18", 8, True, 1.0),
]


# --- what a contestant does ---


def step(model: nn.Module, x: Tensor, classes: Tensor) -> Callable:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def call():
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
        return [p.grad for p in model.parameters()]

    return call


def inference(model: nn.Module, x: Tensor) -> Callable:
    @torch.no_grad()
    def call():
        return model(x)

    return call


def contestants(load: Load, model: nn.Module, x: Tensor, classes: Tensor, others: bool) -> dict[str, Callable]:
    def run(changed: nn.Module, memory_format=torch.contiguous_format) -> Callable:
        changed, image = changed.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        return step(changed, image, classes) if load.training else inference(changed, image)

    options = {"fuse" if load.training else "inference": True, "linear": True}
    found = {}
    for layout, memory_format in measure.LAYOUTS.items():
        found[f"ours {layout}"] = run(cnnops.convert(copy.deepcopy(model)), memory_format)
        found[f"ours fused {layout}"] = run(cnnops.convert(copy.deepcopy(model), **options), memory_format)
        found[f"torch {layout}"] = run(copy.deepcopy(model), memory_format)
        compiled = torch.compile(copy.deepcopy(model).to(memory_format=memory_format), dynamic=False)
        found[f"torch.compile {layout}"] = run(compiled, memory_format)
    if others and not load.training:
        found |= libraries(load, model, x)
    return found


# --- other libraries: inference ---


def libraries(load: Load, model: nn.Module, x: Tensor) -> dict[str, Callable]:
    found = {}
    names = peers.installed()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if {"onnxruntime", "openvino"} & set(names):
            path = Path(folder, "model.onnx")
            torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=True, external_data=False, verbose=False)
            content = path.read_bytes()
        if "onnxruntime" in names:
            found["onnxruntime"] = peers.run_onnxruntime(content, x)
        if "openvino" in names:
            found["openvino"] = peers.run_openvino(content, x)
        if "ncnn" in names and load.n == 1:
            found["ncnn"] = ncnn_model(model, x, Path(folder))
    return found


def ncnn_model(model: nn.Module, x: Tensor, folder: Path) -> Callable:
    import ncnn
    import pnnx

    traced = folder / "model.pt"
    torch.jit.trace(copy.deepcopy(model), x).save(traced)
    shape = ",".join(map(str, x.shape))
    command = [pnnx.EXEC_PATH, traced, f"inputshape=[{shape}]", "fp16=0"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    net.load_param(str(folder / "model.ncnn.param"))
    net.load_model(str(folder / "model.ncnn.bin"))
    image = ncnn.Mat(x[0].numpy())

    def call():
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return torch.from_numpy(np.asarray(extractor.extract("out0")[1]))[None]

    call.keeps = net, image
    return call


# --- measure and tell ---


@contextmanager
def frozen():
    """torch.compile's own way to fold batch norms into convolutions and to lay weights out beforehand."""
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def compare(load: Load, effort: measure.Effort, others: bool) -> dict:
    torch.compiler.reset()
    model, x, classes = load.make()
    exact = copy.deepcopy(model).double()
    reference = step(exact, x.double(), classes)() if load.training else inference(exact, x.double())()
    bound = GRADIENTS if load.training else OUTPUTS
    with frozen():
        calls = contestants(load, model, x, classes, others)
        errors = {}
        for name, call in calls.items():
            got, expected = (t if isinstance(t, list) else [t] for t in (call(), reference))
            parts = [torch.cat([t.double().flatten() for t in side]) for side in (got, expected)]
            errors[name] = measure.error(*parts)
        del reference, exact
        samples = measure.race(calls, effort, pause=0.005 if others else 0)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    ours = min((name for name in medians if name.startswith("ours")), key=medians.get)
    best = min((name for name in medians if not name.startswith("ours")), key=medians.get)
    ratios = [theirs / mine for theirs, mine in zip(samples[best], samples[ours], strict=True)]
    return {
        "load": load.name,
        "goal": load.goal,
        "times": {name: measure.spread(times) for name, times in samples.items()},
        "errors": errors,
        "wrong": [name for name, error in errors.items() if error > bound],
        "ours": ours,
        "best": best,
        "ratio": measure.spread(ratios),
        "rounds": len(ratios),
    }


def page(data: dict) -> str:
    """The section of docs/performance.md."""
    names = list(dict.fromkeys(name for row in data["results"] for name in row["times"]))
    rows = []
    for row in data["results"]:
        low, middle, high = row["ratio"]
        worst = max(error for name, error in row["errors"].items() if name.startswith("ours"))
        times = [milliseconds(row["times"][name]) if name in row["times"] else "" for name in names]
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([row["load"], *times, row["best"], f"{row['goal']:g}", ratio, f"{worst:.0e}"])
    about = data["machine"]
    return f"""## Whole models

`python -m benchmarks.models`; memory {about["memory"]};
cnnops {about["commit"]}{"; few rounds" * data["quick"]}. Milliseconds; *ratio* is the best
other's time over our best. Training steps are forward, cross entropy, backward and SGD; *fused* is `convert` with
`linear=True` and `fuse=True`, for inference `inference=True`; torch.compile is frozen for inference. Dropout is left
out. *error*: relative L2 against float64, of outputs, or of all gradients of a step.

{markdown(["", *names, "best other", "goal", "ratio", "error"], rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=[""], metavar="TEXT", help="loads with one of these in their name")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(peers.LIBRARIES)} where installed")
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a measurement")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write models.json")
    options = parser.parse_args()
    console = Console()
    data = {"machine": measure.machine(), "quick": options.quick, "results": []}
    for load in LOADS:
        if not any(text in load.name for text in options.case):
            continue
        row = compare(load, QUICK if options.quick else EFFORT, options.peers)
        data["results"].append(row)
        table = Table("", "ms", "error", title=f"{load.name}: {row['ratio'][1]:.2f} times {row['best']}")
        for name, times in sorted(row["times"].items(), key=lambda item: item[1][1]):
            wrong = " WRONG" * (name in row["wrong"])
            table.add_row(name, milliseconds(times), f"{row['errors'][name]:.0e}{wrong}")
        console.print(table)
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / "models.json").write_text(json.dumps(data, indent=1))
    wrong = [f"{row['load']}: {name}" for row in data["results"] for name in row["wrong"] if name.startswith("ours")]
    if wrong:
        raise SystemExit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
