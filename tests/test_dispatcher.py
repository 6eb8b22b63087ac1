"""What torch asks of an operator: schemas that hold, fake tensors with the real strides, compile, export, autograd."""

import copy
import gc
import threading

import pytest
import torch
from helpers import DEVICES, assert_equal, numbers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

ops = torch.ops.cnnops
every_device = pytest.mark.parametrize("device", DEVICES)

CONV = ((2, 1), (1, 0), (1, 2), 2, "zeros")
WINDOW = ((3, 2), (2, 2), (1, 1), (1, 1), True)
WIDE_WINDOW = ((17, 18), (1, 1), (8, 9), (1, 1), False)  # more places than a byte counts
AVERAGE = ((3, 2), (2, 2), (1, 1), True, False, None)


def samples(device="cpu"):
    """For each operator, arguments that it takes: floating-point tensors are differentiated by."""

    def draw(*shape):
        return numbers(*shape).to(device)

    x, w, b = draw(2, 4, 7, 8), draw(6, 2, 3, 3), draw(6)
    gy = draw(2, 6, 4, 4)
    y, positions = ops.max_pool2d(x, *WINDOW)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    adaptive_positions = ops.adaptive_max_pool2d(x, (3, 5))[1]
    indices = F.max_pool2d(x, *WINDOW, return_indices=True)[1]
    return {
        "conv2d": [
            (x, w, b, *CONV, "auto"),
            (x, w, None, *CONV, "reference"),
            (channels_last, w, b, *CONV, "auto"),
            (x[:0], w, b, *CONV, "auto"),
        ],
        "conv2d_grad_input": [(gy, w, draw(4), (7, 8), *CONV, "auto"), (gy[:0], w, None, (7, 8), *CONV, "auto")],
        "conv2d_grad_weight": [(gy, x, (3, 3), *CONV, "auto"), (gy, channels_last, (3, 3), *CONV, "auto")],
        "conv_transpose2d": [(gy, w, draw(4), 2, 1, (1, 0), 2), (gy, w, None, (1, 2), 0, (0, 0), 2, (2, 1))],
        "conv_relu_max_pool2d": [
            (x, w, b, *CONV, "relu6", 0.1, *WINDOW, "auto"),
            (channels_last, w, None, *CONV, "leaky_relu", 0.1, (), (), 0, 1, False, "reference"),
        ],
        "relu_max_pool2d_backward": [
            (draw(*y.shape), y, positions, (7, 8), *WINDOW, "leaky_relu", 0.1),
            (draw(2, 4, 3, 4), *ops.max_pool2d(channels_last, 2), (7, 8), 2),
        ],
        "channel_sum": [(x,), (channels_last,), (draw(3, 2),), (draw(0, 2, 3),)],
        "max_pool2d": [(x, *WINDOW), (channels_last, *WINDOW), (x[:0], *WINDOW), (x, *WIDE_WINDOW)],
        "max_pool2d_backward": [(draw(*y.shape), positions, (7, 8), *WINDOW)],
        "max_pool2d_gather": [(x, positions, *WINDOW), (channels_last, positions, *WINDOW)],
        "adaptive_max_pool2d": [(x, (3, 2)), (channels_last, (3, 2)), (x, (7, 4)), (x[:0], (3, 2)), (x, (0, 2))],
        "adaptive_max_pool2d_backward": [(draw(2, 4, 3, 5), adaptive_positions, (7, 8))],
        "adaptive_max_pool2d_gather": [(x, adaptive_positions), (channels_last, adaptive_positions)],
        "max_unpool2d": [(y, indices, (7, 8)), (y[:0], indices[:0], (7, 8))],
        "avg_pool2d": [(x, *AVERAGE), (channels_last, *AVERAGE), (x, *AVERAGE[:-1], 3), (x[:0], *AVERAGE)],
        "avg_pool2d_backward": [(draw(*y.shape), (7, 8), *AVERAGE), (draw(*y.shape), (7, 8), *AVERAGE[:-1], 3)],
        "adaptive_avg_pool2d": [(x, (3, 2)), (channels_last, (3, 2)), (x, (1, 1)), (x[:0], (3, 2)), (x, (2, 0))],
        "adaptive_avg_pool2d_backward": [(draw(2, 4, 3, 2), (7, 8)), (draw(2, 4, 7, 1), (7, 8))],
        "relu": [(x,), (channels_last,), (x[..., ::2],), (draw(),), (x[:0],)],
        "relu_backward": [(draw(*x.shape), x.relu()), (draw(*x.shape), channels_last.relu())],
        "relu_": [(x,), (channels_last,)],
        "hardtanh": [(x, -0.5, 1.0), (channels_last, 0.0, 6.0), (x[:0], -1.0, 1.0)],
        "hardtanh_": [(x, -0.5, 1.0)],
        "hardtanh_backward": [(draw(*x.shape), x.clamp(-0.5, 1.0), -0.5, 1.0)],
        "leaky_relu": [(x, 0.1), (x, -0.5), (channels_last, 0.1)],
        "leaky_relu_": [(x, 0.1)],
        "leaky_relu_backward": [(draw(*x.shape), x, 0.1), (draw(*x.shape), channels_last, 0.1)],
        "prelu": [(x, draw(4)), (x, draw(1)), (channels_last, draw(4))],
        "prelu_backward": [(draw(*x.shape), x, draw(4)), (draw(*x.shape), x, draw(1))],
    }  # fmt: skip


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("cnnops::").split(".")[0] for name in names if name.startswith("cnnops::"))


