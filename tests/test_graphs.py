"""Programs that look at programs: compile, export, functionalize, fx, fake and meta tensors, CUDA graphs.

One network has every module of cnnops.nn; what torch.nn's twin computes eagerly is what each form of ours must compute.
"""

import io

import pytest
import torch
from helpers import DEVICES, assert_equal, numbers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

every_device = pytest.mark.parametrize("device", DEVICES)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
on_a_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


class Everything(torch.nn.Module):
    """Every module once, and functions in place."""

    def __init__(self, nn, F):
        super().__init__()
        self.F = F
        self.stem = torch.nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.borders = torch.nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 2, padding="same", padding_mode="replicate", bias=False),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(8, 8, 3, padding=(1, 2), dilation=(1, 2), padding_mode="circular"),
            nn.Hardtanh(-2, 2),
        )
        self.down, self.up = nn.AvgPool2d(3, 2, 1), nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)
        self.head = torch.nn.Sequential(nn.LPPool2d(2, 2), nn.ReLU6(), nn.MaxPool2d(2, 1))
        self.parts = torch.nn.ModuleList([nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3)])
        self.classes = nn.Linear(2 * 8 * 3 * 3, 5)

    def forward(self, x):
        stem = self.stem(x)
        y, indices = self.pool(stem)
        y = self.unpool(self.borders(y), indices, output_size=stem.shape)
        y = self.up(self.down(stem + y), output_size=x.shape[-2:])
        y = self.head(self.F.leaky_relu(self.F.relu(y - 0.1, inplace=True) + x.mean(), inplace=True))
        return self.classes(torch.cat([part(y) for part in self.parts], -3).flatten(-3))


def twins(device="cpu", dtype=torch.float64):
    torch.manual_seed(4)
    ours, theirs = Everything(cnnops.nn, F), Everything(torch.nn, TF)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


def images(*shape, device="cpu", layout=torch.contiguous_format):
    return numbers(*shape).to(device).contiguous(memory_format=layout)


def gradients(model, parameters, x):
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *parameters])]


def assert_like_the_twin(program, ours, theirs, x, tolerance=1e-11):
    got = gradients(program, list(ours.parameters()), x)
    expected = gradients(theirs, list(theirs.parameters()), x)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_device
def test_the_network_has_every_module(device):
    ours, theirs = twins(device)
    exported = {m for m in vars(cnnops.nn).values() if isinstance(m, type) and m.__module__ == cnnops.nn.__name__}
    exported = {m for m in exported if hasattr(torch.nn, m.__name__)}  # the blocks: test_conv_block.py
    assert {type(m) for m in ours.modules()} | {cnnops.nn.LazyConv2d} >= exported
    assert_like_the_twin(ours, ours, theirs, images(2, 3, 14, 13, device=device))


# --- torch.compile ---


@every_layout
@every_device
def test_compile(device, layout):
    """One graph, forward and backward."""
    ours, theirs = twins(device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_like_the_twin(compiled, ours, theirs, images(2, 3, 14, 13, device=device, layout=layout))


@every_device
def test_compile_by_inductor(device):
    """The default backend, forward and backward."""
    ours, theirs = twins(device)
    assert_like_the_twin(torch.compile(ours, fullgraph=True), ours, theirs, images(2, 3, 14, 13, device=device))


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_compile_with_dynamic_shapes(how):
    """One compilation for every batch and image."""
    ours, theirs = twins()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=how == "dynamic=True" or None)
    counts = []
    for shape in (4, 3, 18, 17), (6, 3, 22, 21), (5, 3, 34, 19), (9, 3, 14, 33):
        x = images(*shape)
        if how == "mark_dynamic":
            for axis in 0, 2, 3:
                torch._dynamo.mark_dynamic(x, axis)
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-11, atol=1e-11)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


IN_PLACE = {
    "relu_": lambda F, x: F.relu_(x),
    "hardtanh_": lambda F, x: F.hardtanh_(x, -0.5, 0.5),
    "relu6": lambda F, x: F.relu6(x, inplace=True),
    "leaky_relu_": lambda F, x: F.leaky_relu_(x, 0.1),
    "a view": lambda F, x: F.relu_(x[:, 1:]).sum() + x,
}
in_place = pytest.mark.parametrize("name", IN_PLACE)


