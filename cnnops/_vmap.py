"""What torch.func.vmap does with our operators.

vmap runs a function over one more axis of some of its tensors. A rule says how one call of an operator does all of it:
that axis is folded into the batch where nothing but the batch differs, or into the channels, as further groups, where
every element has weights of its own. Rules call operators again, so they nest, and they are differentiable.

Source: Horace He and Richard Zou, functorch: JAX-like composable function transforms for PyTorch, 2021.
"""

from torch import Tensor, uint8
from torch.library import register_vmap

from cnnops import ops


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap's axis first; expanded over a tensor that has none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(t: Tensor, dim: int | None, size: int, into: int) -> Tensor:
    """vmap's axis (B) folded into axis `into` of each element: (..., B*size, ...)."""
    return _front(t, dim, size).movedim(0, into).flatten(into, into + 1)


def _unfold(t: Tensor, size: int, axis: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size))


def _rule(operator):
    """Registers a function (size of vmap's axis, the axis in each argument or None, *arguments) -> (results, axes)."""

    defaults = [argument.default_value for argument in operator._schema.arguments]

    def register(rule):
        def complete(info, dims, *args):  # torch leaves out what equals the default
            missing = defaults[len(args) :]
            return rule(info.batch_size, (*dims, *(None for _ in missing)), *args, *missing)

        register_vmap(operator, complete)
        return rule

    return register


# --- convolution ---


@_rule(ops.conv2d)
def _conv2d(size, dims, x, w, b, stride, padding, dilation, groups, *rest):
    if x.dim() - (dims[0] is not None) == 3:  # an image without a batch is a batch of one
        x = x.unsqueeze(0) if dims[0] is None else x.movedim(dims[0], 0).unsqueeze(1)
        dims = (None if dims[0] is None else 0, *dims[1:])
        y, axis = _conv2d(size, dims, x, w, b, stride, padding, dilation, groups, *rest)
        return y.movedim(axis, 0).squeeze(1), 0
    settings = (stride, padding, dilation)
    return _bilinear(size, dims, x, w, b, groups, lambda x, w, b, g: ops.conv2d(x, w, b, *settings, g, *rest), 0)


@_rule(ops.conv2d_grad_input)
def _conv2d_grad_input(size, dims, gy, w, b, input_size, stride, padding, dilation, groups, *rest):
    settings = (input_size, stride, padding, dilation)
    dims = dims[:3]
    return _bilinear(
        size, dims, gy, w, b, groups, lambda gy, w, b, g: ops.conv2d_grad_input(gy, w, b, *settings, g, *rest), 1
    )


def _bilinear(size, dims, x, w, b, groups, run, produced):
    """A convolution or its transpose; `produced` is the axis of the weight along which its results lie."""
    dx, dw, db = dims[:3]
    if dw is None and db is None:
        return _unfold(run(_fold(x, dx, size, 0), w, b, groups), size, 0), 0
    if dw is None:  # an element's own bias is added afterwards
        y = run(x, w, None, groups) if dx is None else _unfold(run(_fold(x, dx, size, 0), w, None, groups), size, 0)
        return y + b.movedim(db, 0)[:, None, :, None, None], 0
    b = None if b is None else _fold(b, db, size, 0)
    if dx is None and groups == 1:
        return _unfold(run(x, _fold(w, dw, size, produced), b, 1), size, 1), 1
    return _unfold(run(_fold(x, dx, size, 1), _fold(w, dw, size, 0), b, size * groups), size, 1), 1


@_rule(ops.conv2d_grad_weight)
def _conv2d_grad_weight(size, dims, gy, x, kernel_size, stride, padding, dilation, groups, *rest):
    def run(gy, x, groups):
        return ops.conv2d_grad_weight(gy, x, kernel_size, stride, padding, dilation, groups, *rest)

    if groups == 1 and dims[1] is None:
        return _unfold(run(_fold(gy, dims[0], size, 1), x, 1), size, 0), 0
    if groups == 1 and dims[0] is None:
        return _unfold(run(gy, _fold(x, dims[1], size, 1), 1), size, 1), 1
    return _unfold(run(_fold(gy, dims[0], size, 1), _fold(x, dims[1], size, 1), size * groups), size, 0), 0


@_rule(ops.channel_sum)
def _channel_sum(size, dims, x):
    return _unfold(ops.channel_sum(_fold(x, dims[0], size, 1)), size, 0), 0