EVERY_SAMPLE = [(name, i) for name, arguments in samples().items() for i in range(len(arguments))]
every_sample = pytest.mark.parametrize(("name", "i"), EVERY_SAMPLE)


def test_every_operator_has_samples():
    """A new operator cannot go without the tests of this file."""
    assert registered() == sorted(samples())


def with_gradients(arguments):
    return tuple(
        a.clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in arguments
    )


@every_sample
@every_device
def test_opcheck(name, i, device):
    """Schema, autograd registration, fake tensors, AOT dispatch with static and dynamic shapes."""
    arguments = samples(device)[name][i]
    opcheck(getattr(ops, name).default, arguments)
    if not name.endswith("_"):  # a leaf must not be written over
        opcheck(getattr(ops, name).default, with_gradients(arguments))


@every_sample
@every_device
def test_fake_tensors_have_the_real_strides(name, i, device):
    """Inductor believes the strides that the fake kernel promises; a wrong one is memory read in the wrong order."""
    arguments = samples(device)[name][i]
    operator = getattr(ops, name)
    views = [arguments]
    for position, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and argument.dim() == 4:
            for other in (
                argument.contiguous(memory_format=torch.channels_last),
                argument.transpose(2, 3).contiguous().transpose(2, 3),
                argument[:1].expand_as(argument) if len(argument) and not name.endswith("_") else argument,
            ):
                views.append((*arguments[:position], other, *arguments[position + 1 :]))
    for view in views:
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in view))
        real = operator(*view)
        meta = operator(*(as_meta(a) if isinstance(a, torch.Tensor) else a for a in view))
        for f, m, r in zip(*(t if isinstance(t, tuple | list) else [t] for t in (fake, meta, real)), strict=True):
            assert (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)
            assert (m.shape, m.stride(), m.dtype) == (r.shape, r.stride(), r.dtype)


