"""What training does to a model: lower precision, several processes, copies, hooks, other weights in the same place.

Each is done to our network and to torch.nn's, side by side.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICES, assert_equal, numbers
from torch import nn as tnn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as TF
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cnnops import functional as F
from cnnops import nn

every_device = pytest.mark.parametrize("device", DEVICES)
LOWER = [torch.bfloat16, torch.float16]
every_lower = pytest.mark.parametrize("lower", LOWER, ids=["bfloat16", "float16"])


def network(library, device="cpu", dtype=torch.float32):
    torch.manual_seed(2)
    return tnn.Sequential(
        library.Conv2d(2, 8, 3, padding=1), library.ReLU(inplace=True), library.MaxPool2d(2),
        library.Conv2d(8, 8, 3, groups=2, padding="same"), library.PReLU(8),
        library.ConvTranspose2d(8, 8, 2, stride=2), library.LeakyReLU(0.1), library.AvgPool2d(2),
        tnn.Flatten(), tnn.Linear(8 * 16, 5),
    ).to(device, dtype)  # fmt: skip


def batch(n, device="cpu", dtype=torch.float32, seed=0):
    """Images with some relation to their classes."""
    classes = torch.arange(n) % 5
    x = numbers(n, 2, 8, 8, seed=seed) * 0.5 + torch.nn.functional.one_hot(classes, 8).view(n, 1, 1, 8)
    return x.to(device, dtype), classes.to(device)


def gradients(model, n=6, dtype=torch.float64):
    """The loss of a batch, and every parameter's gradient."""
    x, classes = batch(n, next(model.parameters()).device, dtype)
    model.zero_grad()
    loss = TF.cross_entropy(model(x), classes)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_close(got, expected, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- lower precision ---


class Casts(TorchDispatchMode):
    """Counts conversions to another dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@every_lower
@every_device
def test_autocast_converts_what_torch_converts(device, lower):
    """Convolutions come out in the lower precision, all else in its input's; gradients in the parameters'."""
    x, w, transposed = (numbers(*s).float().to(device) for s in [(2, 4, 6, 6), (4, 4, 3, 3), (4, 4, 2, 2)])
    slope = torch.full((4,), 0.2, device=device)
    leaves = [t.requires_grad_() for t in (x, w, transposed, slope)]
    results = []
    # Values are compared with torch's float32: its own bfloat16 adds up rounded sums where the processor lacks
    # instructions for it.
    for library, casts in (F, True), (TF, True), (TF, False):
        with torch.autocast(device, lower, enabled=casts):
            y = library.conv2d(x, w, w.new_zeros(4))
            z = library.conv_transpose2d(y, transposed, w.new_zeros(4))
            kept = [library.relu(z), library.max_pool2d(z, 2), library.avg_pool2d(z, 2), library.leaky_relu(z),
                    library.adaptive_avg_pool2d(z, 2), library.hardtanh(z)]  # fmt: skip
            unchanged = [library.relu(x), library.max_pool2d(x, 2), library.avg_pool2d(x, 2),
                         library.adaptive_max_pool2d(x, 2)]  # fmt: skip
            kept.append(library.prelu(z, slope))
            y = library.prelu(y.float(), slope)  # for torch a convolution's kin
        loss = sum(t.float().pow(2).mean() for t in (*kept, y))
        grads = torch.autograd.grad(loss, leaves)  # outside of the region
        assert {t.dtype for t in (y, z, *kept)} == {lower if casts else torch.float32}
        assert {t.dtype for t in (*unchanged, *grads)} == {torch.float32}
        results.append([y, z, *kept, *grads])
    ours, _, exact = results
    for got, expected in zip(ours, exact, strict=True):
        assert (got.float() - expected).norm() <= 4 * torch.finfo(lower).eps * expected.norm()


@every_device
def test_autocast_takes_mixed_and_lower_inputs(device):
    """A lower-precision input with float32 weights, float64 left alone as torch does, and a region left early."""
    x, w = numbers(2, 4, 6, 6).float().to(device), numbers(4, 4, 3, 3).float().to(device)
    with torch.autocast(device, torch.bfloat16):
        assert F.conv2d(x.bfloat16(), w).dtype == F.conv2d(x, w.half()).dtype == torch.bfloat16
        assert F.conv2d(x.double(), w.double()).dtype == TF.conv2d(x.double(), w.double()).dtype
        with torch.autocast(device, torch.bfloat16, enabled=False):
            assert_equal(F.conv2d(x, w), outside(device, x, w))
    assert_equal(F.conv2d(x, w), outside(device, x, w))


def outside(device, x, w):
    with torch.autocast(device, torch.bfloat16, enabled=False):
        return F.conv2d(x, w)


@every_device
def test_autocast_caches_weights(device):
    """A weight that is used twice is converted once in a region; without the cache, twice."""
    x = torch.randn(1, 2, 5, 5, device=device)
    w = torch.randn(2, 2, 3, 3, device=device, requires_grad=True)
    counts = []
    for cache in True, False:
        with Casts() as casts, torch.autocast(device, torch.bfloat16, cache_enabled=cache):
            for _ in range(3):
                F.conv2d(x.bfloat16(), w)
        counts.append(casts.count)
    assert [c - 3 for c in counts] == [1, 3]  # three of them are the input's


def train(library, device, lower, steps=25):
    net = network(library, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=lower == torch.float16)
    losses = []
    for step in range(steps):
        x, classes = batch(20, device, seed=step)
        optimizer.zero_grad()
        with torch.autocast(device, lower):
            loss = TF.cross_entropy(net(x), classes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(net.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


@every_lower
@every_device
def test_autocast_trains_like_the_twin(device, lower):
    """With a GradScaler for float16: the loss falls, along torch's curve up to the rounding."""
    ours, theirs = train(nn, device, lower), train(tnn, device, lower)
    assert ours[-3:].mean() < 0.1 * ours[:3].mean()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@every_lower
def test_autocast_compiles(lower):
    """The region inside of the compiled function, and around it."""
    net = network(nn)
    x = batch(4)[0]

    def run(x):
        with torch.autocast("cpu", lower):
            return net(x)

    expected = run(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", lower):
        around = compiled(x)
    for y in around, torch.compile(run, fullgraph=True, backend="aot_eager")(x):
        assert y.dtype == lower
        torch.testing.assert_close(y, expected)


def test_a_gradient_that_overflows_skips_the_step():
    net = network(nn)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = net(batch(4)[0]).pow(2).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_device
def test_a_model_in_another_dtype(device, dtype):
    """model.to(dtype): everything in it, the gradients too."""
    got, expected = (gradients(network(library, device, dtype), dtype=dtype) for library in (nn, tnn))
    assert {t.dtype for t in got} == {dtype}
    assert_close(got, expected, 1e-11 if dtype == torch.float64 else 4e-2)


# --- several processes ---


def joint_gradients(library=tnn):
    """One process on the whole batch."""
    return gradients(network(library, dtype=torch.float64))


def part_of_the_batch(rank):
    x, classes = batch(6, dtype=torch.float64)
    return x[3 * rank :][:3], classes[3 * rank :][:3]


def distributed_step(rank, model):
    """The mean loss over both processes, which is the joint batch's."""
    x, classes = part_of_the_batch(rank)
    loss = TF.cross_entropy(model(x), classes)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss / 2


def data_parallel(rank):
    for options in {}, {"static_graph": True, "gradient_as_bucket_view": True}:
        model = DistributedDataParallel(network(nn, dtype=torch.float64), **options)
        loss = distributed_step(rank, model)
        assert_close([loss, *(p.grad for p in model.parameters())], joint_gradients())


def sharded(rank):
    mesh = dist.init_device_mesh("cpu", (2,))
    model = network(nn, dtype=torch.float64)
    for layer in model[0], model[3], model[5]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, expected = distributed_step(rank, model), joint_gradients()
    assert_close([loss, *(p.grad.full_tensor() for p in model.parameters())], expected)
    before = [p.full_tensor().detach() for p in model.parameters()]
    optimizer.step()
    after = [p.full_tensor().detach() for p in model.parameters()]
    assert_close(after, [p - 0.1 * g for p, g in zip(before, expected[1:], strict=True)])


def process(rank, file, shared):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
    data_parallel(rank)
    sharded(rank)
    assert_close(gradients(copy.deepcopy(shared)), joint_gradients(nn), 0)
    dist.barrier()
    if rank == 1:
        for p in shared.parameters():
            p.data.zero_()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DistributedDataParallel and FSDP2, half of the batch each: loss and gradients are those of one process with all.

    And a model in the memory of both, which one of them changes.
    """
    shared = network(nn, dtype=torch.float64).share_memory()
    torch.multiprocessing.spawn(process, (str(tmp_path / "store"), shared), nprocs=2)
    assert all(p.count_nonzero() == 0 for p in shared.parameters())


def test_data_parallel():
    """Without a GPU the module runs as it is, as torch says; its replicas are copies that compute alike."""
    model = network(nn, dtype=torch.float64)
    assert_close(gradients(DataParallel(model)), joint_gradients())
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = (2 * p.detach() for p in (model[0].weight, model[0].bias))
    x = batch(2, dtype=torch.float64)[0]
    assert_close(replica(x), 2 * model[0](x).detach())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_on_two_gpus():
    assert_close([t.cpu() for t in gradients(DataParallel(network(nn, "cuda", torch.float64)))], joint_gradients())


def test_tensors_that_are_spread_are_refused():
    """A DTensor does not know how to cut our operators up, and says so; FSDP2 puts whole tensors together first."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = distribute_tensor(torch.ones(2, 2, 4, 4), dist.init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(NotImplementedError, match="cnnops"):
            F.relu(x)
    finally:
        dist.destroy_process_group()


# --- one model, treated in many ways ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    """What is forgotten and computed again is the same to the bit."""
    model = network(nn, dtype=torch.float64)
    expected = gradients(model)

    class Checkpointed(tnn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            x = checkpoint(self.model[:3], x.requires_grad_(), use_reentrant=use_reentrant)
            return checkpoint_sequential(self.model[3:], 2, x, use_reentrant=use_reentrant)

    assert_close(gradients(Checkpointed()), expected, 0)


def test_hooks():
    """Each kind is called as often and with the same tensors as on torch's modules."""
    results = []
    for library in nn, tnn:
        model, seen = network(library, dtype=torch.float64), []
        for module in model:
            module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach().clone()))
            module.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach().clone()))
        for module in model[2:]:  # torch's own rule: not on a module whose result is then changed in place
            module.register_full_backward_pre_hook(lambda m, gy, seen=seen: seen.append(gy[0]))
            module.register_full_backward_hook(lambda m, gx, gy, seen=seen: seen.append(gx[0]))
        for p in model.parameters():
            p.register_hook(lambda g, seen=seen: seen.append(g))
            p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        model[0].register_forward_hook(lambda m, args, y: y * 2)
        results.append([*seen, *gradients(model), len(seen)])
    assert_close(*results)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.4),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_other_weights_in_the_same_place(name):
    """The parametrized weight is what is convolved with, and what the gradient goes through."""
    results = []
    for library in nn, tnn:
        model = network(library, dtype=torch.float64)
        torch.manual_seed(0)
        for layer in model[0], model[3], model[5]:
            PARAMETRIZATIONS[name](layer)
        results.append(gradients(model))
        model.eval()
        if name == "prune":
            prune.remove(model[0], "weight")
        else:
            parametrize.remove_parametrizations(model[0], "weight")
        results[-1] += gradients(model)
    assert_close(*results)


