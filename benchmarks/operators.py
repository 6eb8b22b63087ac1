"""A workload's passes as callables, ours and torch's, and what each costs at least.

forward calls the public function without gradients, step trains: forward, then every gradient by autograd. The other
passes are the operators below, each side's by torch.ops, so that neither pays more for being called.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as theirs

from benchmarks.workloads import Workload
from cnnops import functional, ops

aten = torch.ops.aten
SLOPE = 0.01


def operands(load: Workload, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """Random ones: what the function takes and differentiates, and a gradient of its result."""
    case, draw = load.case, torch.Generator(device).manual_seed(0)
    shapes = [case.input_shape]
    if load.kind == "conv2d":
        shapes += [case.weight_shape] + [(case.k,)] * case.bias
    if load.kind == "prelu":
        shapes += [(case.c,)]
    out = case.input_shape if load.groups == ["relu"] else case.output_shape
    *leaves, gy = (torch.randn(shape, generator=draw, device=device).to(load.dtype) for shape in [*shapes, out])
    return leaves, gy


def arguments(load: Workload) -> dict:
    """What the function takes besides tensors."""
    return {
        "conv2d": lambda case: case.arguments,
        "max_pool2d": lambda case: case.max_arguments,
        "avg_pool2d": lambda case: case.avg_arguments,
        "adaptive_avg_pool2d": lambda case: {"output_size": case.out},
        "leaky_relu": lambda case: {"negative_slope": SLOPE},
    }.get(load.kind, lambda case: {})(load.case)


def calls(load: Workload, leaves: list[Tensor], gy: Tensor, ours: bool) -> dict[str, Callable]:
    """The passes by name. What a backward pass is given, the forward pass computes here, unmeasured."""
    function = partial(getattr(functional if ours else theirs, load.kind), **arguments(load))
    backwards = (_our_backwards if ours else _their_backwards)(load, *leaves, gy=gy)
    return {"forward": lambda: function(*leaves), **backwards, "step": _step(function, leaves, gy)}


def _step(function, leaves, gy):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(function(*leaves), leaves, gy)


def _our_backwards(load, x, w=None, b=None, *, gy):
    case = load.case
    match load.kind:
        case "conv2d":
            rest = case.arguments.values()
            return {
                "grad_input": lambda: ops.conv2d_grad_input(gy, w, None, x.shape[2:], *rest),
                "grad_weight": lambda: ops.conv2d_grad_weight(gy, x, w.shape[2:], *rest),
            }
        case "max_pool2d":
            rest = case.max_arguments.values()
            places = ops.max_pool2d(x, *rest)[1]
            return {"backward": lambda: ops.max_pool2d_backward(gy, places, x.shape[2:], *rest)}
        case "avg_pool2d":
            return {"backward": lambda: ops.avg_pool2d_backward(gy, x.shape[2:], *case.avg_arguments.values())}
        case "adaptive_avg_pool2d":
            return {"backward": lambda: ops.adaptive_avg_pool2d_backward(gy, x.shape[2:])}
        case "prelu":
            return {"backward": lambda: ops.prelu_backward(gy, x, w)}
    y = getattr(functional, load.kind)(x, **arguments(load))
    match load.kind:
        case "relu":
            return {"backward": lambda: ops.relu_backward(gy, y)}
        case "relu6":
            return {"backward": lambda: ops.hardtanh_backward(gy, y, 0.0, 6.0)}
        case "leaky_relu":
            return {"backward": lambda: ops.leaky_relu_backward(gy, y, SLOPE)}


def _their_backwards(load, x, w=None, b=None, *, gy):
    case = load.case
    match load.kind:
        case "conv2d":
            rest = None, case.stride, case.padding, case.dilation, False, (0, 0), case.groups

            def gradient(i):
                return aten.convolution_backward(gy, x, w, *rest, [i == 0, i == 1, False])[i]

            return {"grad_input": lambda: gradient(0), "grad_weight": lambda: gradient(1)}
        case "max_pool2d":
            rest = list(case.max_arguments.values())
            indices = theirs.max_pool2d_with_indices(x, *rest)[1]
            return {"backward": lambda: aten.max_pool2d_with_indices_backward(gy, x, *rest, indices)}
        case "avg_pool2d":
            return {"backward": lambda: aten.avg_pool2d_backward(gy, x, *case.avg_arguments.values())}
        case "adaptive_avg_pool2d":
            return {"backward": lambda: aten._adaptive_avg_pool2d_backward(gy, x)}
        case "prelu":
            wide = w.view(-1, 1, 1)

            def gradients():
                gx, gw = aten._prelu_kernel_backward(gy, x, wide)
                return gx, gw.sum((0, 2, 3))  # as autograd does it

            return {"backward": gradients}
        case "relu":
            y = theirs.relu(x)
            return {"backward": lambda: aten.threshold_backward(gy, y, 0)}
        case "relu6":
            return {"backward": lambda: aten.hardtanh_backward(gy, x, 0.0, 6.0)}
        case "leaky_relu":
            return {"backward": lambda: aten.leaky_relu_backward(gy, x, SLOPE, False)}


def algorithm(load: Workload, leaves: list[Tensor], which: str) -> str:
    """The name of the one that a pass of ours runs."""
    if load.kind != "conv2d":
        return ""
    passes = ["forward", "grad_input", "grad_weight"] if which == "step" else [which]
    found = [ops.conv2d_algorithm(*leaves[:2], **arguments(load), which=p) for p in passes]
    return "/".join(dict.fromkeys(found))


def work(load: Workload, which: str) -> tuple[int, int]:
    """(floating point operations of the plain formula, bytes that must be read and written once)."""
    case, size = load.case, load.dtype.itemsize
    x = prod(case.input_shape)
    if load.kind == "conv2d":
        once = x + prod(case.weight_shape) + prod(case.output_shape)
        times = 3 if which == "step" else 1
        return times * case.flops, times * once * size
    y = x if load.groups == ["relu"] else prod(case.output_shape)
    again = x if load.groups == ["relu"] else 0  # what says where the gradient goes
    return 0, size * {"forward": x + y, "backward": x + y + again, "step": 2 * (x + y) + again}[which]
