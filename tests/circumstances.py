"""Law 3 as a question to any operator: in which circumstances do the same numbers give other bits?

`changes` and `restridings` change the circumstances of a `Subject` in every way that must not show. The trials at the
end are random calls of an operator, for cnnops.functional and torch.nn.functional alike: tests/test_same_bits.py draws
them with hypothesis, benchmarks/reproducibility.py from a seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from helpers import awkward, numbers, off_by
from torch import Tensor
from torch._prims_common import suggest_memory_format


@dataclass
class Subject:
    """Something to call: a function of `batched` and `shared` tensors. If it `reduces`, it sums over the batch."""

    function: Callable
    batched: list[Tensor]
    shared: list[Tensor]
    reduces: bool = False

    def __call__(self, select=lambda t: t, alter=lambda t: t) -> list[Tensor]:
        results = self.function(*(alter(select(t)) for t in self.batched), *map(alter, self.shared))
        return [results] if isinstance(results, Tensor) else list(results)


Change = tuple[str, str, list[Tensor], list[Tensor]]  # kind, details, expected, got


def changes(subject: Subject) -> Iterator[Change]:
    """Other numbers of threads; and with each number of them another run, address, batch and place in the batch."""
    n = len(subject.batched[0])
    slices = {1: [(i, i + 1) for i in range(n)], 2: [(0, n // 2), (n // 2, n)], 4: [(n // 3, n // 3 + 2)]}
    for threads, elements in {1: 1, 2: 3, 3: 8, 4: 13}.items():
        torch.set_num_threads(threads)
        expected, now = subject(), f"with {threads} threads"
        if threads == 1:
            alone = expected
        yield "threads", f"{threads} instead of 1", alone, expected
        yield "run", now, expected, subject()
        yield (
            "address",
            f"off by {elements} elements, {now}",
            expected,
            subject(alter=lambda t, e=elements: off_by(t, e)),
        )
        if subject.reduces:
            continue
        for start, stop in slices.get(threads, []):
            part = subject(select=lambda t, start=start, stop=stop: t[start:stop].clone())
            yield "batch size", f"only {start}:{stop}, {now}", [t[start:stop] for t in expected], part
        if threads == 3:
            thrice = subject(select=lambda t: torch.cat([t] * 3))
            yield "batch size", f"three times as many, {now}", [torch.cat([t] * 3) for t in expected], thrice
        turned = subject(select=lambda t: t.flip(0))
        yield "place", f"the batch turned around, {now}", expected, [t.flip(0) for t in turned]
    torch.set_num_threads(1)


def restridings(subject: Subject) -> Iterator[Change]:
    """The operands as views with unusual strides, in the layout that they had: another may sum in another order."""
    expected = subject()
    for kind in "transposed", "every second column", "inside a larger tensor":
        yield "strides", kind, expected, subject(alter=lambda t, kind=kind: _restrided(t, kind))


def _restrided(t: Tensor, kind: str) -> Tensor:
    """Itself, if torch saw another layout in it otherwise."""
    if t.dim() != 4:
        return dict(awkward(t)).get(kind, t)
    last = dict(awkward(t.permute(0, 2, 3, 1)))[kind].permute(0, 3, 1, 2)
    for view in dict(awkward(t))[kind], last:
        if suggest_memory_format(view) == suggest_memory_format(t):
            return view
    return t


# --- trials ---

Pick = Callable  # one of a sequence


@dataclass
class Trial:
    """One call of a function that cnnops.functional and torch.nn.functional have both."""

    operator: str
    input_shape: tuple[int, ...]
    parameter_shapes: list[tuple[int, ...]]
    arguments: dict
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    ours: dict = field(default_factory=dict)  # arguments that torch does not have

    @property
    def passes(self) -> list[str]:
        return ["forward", "grad_input", "grad_weight", "grad_bias"][: 2 + len(self.parameter_shapes)]

    @property
    def steps(self) -> int:
        """About as many multiply-adds as the forward pass of a convolution has, or else elements."""
        weight = prod(self.parameter_shapes[0][1:]) if len(self.parameter_shapes) > 1 else 1
        return prod(self.input_shape) * weight * (self.parameter_shapes or [(1,)])[0][0] // self.input_shape[1]

    def subject(self, which: str, library) -> Subject:
        """A pass as a function of all that goes into it."""

        def forward(x, *parameters):
            if self.operator == "max_unpool2d":
                pooled, indices = library.max_pool2d(x, **self.arguments, return_indices=True)
                return library.max_unpool2d(pooled, indices, **self.arguments, output_size=x.shape)
            ours = {} if library is torch.nn.functional else self.ours
            return getattr(library, self.operator)(x, *parameters, **self.arguments, **ours)

        def backward(x, gy, *parameters):
            leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
            return torch.autograd.grad(forward(*leaves), leaves[self.passes.index(which) - 1], gy)

        def draw(shape, seed):
            t = numbers(*shape, seed=seed).to(self.dtype)
            return t.clone(memory_format=self.memory_format) if len(shape) == 4 else t

        x = draw(self.input_shape, "x")
        parameters = [draw(shape, i) for i, shape in enumerate(self.parameter_shapes)]
        if which == "forward":
            return Subject(forward, [x], parameters)
        gy = draw(forward(x, *parameters).shape, "gy")
        return Subject(backward, [x, gy], parameters, reduces=which != "grad_input")


# Numbers at which vectors and tiles begin and end.
CHANNELS = [1, 2, 3, 7, 8, 16, 16, 17, 32, 33]
SIDES = [*range(1, 10), 12, 14, 15, 16, 17, 31, 32, 33]


def _pair(pick: Pick, options) -> tuple[int, int]:
    return pick(options), pick(options)


def _convolution(pick: Pick):
    """(n, c, h, w), (k, c / groups, kh, kw), and what is alike forward and transposed."""
    groups = pick([1, 1, 1, 1, 2, 3, 16])
    c, k = (groups * pick([1, 1, 2] if groups == 16 else CHANNELS) for _ in "ck")
    kernel = pick([(3, 3), (3, 3), (1, 1), (5, 5), _pair(pick, range(1, 6))])
    stride = pick([(1, 1), (1, 1), (2, 2), _pair(pick, range(1, 4))])
    dilation = pick([(1, 1), (1, 1), (1, 1), _pair(pick, range(1, 4))])
    image = _pair(pick, SIDES if c * k // groups <= 64 else SIDES[:13])
    return (pick(range(2, 6)), c, *image), (k, c // groups, *kernel), stride, dilation, groups


def conv2d(pick: Pick) -> Trial:
    x, w, stride, dilation, groups = _convolution(pick)
    reach = [d * (k - 1) for d, k in zip(dilation, w[2:], strict=True)]
    least = [max(0, (r + 1 - i + 1) // 2) for r, i in zip(reach, x[2:], strict=True)]
    padding = tuple(pick([p, max(p, r // 2), p + 1]) for p, r in zip(least, reach, strict=True))
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return Trial("conv2d", x, [w, w[:1]], arguments)


def conv_transpose2d(pick: Pick) -> Trial:
    x, (k, c, *kernel), stride, dilation, groups = _convolution(pick)
    arguments = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "output_padding": tuple(s - 1 for s in stride),
    }
    return Trial("conv_transpose2d", x, [(x[1], k // groups, *kernel), (k,)], arguments)


def _image(pick: Pick) -> tuple[int, ...]:
    return pick(range(2, 6)), pick(CHANNELS), *_pair(pick, [side for side in SIDES if side > 4])


def max_pool2d(pick: Pick) -> Trial:
    kernel = pick([(2, 2), (3, 3), _pair(pick, range(1, 6))])
    arguments = {
        "kernel_size": kernel,
        "stride": pick([(2, 2), (1, 1), _pair(pick, range(1, 5))]),
        "padding": tuple(pick(range(k // 2 + 1)) for k in kernel),
        "ceil_mode": pick([False, True]),
    }
    return Trial("max_pool2d", _image(pick), [], arguments)


def avg_pool2d(pick: Pick) -> Trial:
    trial = max_pool2d(pick)
    more = {"count_include_pad": pick([True, False]), "divisor_override": pick([None, None, 7])}
    return Trial("avg_pool2d", trial.input_shape, [], {**trial.arguments, **more})


def lp_pool2d(pick: Pick) -> Trial:
    arguments = {
        "norm_type": pick([1, 2]),
        "kernel_size": _pair(pick, range(1, 5)),
        "stride": _pair(pick, range(1, 4)),
    }
    return Trial("lp_pool2d", _image(pick), [], arguments)


def max_unpool2d(pick: Pick) -> Trial:
    return Trial("max_unpool2d", _image(pick), [], {"kernel_size": _pair(pick, range(1, 5))})


def adaptive(name: str):
    return lambda pick: Trial(name, _image(pick), [], {"output_size": _pair(pick, range(1, 9))})


def activation(name: str, **arguments):
    return lambda pick: Trial(name, _image(pick), [], arguments)


def prelu(pick: Pick) -> Trial:
    x = _image(pick)
    return Trial("prelu", x, [x[1:2]], {})


CONVOLUTIONS = {"conv2d": conv2d, "conv_transpose2d": conv_transpose2d}
OTHERS = {
    "max_pool2d": max_pool2d,
    "max_unpool2d": max_unpool2d,
    "avg_pool2d": avg_pool2d,
    "lp_pool2d": lp_pool2d,
    "adaptive_max_pool2d": adaptive("adaptive_max_pool2d"),
    "adaptive_avg_pool2d": adaptive("adaptive_avg_pool2d"),
    "relu": activation("relu"),
    "hardtanh": activation("hardtanh", min_val=-0.5, max_val=0.7),
    "leaky_relu": activation("leaky_relu", negative_slope=0.3),
    "prelu": prelu,
}