@in_place
@pytest.mark.parametrize("of_the_callers", [False, True])
def test_compile_in_place(name, of_the_callers):
    """What is written over may be the caller's; what it held before may be needed for a gradient."""
    results = []
    for F_, prepare in (TF, lambda f: f), (F, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):

        def function(x, F_=F_):
            y = x if of_the_callers else x.sin()
            return IN_PLACE[name](F_, y) * y

        leaf = numbers(2, 3, 4).requires_grad_()
        x = leaf * 2
        y = prepare(function)(x)
        results.append([y, x, torch.autograd.grad(y.sum(), leaf)[0]])
    torch.testing.assert_close(*results)


@in_place
def test_functionalize(name):
    """A graph in which nothing is written over, with the same numbers; so AOTAutograd sees our operators."""

    def function(x):
        return IN_PLACE[name](F, x.sin())

    x = numbers(2, 3, 4)
    graph = make_fx(functionalize(function))(x)
    targets = [str(node.target) for node in graph.graph.nodes if "cnnops" in str(node.target)]
    assert targets and not any("_." in target for target in targets)
    assert_equal(graph(x), function(x))


def test_symbols_of_sizes():
    """A graph recorded with sizes as symbols runs with other sizes; a forward and its backward are one graph."""
    ours, _ = twins()

    def step(x):
        y = ours.up(F.max_pool2d(ours.stem(x), 2), output_size=x.shape[-2:])
        return torch.autograd.grad(F.adaptive_avg_pool2d(y, 2).pow(2).sum(), list(ours.parameters())[:2])

    graph = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(images(2, 3, 6, 8))
    for shape in (2, 3, 6, 8), (5, 3, 10, 12):
        torch.testing.assert_close(graph(images(*shape)), step(images(*shape)))


@pytest.mark.parametrize("algorithm", ["auto", *cnnops.ops.algorithms()])
def test_graphs_keep_the_algorithm(algorithm):
    """Also one that would refuse these tensors: that is said where it runs."""
    graph = make_fx(lambda x, w: F.conv2d(x, w, algorithm=algorithm), tracing_mode="fake")(
        torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3)
    )
    (call,) = (node for node in graph.graph.nodes if node.target is cnnops.ops.conv2d)
    assert dict(enumerate(call.args)).get(8, "auto") == algorithm


