"""``convert(model)`` makes a torch.nn model compute with our kernels, ``restore(model)`` with torch's again.

Both change the classes of a model's modules and nothing else: parameters, hooks, names, the keys of the state_dict and
optimizers made before stay what they are.

- A torch.nn module that :mod:`cnnops.nn` has under the same name gets our class.
- A module whose own forward may call functions (a user's, torchvision's) gets a subclass of its class, in whose forward
  every call of a function that :mod:`cnnops.functional` has (``F.relu(x)``, ``torch.conv2d(...)``, ``x.relu_()``) is
  ours: while it runs, a :class:`torch.overrides.TorchFunctionMode` is active. torch.nn's containers cost nothing.

What we have is found by name; nothing is listed here but what is converted on demand only.
"""

import copy
import functools
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from cnnops import _fuse, functional, nn

logger = logging.getLogger("cnnops")

DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}

# torch.nn's classes and ours; those that are not particular to networks that convolve, on demand only
ON_DEMAND = {tnn.Linear: nn.Linear}
OURS = {
    getattr(tnn, name): ours
    for name, ours in vars(nn).items()
    if isinstance(ours, type) and issubclass(ours, getattr(tnn, name, ())) and ours not in ON_DEMAND.values()
}
THEIRS = {ours: theirs for theirs, ours in (OURS | ON_DEMAND).items()}
# what else in torch, by its name, is of our kind
FAMILIES = re.compile("(?i)conv|pool|" + "|".join(theirs.__name__ for theirs in OURS))


def _functions() -> dict[Callable, tuple[str, dict]]:
    """torch's functions and methods -> the name of ours, and the arguments that make it do the same."""
    found = {}
    for name, ours in vars(functional).items():
        if name[0] != "_" and getattr(ours, "__module__", "") == functional.__name__ and hasattr(F, name):
            found |= {getattr(home, name): (name, {}) for home in (F, torch, Tensor) if hasattr(home, name)}
            if hasattr(F, f"{name}_with_indices"):
                found[getattr(F, f"{name}_with_indices")] = name, {"return_indices": True}
    del found[F.linear]  # on demand only, and as a module
    return found


FUNCTIONS = _functions()


class Reroute(TorchFunctionMode):
    """While active, torch's functions of which we have a twin are ours, for the tensors that ours take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FUNCTIONS and _takes(args[0] if args else kwargs.get("input")):
            name, more = FUNCTIONS[func]
            return getattr(functional, name)(
                *args, **{**kwargs, **more}
            )  # by name: torch.fx replaces it while it traces
        return func(*args, **kwargs)


def _takes(input) -> bool:
    if not isinstance(input, Tensor):  # one that stands for a tensor, as torch.fx's
        return True
    return input.dtype in DTYPES and input.layout is torch.strided and not input.is_nested


@functools.cache
def _rerouted(cls: type) -> type:
    """A subclass of a module class, of the same name, during whose forward :class:`Reroute` is active."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # Twice would be right, too, but slower.
        if any(isinstance(mode, Reroute) for mode in _get_current_function_mode_stack()):
            return super(subclass, self).forward(*args, **kwargs)
        with Reroute():
            return super(subclass, self).forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # pickle and deepcopy find a class by its name, and there they find the original.
        make, args, *state = super(subclass, self).__reduce_ex__(protocol)
        return _remake, (make, tuple(cls if arg is subclass else arg for arg in args)), *state

    same = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_rerouted_from": cls}
    subclass = type(cls.__name__, (cls,), same | own)
    return subclass


def _remake(make: Callable, args: tuple) -> tnn.Module:
    module = make(*args)
    module.__class__ = _rerouted(type(module))
    return module


def _calls_functions(cls: type) -> bool:
    """Whether a module's forward may itself call what is to be rerouted; torch.nn's own containers do not."""
    if cls.__module__.startswith("torch."):
        return cls in (tnn.TransformerEncoderLayer, tnn.TransformerDecoderLayer)
    forward_is_torchs = getattr(cls.forward, "__module__", "").startswith("torch.")
    return issubclass(cls, tuple(OURS)) or not forward_is_torchs


def _to_ours(cls: type) -> type:
    if cls.__module__ in (nn.__name__, _fuse.__name__) or "_rerouted_from" in vars(cls):
        return cls
    return OURS.get(cls) or (_rerouted(cls) if _calls_functions(cls) else cls)


def _to_theirs(cls: type) -> type:
    return THEIRS.get(cls) or vars(cls).get("_rerouted_from", cls)


def _class(module: tnn.Module) -> type:
    """The module's class without the one that torch.nn.utils.parametrize puts upon it."""
    return type(module).__base__ if is_parametrized(module) else type(module)


def _set_class(module: tnn.Module, cls: type) -> None:
    if cls is _class(module):
        return
    if is_parametrized(module):
        # Copies share the parametrized class, and a copy may stay as it is: this one gets a class of its own.
        own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
        cls = type(type(module).__name__, (cls,), own)
    module.__class__ = cls