@pytest.mark.parametrize("library", [nn, tnn], ids=["ours", "torchs"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_batch_norm_is_fused(transposed, library):
    """In eval mode the norm's scales go into the convolution before it, which stays of our class."""
    conv = library.ConvTranspose2d(3, 4, 3) if transposed else library.Conv2d(3, 4, 3, bias=False, padding="same")
    norm = tnn.BatchNorm2d(4)
    for t in (*norm.parameters(), *norm.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 2)
    pair = tnn.Sequential(conv, norm).double().eval()
    fused = fuse_conv_bn_eval(*pair, transpose=transposed)
    assert type(fused) is type(conv)
    x = numbers(2, 3, 6, 6)
    assert_close(fused(x), pair(x))


@pytest.mark.parametrize("algorithm", ["auto", "reference"])
def test_lazy_convolutions(algorithm):
    """Become a Conv2d of ours at the first image, or by a state_dict."""
    model, other = (tnn.Sequential(nn.LazyConv2d(6, 3, padding=1, algorithm=algorithm), nn.ReLU()) for _ in range(2))
    x = numbers(2, 3, 6, 6).float()
    y = model(x)
    assert type(model[0]) is nn.Conv2d and model[0].in_channels == 3 and model[0].algorithm == algorithm
    other.load_state_dict(model.state_dict())
    assert_equal(other(x).detach(), y.detach())
    y.sum().backward()
    assert type(other[0]) is nn.Conv2d and model[0].weight.grad.shape == (6, 3, 3, 3)


KEPT = {
    "conv2d": (lambda F, x, w: F.conv2d(x, w, padding=1), "input, weight"),
    "conv_transpose2d": (lambda F, x, w: F.conv_transpose2d(x, w), "input, weight"),
    "max_pool2d": (lambda F, x, w: F.max_pool2d(x, 2), 2 * 4 * 4 * 4),
    "adaptive_max_pool2d": (lambda F, x, w: F.adaptive_max_pool2d(x, 2), 2 * 4 * 2 * 2),
    "avg_pool2d": (lambda F, x, w: F.avg_pool2d(x, 2), 0),
    "adaptive_avg_pool2d": (lambda F, x, w: F.adaptive_avg_pool2d(x, 2), 0),
    "relu": (lambda F, x, w: F.relu(x), "output"),
    "hardtanh": (lambda F, x, w: F.hardtanh(x), "output"),
    "leaky_relu": (lambda F, x, w: F.leaky_relu(x), "output"),
    "prelu": (lambda F, x, w: F.prelu(x, w[0, :, 0, 0]), "input, weight"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_the_backward_pass_keeps(name):
    """The output where that is enough, one byte per window of a maximum; never more than torch keeps."""
    function, kept = KEPT[name]
    x, w = numbers(2, 4, 8, 8).float().requires_grad_(), numbers(4, 4, 3, 3).float().requires_grad_()
    sizes = []
    for library in F, TF:
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t):
            y = function(library, x, w)
        sizes.append(sum(t.nbytes for t in tensors))
        if library is F and isinstance(kept, str):
            wanted = [y] if kept == "output" else [x, w]
            assert {t.untyped_storage().data_ptr() for t in tensors} == {t.data_ptr() for t in wanted}
    assert sizes[0] <= sizes[1] and (isinstance(kept, str) or sizes[0] == kept)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    """Three steps; where torch's optimizer takes them, with channels_last weights."""
    results = []
    for library in nn, tnn:
        model = network(library, dtype=torch.float64)
        if name != "LBFGS":
            model.to(memory_format=torch.channels_last)
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(3):
            optimizer.step(lambda model=model: gradients(model)[0].requires_grad_())
        results.append([p.detach() for p in model.parameters()])
    assert_close(*results, 1e-8)


@every_device
def test_frozen_and_shared_parameters(device):
    """A layer without gradients, one weight in two places, gradients of the input alone, accumulated gradients."""
    results = []
    for library in nn, tnn:
        model = network(library, device, torch.float64)
        model[0].requires_grad_(False)
        model.insert(4, copy.deepcopy(model[3]))
        model[4].weight = model[3].weight
        x, classes = batch(6, device, torch.float64)
        for part in range(2):
            TF.cross_entropy(model(x[part::2]), classes[part::2]).backward()
        assert model[0].weight.grad is None
        model.requires_grad_(False)
        x.requires_grad_()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        results[-1] += torch.autograd.grad(model(x).pow(2).sum(), x)
    assert_close(*results)