# --- torch.export, torch.fx, torch.jit ---


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """With a batch of any size; saved, loaded, and decomposed."""
    ours, _ = twins()
    ours.eval()
    program = torch.export.export(
        ours, (images(3, 3, 14, 13),), dynamic_shapes=({0: Dim("batch", min=2, max=99)},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for form in program, torch.export.load(file), program.run_decompositions():
        targets = " ".join(str(node.target) for node in form.graph.nodes)
        assert targets.count("cnnops.conv2d.default") == 5 and "aten.convolution" not in targets
        for n in 3, 7:
            assert_equal(form.module()(images(n, 3, 14, 13)).detach(), ours(images(n, 3, 14, 13)).detach())


CALLS = {
    "conv2d": lambda F, x: F.conv2d(x, numbers(4, 3, 3, 3), stride=2),
    "conv2d, mode": lambda F, x: cnnops.functional.conv2d(
        x, numbers(4, 3, 3, 3), padding=1, padding_mode="replicate", algorithm="reference"),
    "conv2d, same": lambda F, x: F.conv2d(x, numbers(4, 3, 3, 3), padding="same"),
    "conv_transpose2d": lambda F, x: F.conv_transpose2d(x, numbers(3, 4, 3, 3), stride=2),
    "max_pool2d": lambda F, x: F.max_pool2d(x, 2),
    "max_unpool2d": lambda F, x: F.max_unpool2d(*pair(F.max_pool2d(x, 2, return_indices=True)), 2),
    "avg_pool2d": lambda F, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive_avg_pool2d": lambda F, x: F.adaptive_avg_pool2d(x, (2, None)),
    "adaptive_max_pool2d": lambda F, x: F.adaptive_max_pool2d(x, 2),
    "lp_pool2d": lambda F, x: F.lp_pool2d(x, 2.0, 2),
    "relu": lambda F, x: F.relu(x),
    "relu_": lambda F, x: F.relu_(x * 1),
    "relu6": lambda F, x: F.relu6(x),
    "hardtanh": lambda F, x: F.hardtanh(x, min_val=-0.5),
    "leaky_relu": lambda F, x: F.leaky_relu(x, 0.1),
    "prelu": lambda F, x: F.prelu(x, numbers(3)),
}  # fmt: skip
every_call = pytest.mark.parametrize("name", CALLS)


def pair(results):
    return results[0], results[1]


@every_call
def test_symbolic_trace(name):
    """torch.fx records the functions of cnnops.functional by name, and the graph computes the same."""

    def function(x):
        return CALLS[name](F, x)

    traced = torch.fx.symbolic_trace(function)
    recorded = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert any(target.__module__ == "cnnops.functional" for target in recorded if hasattr(target, "__module__"))
    x = images(2, 3, 8, 8)
    assert_equal(traced(x), function(x))
    assert_equal(torch.fx.symbolic_trace(traced)(x), function(x))


class OurLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return module.__module__ == "cnnops.nn" or super().is_leaf_module(module, name)


def test_symbolic_trace_of_modules():
    """fx looks into our modules, which are not torch.nn's; a tracer may take them as leaves, as it takes torch.nn's."""
    ours, theirs = twins()
    x = images(2, 3, 14, 13)
    graph = torch.fx.GraphModule(ours, OurLeaves().trace(ours))
    assert {"stem.0", "unpool", "up"} <= {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert_like_the_twin(graph, ours, theirs, x)
    body, twin = torch.nn.Sequential(ours.stem, ours.borders, ours.down, ours.head), theirs
    twin = torch.nn.Sequential(twin.stem, twin.borders, twin.down, twin.head)
    traced = torch.fx.symbolic_trace(body)
    assert not any(node.op == "call_module" for node in traced.graph.nodes)
    assert_like_the_twin(traced, body, twin, x)


class Seen(torch.Tensor):
    """A subclass that notes the functions called with it, and counts on getting itself back."""

    names = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(f"{getattr(function, '__module__', '')}.{function.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


@every_call
def test_torch_function(name):
    """A subclass of Tensor sees our functions as it sees torch's."""
    Seen.names.clear()
    x = images(2, 3, 8, 8)
    y = CALLS[name](F, x.as_subclass(Seen))
    assert type(y) is Seen and any(name.startswith("cnnops.functional.") for name in Seen.names)
    assert_equal(y.as_subclass(torch.Tensor), CALLS[name](F, x))


deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@deprecated
def test_jit_trace():
    """A graph of our operators, also saved and loaded."""
    ours, _ = twins()
    up = cnnops.nn.ConvTranspose2d(3, 3, 2, dtype=torch.float64)
    model = torch.nn.Sequential(up, ours.stem, ours.borders, ours.down, ours.head)
    x = images(2, 3, 14, 13)
    traced = torch.jit.trace(model, x)
    assert "cnnops::conv2d" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for form in traced, torch.jit.load(file):
        assert_equal(form(x.flip(0)).detach(), model(x.flip(0)).detach())


def compiled_autograd():
    w = torch.randn(2, 2, 3, 3, requires_grad=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        F.conv2d(torch.randn(1, 2, 4, 4), w).sum().backward()


REFUSED = {
    "torch.jit.script": lambda: torch.jit.script(cnnops.nn.Conv2d(2, 2, 3)),
    "torch.jit.trace": lambda: torch.jit.trace(
        cnnops.nn.MaxUnpool2d(2), (torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long))
    ),
    "compiled autograd": compiled_autograd,
    "complex": lambda: F.conv2d(torch.ones(1, 1, 3, 3, dtype=torch.cfloat), torch.ones(1, 1, 2, 2, dtype=torch.cfloat)),
    "integers": lambda: F.conv2d(torch.ones(1, 1, 3, 3, dtype=torch.long), torch.ones(1, 1, 2, 2, dtype=torch.long)),
    "sparse": lambda: F.relu(torch.eye(3).to_sparse()),
    "nested": lambda: F.relu(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)),
    "quantized": lambda: F.relu(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
}


@deprecated
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_has_and_we_have_not(name):
    """An error, never a wrong number."""
    with pytest.raises((RuntimeError, ValueError, torch.jit.frontend.NotSupportedError)):
        REFUSED[name]()


# --- fake and meta tensors ---

SHAPES = {
    "Conv2d": [((4, 6, 3), {"stride": (2, 1), "padding": 1}), ((4, 6, 3), {"groups": 2, "padding": "same"})],
    "ConvTranspose2d": [((4, 6, 3), {"stride": 2, "output_padding": 1})],
    "MaxPool2d": [((3, 2, 1), {"ceil_mode": True}), ((2,), {"return_indices": True})],
    "AvgPool2d": [((3, 2, 1), {"ceil_mode": True}), ((2,), {"divisor_override": 3})],
    "AdaptiveAvgPool2d": [((2,), {}), (((3, None),), {}), ((1,), {})],
    "AdaptiveMaxPool2d": [((2,), {}), (((3, 5),), {"return_indices": True})],
    "LPPool2d": [((2, 2), {})],
    "ReLU": [((), {}), ((True,), {})],
    "Hardtanh": [((), {})],
    "ReLU6": [((), {})],
    "LeakyReLU": [((), {})],
    "PReLU": [((4,), {})],
}
SHAPES["Conv2d"] += [((4, 6, 3), {"padding": 2, "padding_mode": m}) for m in ("reflect", "replicate", "circular")]
every_shape = pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(name, *row) for name, rows in SHAPES.items() for row in rows],
    ids=[f"{name}-{i}" for name, rows in SHAPES.items() for i in range(len(rows))],
)


def results_and_gradients(module, x):
    """What shows of them without numbers."""
    x.requires_grad_()
    y = module(x * 1)
    y = y if isinstance(y, tuple) else (y,)
    tensors = [*y, *torch.autograd.grad(y[0].sum(), [x, *module.parameters()])]
    return [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors]


@every_shape
@every_device
def test_fake_and_meta_tensors(name, args, kwargs, device):
    """Their shapes, strides and dtypes are the real ones, for every layout and without a batch; and torch.nn's are."""
    ours, theirs = (getattr(library, name)(*args, **kwargs).to(device) for library in (cnnops.nn, torch.nn))
    image = torch.randn(3, 4, 7, 8, device=device)
    inputs = [image, image.contiguous(memory_format=torch.channels_last), image.transpose(2, 3), image[..., ::2]]
    inputs.append(image[:, :, 0, 0] if name == "PReLU" else image[0])
    for x in inputs:
        real = results_and_gradients(ours, x.detach())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = results_and_gradients(ours, mode.from_tensor(x.detach()))
        meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        like_theirs = results_and_gradients(theirs, x.detach())
        assert fake == real
        assert results_and_gradients(getattr(cnnops.nn, name)(*args, **kwargs, **on_meta(ours)), meta) == real
        assert [(shape, dtype) for shape, _, dtype, _ in real] == [(s, dtype) for s, _, dtype, _ in like_theirs]


def on_meta(module):
    return {"device": "meta"} if list(module.parameters()) else {}


def test_without_memory_first():
    """Made on the meta device, given memory and then numbers; or made with no initial values at all."""
    model, _ = twins()
    x = images(2, 3, 14, 13)
    with torch.device("meta"):
        empty = Everything(cnnops.nn, F).double()
    assert empty(x.to("meta")).shape == model(x).shape
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_equal(empty(x), model(x))
    with torch.device("meta"):
        assigned = Everything(cnnops.nn, F)
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert_equal(assigned(x), model(x))
    bare = torch.nn.utils.skip_init(cnnops.nn.Conv2d, 3, 8, 3, padding=1, dtype=torch.float64)
    bare.load_state_dict(model.stem[0].state_dict())
    assert type(bare) is cnnops.nn.Conv2d
    assert_equal(bare(x), model.stem[0](x))


# --- a GPU's own ways of running ---


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_streams_and_graphs(graph):
    """On a stream of its own, or captured there with its backward and replayed with other numbers."""
    ours, theirs = twins("cuda")
    parameters = list(ours.parameters())
    x = images(2, 3, 14, 13, device="cuda").requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        y = ours(x)
        return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *parameters])]

    with torch.cuda.stream(stream):
        for _ in range(3):
            got = step()
    torch.cuda.current_stream().wait_stream(stream)
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            got = step()
        x.data.neg_()
        recorded.replay()
    torch.cuda.synchronize()
    expected = gradients(theirs, list(theirs.parameters()), x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@on_a_gpu
def test_compile_with_graphs():
    """mode="reduce-overhead" records what inductor made as a CUDA graph."""
    ours, theirs = twins("cuda")
    compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_like_the_twin(compiled, ours, theirs, images(2, 3, 14, 13, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    """The kernels run where their tensors are."""
    ours, theirs = twins("cuda:1")
    with torch.cuda.device(0):
        assert_like_the_twin(ours, ours, theirs, images(2, 3, 14, 13, device="cuda:1"))