def _obstacle(module: tnn.Module) -> str | None:
    """Why a module's class must stay what it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if isinstance(module, torch.fx.GraphModule):
        return "written by torch.fx: the functions in its graph stay"
    if _class(module).__module__.startswith("torch.ao."):
        return "a module of torch.ao's quantization"
    if "forward" in vars(module):
        return "its forward has been replaced"
    dtypes = {p.dtype for p in module.parameters(recurse=False)} - DTYPES
    if dtypes and _class(module) in OURS | ON_DEMAND:
        return f"its parameters are {', '.join(map(str, dtypes))}"
    return None


class LeftAlone(NamedTuple):
    """A module that computes with torch's kernels, wholly or in part: its name in the model, its class's, and why."""

    name: str
    class_name: str
    reason: str


def left_alone(model: tnn.Module) -> list[LeftAlone]:
    """The convolutions, poolings and rectifiers that :func:`convert` leaves to torch, before it or after.

    Functions that a forward calls are not among them: nobody knows before it runs. Calls of ours with tensors that our
    kernels do not take (other dtypes, sparse or nested ones) go to torch's.
    """
    rows = ((name, _original_name(module), _why_left_alone(module)) for name, module in model.named_modules())
    return [LeftAlone(*row) for row in rows if row[-1]]


def _original_name(module: tnn.Module) -> str:
    """The name of the class that the module had before TorchScript, parametrizations and :func:`convert`."""
    return getattr(module, "original_name", _to_theirs(_class(module)).__name__)


def _why_left_alone(module: tnn.Module) -> str | None:
    cls, name, obstacle = _to_theirs(_class(module)), _original_name(module), _obstacle(module)
    if isinstance(module, torch.fx.GraphModule):
        return obstacle if any(node.target in FUNCTIONS for node in module.graph.nodes) else None
    if cls.__module__ in (nn.__name__, _fuse.__name__):  # a block, which torch has not, or of one
        return None
    replaced = [c for c in cls.__mro__ if c in OURS]
    is_torchs = cls.__module__.startswith("torch.")
    if obstacle:
        concerned = replaced or _calls_functions(cls) or (is_torchs and re.search(FAMILIES, name))
        return obstacle if concerned and not isinstance(module, tnn.Sequential) else None
    if replaced and not is_torchs:
        return f"a subclass of torch.nn.{replaced[0].__name__}: only the functions that it calls are replaced"
    return f"cnnops.nn has no {name}" if is_torchs and cls not in OURS and re.search(FAMILIES, name) else None


def convert(model: tnn.Module, *, fuse: bool = False, inference: bool = False, linear: bool = False) -> tnn.Module:
    """Changes a torch.nn model, in place, into one that computes with our kernels, and returns it.

    Modules of a class that cnnops.nn has get that class; in the forward of other modules than torch.nn's, calls of
    functions that cnnops.functional has become ours, too. Parameters, buffers, hooks, names, parametrizations and the
    training mode stay, and so do optimizers made before. To keep the original, ``convert(copy.deepcopy(model))``.

    ``fuse=True`` makes one operator of each convolution and what follows it: an activation (ReLU, ReLU6, LeakyReLU),
    max pooling, or both. The convolution becomes a :class:`cnnops.nn.ConvReLU2d` or ``ConvReLUMaxPool2d``, the other
    modules step aside; parameters and the keys of the state_dict stay, and results are the same bits. Chains are found
    by torch.fx; in a model that it cannot trace, in nn.Sequential only, and where that is called as a whole. What is in
    between can no longer be looked at: so modules with hooks, and those whose outputs somebody else takes, are left as
    they are.

    ``inference=True`` does that and folds each BatchNorm2d, with the statistics that it has at this moment, into the
    convolution before it; what a residual block adds to a convolution's result is added in place. Filters of 3x3 and
    5x5 convolutions with stride 1, of 16 channels and more, stay contiguous when the result moves to channels_last (on
    the CPU, but for bfloat16): they are read faster so, and bits are the same. The model stays as it was, and the
    result is a new one, a torch.fx.GraphModule, in eval mode; its rounding differs from the original's.

    ``linear=True`` makes Linear modules ours, too: then a whole classifier's outputs are the same bits whatever the
    batch size. On the CPU batches gain by it, and single images where threads share them; on a GPU it has not been
    measured. Calls of ``F.linear`` stay torch's.

    ReLU6, Hardtanh, LeakyReLU and blocks keep their output for the backward pass, as ReLU does; torch's keep the input.
    An operation in place right after them, such as ``Dropout(inplace=True)``, makes autograd raise an error.

    :func:`left_alone` tells which modules remain with torch, and why; the logger ``cnnops`` does so in a line, at level
    INFO. These calls of functions remain with torch:

    - in other methods than forward (modules that these call are ours);
    - ``torch.relu_``, ``F.hardtanh_`` and ``F.leaky_relu_`` under torch.compile, which hides them from modes; not so
      ``F.relu(x, inplace=True)`` and ``x.relu_()``;
    - in what ``torch.utils.checkpoint`` runs again in the backward pass, unless that is a module: ``self.block`` and
      neither a method nor a lambda. (Max pooling keeps other tensors than torch's; checkpoint raises an error there.)

    Raises:
        RuntimeError: ``inference=True`` for a model that torch.fx cannot trace.
    """
    if inference:
        return _fuse.for_inference(convert(copy.deepcopy(model), linear=linear))
    modules = [module for module in model.modules() if not _obstacle(module)]
    for module in modules:
        cls = _class(module)
        _set_class(module, ON_DEMAND[cls] if linear and cls in ON_DEMAND else _to_ours(cls))
    count = sum(_class(module) in THEIRS for module in modules)
    rest = "; ".join(f"{row.name or 'the model'} ({row.class_name}): {row.reason}" for row in left_alone(model))
    logger.info("converted %d modules; left alone: %s", count, rest or "none")
    if fuse:
        _fuse.fuse(model)
    return model


def restore(model: tnn.Module) -> tnn.Module:
    """Undoes :func:`convert`, in place, and returns the model. Modules made from cnnops.nn become torch.nn's, too, but
    for blocks, which torch.nn has not; those that ``fuse=True`` made are taken apart."""
    _fuse.unfuse(model)
    for module in model.modules():
        _set_class(module, _to_theirs(_class(module)))
    return model