def as_meta(t):
    """With the strides as they are; to("meta") would change an expanded tensor's."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# --- torch.compile and torch.export ---


class Net(torch.nn.Module):
    """Every operator once."""

    def __init__(self, nn, dtype=torch.float64):
        super().__init__()
        self.body = torch.nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding="same", groups=4),
            nn.LeakyReLU(0.1),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(8, 6, 2, stride=2, bias=False),
            nn.PReLU(6),
        ).to(dtype)

    def forward(self, x):
        return self.body(x).flatten(1)


def twins(device, dtype=torch.float64):
    ours, theirs = Net(cnnops.nn, dtype), Net(torch.nn, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def gradients(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *net.parameters()])]


def assert_all_close(got, expected, tolerance):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_device
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compile(device, memory_format, fresh_dynamo):
    """One graph without breaks, forward and backward, with the eager numbers."""
    ours, theirs = twins(device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = numbers(3, 3, 14, 12).to(device).contiguous(memory_format=memory_format)
    expected = gradients(theirs, x)
    assert_all_close(gradients(ours, x), expected, 1e-12)
    assert_all_close(gradients(compiled, x), expected, 1e-12)


@every_device
def test_compile_with_dynamic_shapes(device, fresh_dynamo):
    """Batch and image may change without another compilation: the sizes stay symbols through every fake kernel."""
    ours, theirs = twins(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for shape in (4, 3, 24, 26), (7, 3, 24, 26), (2, 3, 30, 21), (5, 3, 33, 36):
        x = numbers(*shape).to(device)
        assert_all_close(gradients(compiled, x), gradients(theirs, x), 1e-12)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


@every_device
def test_compile_with_inductor(device, fresh_dynamo):
    """The default backend generates code around our operators."""
    conv = cnnops.nn.Conv2d(2, 3, 3).to(device)
    x = torch.randn(2, 2, 6, 6, device=device)

    def function(x):
        return F.max_pool2d(conv(x * 2), 2) + 1

    assert_all_close([torch.compile(function, fullgraph=True)(x)], [function(x)], 1e-6)


def test_export():
    """An exported program holds our operators by name and computes the same, also for another batch."""
    ours, _ = twins("cpu")
    inputs = numbers(4, 3, 14, 12), numbers(9, 3, 14, 12)
    program = torch.export.export(ours, inputs[:1], dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"cnnops.conv2d.default", "cnnops.max_pool2d.default", "cnnops.avg_pool2d.default"} <= targets
    for x in inputs:
        assert_equal(program.module()(x).detach(), ours(x).detach())


def test_under_fake_tensors_nothing_is_computed():
    """A network far too large for any memory can be walked through."""
    net = Net(cnnops.nn, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(512, 3, 20_000, 20_000, requires_grad=True)
        y = net(x)
        y.sum().backward()
        assert y.shape == (512, 6 * 2500**2)
        assert x.grad.shape == x.shape


# --- autograd ---


def test_modes_without_gradients():
    x, w = numbers(2, 3, 6, 6).requires_grad_(), numbers(4, 3, 3, 3).requires_grad_()
    expected = TF.conv2d(x, w).detach()
    with torch.no_grad():
        y = F.relu(F.conv2d(x, w))
        assert not y.requires_grad and y.grad_fn is None
    with torch.inference_mode():
        y = F.max_pool2d(F.conv2d(x, w), 2)
        assert y.is_inference()
    assert not F.conv2d(x.detach(), w.detach()).requires_grad
    torch.testing.assert_close(F.conv2d(x, w).detach(), expected)


FORWARDS = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(4, 3, 3, 3, dtype=x.dtype, requires_grad=True)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "leaky_relu": F.leaky_relu,
    "leaky_relu in place": lambda x: F.leaky_relu(x * 1, inplace=True),
    "prelu": lambda x: F.prelu(x, torch.ones(3, dtype=x.dtype, requires_grad=True)),
}
every_forward = pytest.mark.parametrize("name", FORWARDS)
every_forward_that_keeps = pytest.mark.parametrize("name", [name for name in FORWARDS if name != "avg_pool2d"])
every_operator = pytest.mark.parametrize("name", [name for name in FORWARDS if "in place" not in name])


@every_forward_that_keeps
def test_a_second_backward_is_refused(name):
    """After a backward what was kept is gone; with retain_graph it is not, and gives the same."""
    x = numbers(2, 3, 6, 6).requires_grad_()
    y = FORWARDS[name](x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert_equal(torch.autograd.grad(y, x)[0], first[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


@every_forward
def test_what_is_dropped_is_freed(name):
    """No reference cycle keeps a forward's tensors alive, with and without a backward."""
    gc.collect()
    gc.disable()
    try:
        for backward in False, True:
            x = numbers(2, 3, 6, 6).requires_grad_()
            y = FORWARDS[name](x)
            storages = [StorageWeakRef(t.untyped_storage()) for t in (x, y)]
            if backward:
                y.sum().backward()
            del x, y
            assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


