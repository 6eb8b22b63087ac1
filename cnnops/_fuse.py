"""What ``convert(model, fuse=True)`` and ``convert(model, inference=True)`` do to a model that has our kernels.

Fusing changes the class of a convolution to a block's, which does all of its chain, and the classes of the chain's
other modules to ones that hand on what they get. Parameters, names and the keys of the state_dict stay. Where the
chains are, torch.fx tells: it runs the model's forward on a stand-in, which also sees whether anybody else looks at
what is in between. Of a forward that torch.fx cannot follow nobody knows which modules it calls by themselves: there
the nn.Sequentials alone change, to ones that run blocks when they are called as a whole.

For inference the graph itself is rewritten, so that functions and modules that are called twice count, too, and
residual blocks add in place.
"""

import operator
from typing import NamedTuple

import torch
from torch import fx
from torch import nn as tnn
from torch.nn.utils.parametrize import is_parametrized

from cnnops import functional, nn
from cnnops._arguments import is_integer

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Absorbed:
    """What makes a module one whose work a block does: it is still of its class, but hands on what it gets."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


ABSORBED = {
    cls: type(f"Absorbed{cls.__name__}", (Absorbed, cls), {"__module__": __name__, "absorbed_from": cls})
    for cls in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.MaxPool2d)
}
globals().update({cls.__name__: cls for cls in ABSORBED.values()})  # where pickle looks for them


class FusedSequential(tnn.Sequential):
    """A Sequential whose chains are computed as blocks. Its modules, called by others, do what they always did."""

    def __init__(self, *args):
        super().__init__(*args)
        self._blocks = {}  # place of a chain's convolution -> its number of modules, and a block in their stead

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        modules, place = list(self), 0
        while place < len(modules):
            length, module = self._blocks.get(place, (1, modules[place]))
            input = module(input)
            place += length
        return input


class Tracer(fx.Tracer):
    """Records calls of torch.nn's modules and ours, and looks into all others."""

    def is_leaf_module(self, m: tnn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == nn.__name__ or super().is_leaf_module(m, module_qualified_name)


class Step(NamedTuple):
    """One step of a chain: a module or a function, as settings of a block."""

    kind: str  # "activation" or "pooling"
    settings: dict


def _step_of_module(module: tnn.Module) -> Step | None:
    if type(module) not in ABSORBED:
        return None
    match module:
        case tnn.ReLU():
            return Step("activation", {"activation": "relu"})
        case tnn.ReLU6():
            return Step("activation", {"activation": "relu6"})
        case tnn.Hardtanh(min_val=0, max_val=6):
            return Step("activation", {"activation": "relu6"})
        case tnn.LeakyReLU(negative_slope=slope) if slope >= 0:
            return Step("activation", {"activation": "leaky_relu", "negative_slope": slope})
        case tnn.MaxPool2d(return_indices=False) if _places(module.kernel_size) <= 256:
            return Step(
                "pooling", _pooling(*(getattr(module, name) for name in module.__constants__[:4]), module.ceil_mode)
            )
    return None


def _pooling(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> dict:
    return {
        "pool_kernel_size": kernel_size,
        "pool_stride": kernel_size if stride in (None, ()) else stride,
        "pool_padding": padding,
        "pool_dilation": dilation,
        "ceil_mode": ceil_mode,
    }


def _places(kernel_size) -> int:
    return kernel_size**2 if is_integer(kernel_size) else kernel_size[0] * kernel_size[-1]


def _settings(steps: list[Step]) -> dict:
    """Of the block that does these steps after its convolution."""
    settings = {"activation": "none", "negative_slope": 0.01}
    for step in steps:
        settings |= step.settings
    return settings


def _next_kinds(steps: list[Step]) -> tuple[str, ...]:
    """What may follow: one activation, then one pooling."""
    return ("activation", "pooling") if not steps else ("pooling",) if steps[-1].kind == "activation" else ()


def _plain(module: tnn.Module, cls: type) -> bool:
    """A module of this class and nothing besides: nobody looks at what comes in or out, no other does its work."""
    watched = any(getattr(module, hooks, None) for hooks in HOOKS)
    return type(module) is cls and not watched and not is_parametrized(module) and "forward" not in vars(module)


# --- fusing in place ---


def _traced_chains(model: tnn.Module) -> list[list[str]] | None:
    """Names of modules of which each gets what the one before it returns, and nobody else does. None: cannot tell."""
    training = {module: module.training for module in model.modules()}
    found = []
    try:
        for mode in True, False:  # another mode may be another graph: only what is a chain in both counts
            for module in training:
                module.training = mode
            nodes = Tracer().trace(model).nodes
            calls = [node.target for node in nodes if node.op == "call_module"]
            found.append([chain for node in nodes if len(chain := _chain_from(node, calls)) > 1])
    except Exception:  # whatever a forward does with what is no tensor
        return None
    finally:
        for module, mode in training.items():
            module.training = mode
    return [chain for chain in found[0] if chain in found[1]]


def _chain_from(node: fx.Node, calls: list[str]) -> list[str]:
    chain = []
    while node.op == "call_module" and calls.count(node.target) == 1 and node.args[1:] == () and not node.kwargs:
        chain.append(node.target)
        if len(node.users) != 1:
            break
        node = next(iter(node.users))
    return chain


def fuse(model: tnn.Module) -> None:
    """Makes blocks of the chains convolution, activation, max pooling of a converted model, in place."""
    chains = _traced_chains(model)
    used = list(dict(model.named_modules(remove_duplicate=False)).values())
    if chains is None:
        for module in model.modules():
            if type(module) is tnn.Sequential:
                _fuse_sequential(module, used)
        return
    for chain in chains:
        conv, *others = map(model.get_submodule, chain)
        steps = _steps_after(conv, others, used)
        if steps:
            become_block(conv, steps)
            for module in others[: len(steps)]:
                module.__class__ = ABSORBED[type(module)]


def _steps_after(conv: tnn.Module, others: list[tnn.Module], used: list[tnn.Module]) -> list[Step]:
    """What a block could do besides the convolution, of the modules that follow it."""
    steps = []
    if not _plain(conv, nn.Conv2d) or used.count(conv) != 1:
        return steps
    for module in others:
        step = _step_of_module(module)
        if not step or step.kind not in _next_kinds(steps):
            break
        if used.count(module) != 1 or not _plain(module, type(module)):
            break
        steps.append(step)
    return steps


def _fuse_sequential(sequential: tnn.Sequential, used: list[tnn.Module]) -> None:
    modules, blocks = list(sequential), {}
    for place, conv in enumerate(modules):
        steps = _steps_after(conv, modules[place + 1 :], used)
        if steps:
            block = nn.Conv2d.__new__(nn.Conv2d)
            vars(block).update(vars(conv))  # the dict of parameters is the convolution's own
            become_block(block, steps)
            blocks[place] = len(steps) + 1, block
    if blocks:
        sequential.__class__ = FusedSequential
        sequential._blocks = blocks


def become_block(conv: tnn.Conv2d, steps: list[Step]) -> None:
    settings = _settings(steps)
    conv.__class__ = nn.ConvReLUMaxPool2d if steps[-1].kind == "pooling" else nn.ConvReLU2d
    vars(conv).update(settings, fused=tuple(settings))


def unfuse(model: tnn.Module) -> None:
    """Undoes :func:`fuse`, in place."""
    for module in model.modules():
        if isinstance(module, Absorbed):
            module.__class__ = module.absorbed_from
        elif isinstance(module, FusedSequential):
            module.__class__ = tnn.Sequential
            del module._blocks
        elif "fused" in vars(module):
            for setting in (*module.fused, "fused"):
                delattr(module, setting)
            module.__class__ = nn.Conv2d


# --- for inference ---


def for_inference(model: tnn.Module) -> fx.GraphModule:
    """The model, which is written over, as a graph: BatchNorm2d folded into convolutions, and chains made blocks."""
    model.eval()
    try:
        tracer = Tracer()
        graph = tracer.trace(model)
    except Exception as error:
        raise RuntimeError(
            f"convert(inference=True) needs a model that torch.fx can trace, but this one it cannot: {error}"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}  # weights, by others
    for node in list(graph.nodes):
        if (
            node.op != "call_module"
            or node.target in read
            or calls.count(node.target) != 1
            or not _plain(modules[node.target], nn.Conv2d)
        ):
            continue
        conv, last, steps = modules[node.target], node, []
        while (following := _only_user(last)) is not None:
            module = modules.get(following.target) if following.op == "call_module" else None
            if not steps and last is node and module is not None and _folds(module):
                fold(conv, module)
            elif (step := _step_of(following, module)) and step.kind in _next_kinds(steps):
                steps.append(step)
            else:
                break
            last = following
        last.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user is not node)
        while last is not node:
            before = last.args[0]
            graph.erase_node(last)
            last = before
        if steps:
            become_block(conv, steps)
    _add_in_place(graph, modules)
    fused = fx.GraphModule(model, graph, type(model).__name__)
    fused.delete_all_unused_submodules()
    for conv in fused.modules():
        if isinstance(conv, nn.Conv2d) and not is_parametrized(conv) and _shares_filters(conv):
            conv.contiguous_filters = True
            conv.to(memory_format=torch.preserve_format)
    vars(fused).update({name: hooks for name, hooks in vars(model).items() if name.startswith("_forward")})
    return fused.eval()


def _shares_filters(conv: tnn.Conv2d) -> bool:
    """Whether its filters may be transformed (csrc/cpu/conv2d_winograd.cpp). That reads a block of all taps' channels:
    in channels_last short runs far apart, in contiguous filters long ones."""
    square = conv.kernel_size in ((3, 3), (5, 5)) and conv.stride == (1, 1)
    return square and conv.groups == 1 and min(conv.in_channels, conv.out_channels) >= 16


def _add_in_place(graph: fx.Graph, modules: dict[str, tnn.Module]) -> None:
    """Adds to the results of convolutions that nobody else takes where they lie, as residual blocks mean to: torch.fx
    records their ``out += identity`` as ``out + identity``."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (operator.add, torch.add):
            continue
        if node.kwargs or len(node.args) != 2:  # scaled
            continue
        for sum_, term in (node.args, node.args[::-1]):
            if isinstance(sum_, fx.Node) and sum_.op == "call_module" and len(sum_.users) == 1:
                if _plain(modules[sum_.target], nn.Conv2d):
                    node.target, node.args = add_to, (sum_, term)
                    break


def add_to(sum_: torch.Tensor, term) -> torch.Tensor:
    """The sum, in the memory of the first if it is like the second."""
    alike = isinstance(term, torch.Tensor) and (sum_.shape, sum_.dtype) == (term.shape, term.dtype)
    return sum_.add_(term) if alike else sum_ + term


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone takes what this one returns, as its first argument."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.args and user.args[0] is node else None


def _step_of(node: fx.Node, module: tnn.Module | None) -> Step | None:
    """Of a call of a module, a function or a method."""
    if module is not None:
        return _step_of_module(module) if _plain(module, type(module)) else None
    rest, more = node.args[1:], {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if node.target in (functional.relu, functional.relu_, torch.relu, "relu", "relu_"):
        return Step("activation", {"activation": "relu"})
    if node.target is functional.hardtanh and (*rest[:2], *more.values()) == (0, 6):  # what relu6 calls
        return Step("activation", {"activation": "relu6"})
    if node.target is functional.leaky_relu:
        slope = rest[0] if rest else more.get("negative_slope", 0.01)
        return Step("activation", {"activation": "leaky_relu", "negative_slope": slope}) if slope >= 0 else None
    if node.target is functional.max_pool2d and len(rest) <= 5 and not more.pop("return_indices", False):
        settings = _pooling(*rest, **more)
        return Step("pooling", settings) if _places(settings["pool_kernel_size"]) <= 256 else None
    return None


def _folds(module: tnn.Module) -> bool:
    return _plain(module, tnn.BatchNorm2d) and module.running_mean is not None


@torch.no_grad()
def fold(conv: tnn.Conv2d, norm: tnn.BatchNorm2d) -> None:
    """y = (conv(x) - mean) * scale + shift, as a convolution: in float64, rounded once."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(mean)
    dtype = conv.weight.dtype
    conv.weight = tnn.Parameter((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype), requires_grad=False)
    conv.bias = tnn.Parameter(((bias - mean) * scale + shift).to(dtype), requires_grad=False)