@_rule(ops.conv_relu_max_pool2d)
def _conv_relu_max_pool2d(size, dims, x, w, b, *rest):
    if x.dim() - (dims[0] is not None) == 3:  # an image without a batch is a batch of one
        x, dims = _front(x, dims[0], size).unsqueeze(1), (0, *dims[1:])
        results, axes = _conv_relu_max_pool2d(size, dims, x, w, b, *rest)
        return tuple(t if axis is None else t.squeeze(1) for t, axis in zip(results, axes, strict=True)), axes
    *convolution, activation, slope, kernel_size, stride, padding, dilation, ceil_mode, algorithm = rest
    pooled = len(kernel_size) > 0
    if dims[1] is None and dims[2] is None:
        y, positions = ops.conv_relu_max_pool2d(_fold(x, dims[0], size, 0), w, b, *rest)
    else:  # an element's own weights: as a chain, whose convolution knows what to do
        y, axis = _conv2d(size, dims, x, w, b, *convolution, algorithm)
        y = _fold(y, axis, size, 0)
        y = {
            "none": lambda: y,
            "relu": lambda: ops.relu(y),
            "relu6": lambda: ops.hardtanh(y, 0.0, 6.0),
            "leaky_relu": lambda: ops.leaky_relu(y, slope),
        }[activation]()
        if pooled:
            y, positions = ops.max_pool2d(y, kernel_size, stride, padding, dilation, ceil_mode)
        else:
            positions = y.new_empty(0, dtype=uint8)
    return (_unfold(y, size, 0), _unfold(positions, size, 0) if pooled else positions), (0, 0 if pooled else None)


# --- pooling: planes are independent ---


def _pooling_rule(operator, tensors):
    """All of the operator's first `tensors` arguments have a batch to fold into, and so have its results."""

    @_rule(operator)
    def rule(size, dims, *args):
        fronts = [_front(t, dim, size) for t, dim in zip(args[:tensors], dims, strict=False)]
        if fronts[0].dim() == 4:  # images without a batch: vmap's axis is one
            return operator(*fronts, *args[tensors:]), _axes(operator)
        results = operator(*(t.flatten(0, 1) for t in fronts), *args[tensors:])
        if isinstance(results, tuple):
            return tuple(_unfold(t, size, 0) for t in results), _axes(operator)
        return _unfold(results, size, 0), 0


def _axes(operator):
    return (0, 0) if len(operator._schema.returns) == 2 else 0


for operator, tensors in [
    (ops.relu_max_pool2d_backward, 3),
    (ops.max_pool2d, 1),
    (ops.max_pool2d_backward, 2),
    (ops.max_pool2d_gather, 2),
    (ops.adaptive_max_pool2d, 1),
    (ops.adaptive_max_pool2d_backward, 2),
    (ops.adaptive_max_pool2d_gather, 2),
    (ops.max_unpool2d, 2),
    (ops.avg_pool2d, 1),
    (ops.avg_pool2d_backward, 1),
    (ops.adaptive_avg_pool2d, 1),
    (ops.adaptive_avg_pool2d_backward, 1),
]:
    _pooling_rule(operator, tensors)


# --- activations: elements are independent ---


def _elementwise_rule(operator, tensors):
    @_rule(operator)
    def rule(size, dims, *args):
        if tensors == 1:
            return operator(*args), dims[0]
        fronts = [_front(t, dim, size) for t, dim in zip(args[:tensors], dims, strict=False)]
        return operator(*fronts, *args[tensors:]), 0


for name in "relu", "hardtanh", "leaky_relu":
    _elementwise_rule(getattr(ops, name), 1)
    _elementwise_rule(getattr(ops, name + "_"), 1)
    _elementwise_rule(getattr(ops, name + "_backward"), 2)


def _with_channels(t: Tensor, dim, size, dims_of_element) -> Tensor:
    """(N, B*C, ...), where an element of fewer dimensions counts as N numbers of one channel."""
    t = _front(t, dim, size)
    if dims_of_element < 2:
        t = t.reshape(size, -1, 1)
    return t.movedim(0, 1).flatten(1, 2)


def _without(t: Tensor, size, shape) -> Tensor:
    return _unfold(t, size, 1).movedim(1, 0).reshape(size, *shape)


def _slopes(w: Tensor, dim, size, channels) -> Tensor:
    """(B*C): every element's slope for every channel."""
    return _front(w, dim, size).reshape(size, -1).expand(size, channels).reshape(-1)


def _shape(t: Tensor, dim):
    return t.shape if dim is None else t.movedim(dim, 0).shape[1:]


@_rule(ops.prelu)
def _prelu(size, dims, x, w):
    shape = _shape(x, dims[0])
    channels = shape[1] if len(shape) > 1 else 1
    folded = _with_channels(x, dims[0], size, len(shape))
    return _without(ops.prelu(folded, _slopes(w, dims[1], size, channels)), size, shape), 0


@_rule(ops.prelu_backward)
def _prelu_backward(size, dims, gy, x, w):
    shape = _shape(x, dims[1])
    channels = shape[1] if len(shape) > 1 else 1
    folded = [_with_channels(t, dim, size, len(shape)) for t, dim in zip((gy, x), dims, strict=False)]
    gx, gw = ops.prelu_backward(*folded, _slopes(w, dims[2], size, channels))
    gw, weights = gw.view(size, channels), _shape(w, dims[2])
    if weights.numel() == 1 and channels > 1:
        gw = ops.channel_sum(gw.t())  # of shape (C, B)
    return (_without(gx, size, shape), gw.reshape(size, *weights)), (0, 0)