def test_memory_does_not_grow():
    """The weak references above see Python's side; a cycle among C++ nodes shows only in the process's memory."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    x = torch.randn(8, 3, 64, 64, requires_grad=True)
    for i in range(60):
        for function in FORWARDS.values():
            function(x).sum()  # never differentiated
        if i == 9:
            before = resident()
    assert resident() - before < 20 * x.nbytes, "graphs that were dropped are still there"


@every_forward_that_keeps
def test_saved_tensors_are_guarded(name):
    """An input or output that is needed for the gradient and overwritten before it is an error, not a wrong number."""
    leaf = numbers(2, 3, 6, 6).requires_grad_()
    x = leaf * 1
    y = FORWARDS[name](x)
    z = y * 1
    expected = torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0]
    with torch.no_grad():
        x.fill_(-1)
        if "in place" not in name:
            y.fill_(-1)
    try:
        got = torch.autograd.grad(z.sum(), leaf)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_equal(got, expected)


def test_saved_tensor_hooks():
    """Offloading and checkpointing pack what is kept."""
    x = numbers(2, 3, 14, 12)
    ours, theirs = twins("cpu")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        got = gradients(ours, x)
    assert packed
    assert_all_close(got, gradients(theirs, x), 1e-12)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)

    y = checkpointed(x.requires_grad_())
    assert_all_close(torch.autograd.grad(y.pow(2).sum(), list(ours.parameters())), got[2:], 1e-12)


def test_a_deep_graph():
    """Dropping a chain of 50,000 steps must not recurse 50,000 deep."""
    x = torch.ones(1, requires_grad=True)
    y = x
    for _ in range(50_000):
        y = F.leaky_relu(y)
    y.backward(retain_graph=True)
    assert x.grad.item() == 1
    del y


def test_hooks_and_retained_gradients():
    x = numbers(2, 3, 6, 6).requires_grad_()
    seen = []
    y = F.relu(x)
    y.retain_grad()
    y.register_hook(seen.append)
    z = F.avg_pool2d(y, 2)
    z.sum().backward()
    assert_equal(y.grad, seen[0])
    assert_equal(y.grad, torch.full_like(y, 0.25).detach())
    assert "cnnops" in y.grad_fn.name().lower() or "relu" in y.grad_fn.name().lower()


def test_an_output_without_a_gradient():
    """Of max_pool2d's two outputs the positions never have one; a gradient that nobody sends is no crash."""
    x = numbers(2, 3, 6, 6).requires_grad_()
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    assert y.requires_grad and not indices.requires_grad
    values, positions = ops.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False)
    assert values.requires_grad and not positions.requires_grad
    with pytest.raises(RuntimeError):
        positions.float().sum().backward()


def test_many_threads_at_once():
    """Calls from several Python threads do not share scratch memory."""
    net, _ = twins("cpu")
    inputs = [numbers(3, 3, 14, 12, seed=i) for i in range(8)]
    expected = [gradients(net, x) for x in inputs]
    results = [None] * len(inputs)

    def work(i):
        for _ in range(10):
            results[i] = gradients(net, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        for g, w in zip(got, wanted, strict=True):
            assert_equal(g, w)


def test_modules_copy_with_their_graphs():
    """copy.deepcopy of a network that has just run."""
    ours, _ = twins("cpu")
    x = numbers(2, 3, 14, 12)
    expected = gradients(ours, x)
    assert_all_close(gradients(copy.deepcopy(ours), x), expected, 0)
