"""Arguments as torch's functions take them."""

import functools

from torch.overrides import handle_torch_function, has_torch_function


def overridable(function):
    """Lets __torch_function__ see the call, as torch's own functions do. (_C's entries do that by themselves.)"""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        everything = (*args, *kwargs.values())
        if has_torch_function(everything):
            return handle_torch_function(wrapper, everything, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def is_integer(value) -> bool:
    """Also of numpy."""
    return isinstance(value, int) or hasattr(type(value), "__index__")


def pair(value):
    """``3 -> (3, 3)``; ``(3,) -> (3, 3)``; ``(3, 5) -> (3, 5)``, as torch takes sizes."""
    if is_integer(value):
        return value, value
    if len(value) not in (1, 2):
        raise RuntimeError(f"expected one integer or two, (h, w), but got {value}")
    return value[0], value[-1]


def four_sides(padding, kernel_size, stride, dilation):
    """(top, left, bottom, right) from a name or from ((top, bottom), (left, right))."""
    if padding == "valid":
        return 0
    if padding != "same":
        if isinstance(padding, str):
            raise RuntimeError(f"conv2d: padding must be 'same', 'valid' or numbers, but got {padding!r}")
        (top, bottom), (left, right) = padding
        return top, left, bottom, right
    if pair(stride) != (1, 1):
        raise RuntimeError(f"conv2d: padding='same' is not supported for strided convolutions, but stride={stride}")
    total = [d * (k - 1) for d, k in zip(pair(dilation), kernel_size, strict=True)]
    before = [t // 2 for t in total]  # an odd one more goes below and to the right, as in torch
    return *before, total[0] - before[0], total[1] - before[1]
