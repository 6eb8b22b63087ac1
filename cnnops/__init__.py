"""cnnops: hand-written kernels for convolutional networks in PyTorch.

``cnnops.nn`` has modules that replace torch.nn's, ``cnnops.functional`` the functions of torch.nn.functional, and
``cnnops.ops`` the operators below them. ``cnnops.convert(model)`` turns a torch.nn model into one of ours, in place,
``cnnops.restore(model)`` back. ``python -m cnnops info`` tells what was built and what this machine can do.
"""

import torch

try:
    from cnnops._build import TORCH_VERSION
except ImportError:
    raise ImportError(
        "cnnops has not been built: run pip install --no-build-isolation -e . in its repository"
    ) from None

if TORCH_VERSION != torch.__version__:
    raise ImportError(
        f"cnnops was built for torch {TORCH_VERSION}, but torch {torch.__version__} is installed: "
        "run pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps . "
        "in its repository to build it for this one"
    )

from cnnops import _vmap, functional, nn, ops  # noqa: E402, F401
from cnnops._settings import settings  # noqa: E402
from cnnops.convert import convert, left_alone, restore  # noqa: E402
from cnnops.memory import empty_cache, memory_stats  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "convert",
    "empty_cache",
    "functional",
    "left_alone",
    "memory_stats",
    "nn",
    "ops",
    "restore",
    "settings",
]
