"""The CUDA convolutions, emulated (cuda_on_cpu/README.md): right, and the same bits in every order of threads."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from cases import CONV2D, Conv2dCase
from cuda_helpers import (
    ALGORITHMS,
    HALVES,
    LAYOUTS,
    PASSES,
    assert_rounds_well,
    draw,
    every_dtype,
    every_layout,
    needs_compiler,
    real_dtypes,
    same_bits,
)
from torch.nn import functional as TF

pytestmark = needs_compiler

LARGEST = 2e6  # flops of a case
BORDERS = ["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True)
class Bordered(Conv2dCase):
    """A case with another padding below and to the right, and a border."""

    end: tuple[int, int] = (0, 0)
    border: str = "zeros"

    @property
    def out(self):
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, self.end, self.dilation, strict=True)
        return tuple((i + p + e - d * (k - 1) - 1) // s + 1 for i, k, s, p, e, d in sizes)

    def padded(self, x):
        (top, left), (below, right) = self.padding, self.end
        mode = {"zeros": "constant"}.get(self.border, self.border)
        x = TF.pad(x, (left, max(right, 0), top, max(below, 0)), mode)
        return x[:, :, : x.shape[2] + min(below, 0), : x.shape[3] + min(right, 0)]


def conv2d_integers(case, layout="contiguous"):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    border = BORDERS.index(getattr(case, "border", "zeros"))
    return [case.n, case.c, case.k, case.groups, *(i for pair in pairs for i in pair), LAYOUTS.index(layout), border]


def conv2d_operands(case, dtype=torch.float32):
    """x, w, b, gy in float64, made of numbers that `dtype` has."""
    x, w, gy = draw(1, *case.input_shape), draw(2, *case.weight_shape), draw(3, *case.output_shape)
    b = draw(4, case.k) if case.bias else None
    return [t if t is None or dtype not in HALVES else t.to(dtype).double() for t in (x, w, b, gy)]


def rounded_to_tf32(t):
    return ((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


@cache
def conv2d_expected(case, which, dtype=torch.float32, tf32=False):
    """What is right, and the same over absolute values. TF32: of products of rounded numbers."""

    def of(x, w, b, gy):
        arguments, padding = case.arguments, case.padding
        if isinstance(case, Bordered):
            x, arguments, padding = case.padded(x), {**case.arguments, "padding": 0}, (0, 0)
        if which == "forward":
            return TF.conv2d(x, w, b, **arguments)
        mask = [which == "grad_input", which == "grad_weight", False]
        rest = (None, case.stride, padding, case.dilation, False, (0, 0), case.groups, mask)
        gradient = torch.ops.aten.convolution_backward(gy, x, w, *rest)[mask.index(True)]
        if isinstance(case, Bordered) and which == "grad_input":  # of a border of zeros
            (top, left), (below, right) = case.padding, case.end
            return TF.pad(gradient, (-left, -right, -top, -below))
        return gradient

    x, w, b, gy = conv2d_operands(case, dtype)
    if tf32:
        x, w, gy = map(rounded_to_tf32, (x, w, gy))
    operands = x, w, b, gy
    return of(*operands), of(*(t if t is None else t.abs() for t in operands))


def conv2d(kernels, case, which, algorithm, x, w, b, gy, layout="contiguous", tf32=False, **rest):
    inputs, shape = {
        "forward": ((x, w, b), case.output_shape),
        "grad_input": ((gy, w, None), case.input_shape),
        "grad_weight": ((gy, x, None), case.weight_shape),
    }[which]
    integers = [*conv2d_integers(case, layout), tf32]
    return kernels.run_in(layout, f"conv2d/{which}/{algorithm}", integers, inputs, (shape, x.dtype), **rest)


def conv2d_cases():
    cases = [replace(case, n=min(case.n, 3)) for case in CONV2D if case.n]
    return [case for case in cases if case.flops <= LARGEST]


def refused(case, which):
    """What the direct algorithm is not for."""
    c, k, taps = case.c // case.groups, case.k // case.groups, case.kernel[0] * case.kernel[1]
    produce, reduce = (c, k) if which == "grad_input" else (k, c)
    return produce > 32 and reduce * taps > 32


def small_groups(case):
    """What the implicit_gemm algorithm is not for."""
    return case.groups > 1 and min(case.c, case.k) // case.groups < 8


def no_depthwise(case):
    """What the depthwise algorithm is not for."""
    return case.c == 1 or case.groups != case.c or case.k // case.c > 8


def skip_refused(algorithm, dtype, case=None):
    if algorithm == "implicit_gemm" and dtype == torch.float64:
        pytest.skip("not for float64: see test_implicit_gemm_is_not_for_float64")
    if case and {"implicit_gemm": small_groups, "depthwise": no_depthwise}.get(algorithm, lambda _: False)(case):
        pytest.skip("refused: see check_conv2d")


def check_conv2d(kernels, case, algorithm, which, dtype, layout, tf32=False, **rest):
    skip_refused(algorithm, dtype)
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case, dtype)]
    if algorithm == "implicit_gemm" and small_groups(case):
        with pytest.raises(RuntimeError, match="the implicit_gemm algorithm is for groups of 8 channels or more"):
            conv2d(kernels, case, which, algorithm, *operands, layout, tf32, **rest)
        return
    if algorithm == "depthwise" and no_depthwise(case):
        with pytest.raises(RuntimeError, match="the depthwise algorithm is for"):
            conv2d(kernels, case, which, algorithm, *operands, layout)
        return
    if algorithm == "direct" and refused(case, which):
        with pytest.raises(RuntimeError, match="the direct algorithm is for few channels"):
            conv2d(kernels, case, which, algorithm, *operands, layout)
        return
    try:
        got = conv2d(kernels, case, which, algorithm, *operands, layout, tf32, **rest)
    except RuntimeError as refusal:
        if algorithm != "direct" or "shared memory" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    assert_rounds_well(got, *conv2d_expected(case, which, dtype if dtype in HALVES else torch.float32, tf32))


@every_layout
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", conv2d_cases(), ids=str)
def test_conv2d(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


SOME = ["notes", "asymmetric", "stride-3-dilation-2", "depthwise-strided", "channels-prime", "batch-of-13", "lecture-1"]


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "channels_last"),
        (torch.float64, "contiguous"),
        *((h, layout) for h in HALVES for layout in LAYOUTS),
    ],
)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", [case for case in conv2d_cases() if case.name in SOME], ids=str)
def test_conv2d_in_every_type(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


def bordered_cases():
    """Borders are as wide as they may be in at least one place; all but zeros must be narrower than the image."""
    for border in BORDERS:
        options = [
            ("same", 2, 3, 9, 8, 5, (4, 3), {"padding": (1, 1), "end": (2, 1)}),
            ("none-before", 2, 4, 7, 9, 6, (3, 5), {"padding": (0, 0), "end": (2, 6), "groups": 2}),
            ("strided", 1, 3, 11, 10, 4, (3, 2), {"padding": (3, 5), "end": (4, 1), "stride": (3, 2)}),
            ("dilated", 2, 5, 6, 70, 5, (3, 3), {"padding": (4, 5), "end": (5, 2), "dilation": (4, 3), "groups": 5}),
            ("wide", 1, 2, 5, 6, 3, (3, 3), {"padding": (4, 5), "end": (4, 5)}),
            ("many-channels", 1, 35, 4, 5, 34, (2, 3), {"padding": (1, 1), "end": (0, 1)}),
        ]
        if border == "zeros":
            options += [
                ("cut-off", 2, 3, 9, 10, 5, (3, 3), {"padding": (1, 2), "end": (-3, -1)}),
                ("cut-off-strided", 2, 4, 9, 10, 5, (2, 2), {"end": (-2, -4), "stride": (2, 3)}),
                ("end-over-kernel", 1, 2, 4, 3, 3, (2, 2), {"padding": (1, 0), "end": (5, 7)}),
            ]
        if border == "circular":
            options.append(("whole-image", 1, 2, 5, 6, 3, (3, 3), {"padding": (5, 6), "end": (5, 6)}))
        if border == "replicate":
            options.append(("one-pixel", 2, 3, 1, 1, 4, (3, 2), {"padding": (1, 1), "end": (1, 0)}))
        for *sizes, rest in options:
            sizes[0] = f"{border}-{sizes[0]}"
            yield Bordered(*sizes, **rest, border=border)


@pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")], ids=LAYOUTS
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "case, which",
    [
        (case, which)
        for case in bordered_cases()
        for which in PASSES
        if which != "grad_input" or case.border == "zeros"  # others are folded back in a step of their own
    ],
    ids=str,
)
def test_conv2d_beyond_the_border(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in bordered_cases() if "cut-off" not in case.name], ids=str)
def test_fold_border(kernels, case, layout, dtype):
    x = torch.zeros(case.input_shape, dtype=torch.float64, requires_grad=True)
    sizes = zip(case.out, case.stride, case.kernel, case.dilation, strict=True)
    h, w = ((o - 1) * s + (k - 1) * d + 1 for o, s, k, d in sizes)  # what a stride leaves over at the end is cut off
    padded = case.padded(x)[:, :, :h, :w]
    gradient = draw(21, *padded.shape).to(dtype)

    def of(gradient):
        return torch.autograd.grad(padded, x, gradient.double(), retain_graph=True)[0]

    got = kernels.run_in(layout, "fold_border", conv2d_integers(case, layout), (gradient,), (x.shape, dtype))
    assert_rounds_well(got, of(gradient), of(gradient.abs()))


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "name", ["stride-3", "stride-over-kernel", "groups", "mobilenet-5x5", "depthwise-strided-whole"]
)
def test_the_gradient_of_the_input_takes_a_bias(kernels, name, algorithm, layout, dtype):
    """As a transposed convolution has one, also where no tap meets an input."""
    case = next(case for case in CONV2D if case.name == name)
    skip_refused(algorithm, dtype, case)
    _, w, _, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case, dtype))
    bias = draw(22, case.c).to(dtype)
    name, integers = f"conv2d/grad_input/{algorithm}", conv2d_integers(case, layout)
    got = kernels.run_in(layout, name, integers, (gy, w, bias), (case.input_shape, dtype))
    expected, magnitude = conv2d_expected(case, "grad_input", dtype if dtype in HALVES else torch.float32)
    bias = bias.double()[:, None, None]
    assert_rounds_well(got, expected + bias, magnitude + bias.abs())


@every_layout
@pytest.mark.parametrize("which", PASSES[:2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "name",
    ["asymmetric", "stride-3", "depthwise-multiplier", "depthwise-5x5-strided", "1x1-image-1x1", "row-of-17"],
)
def test_conv2d_of_an_image_alone_has_the_bits_it_has_in_a_batch(kernels, name, algorithm, which, dtype, layout):
    check_alone_and_together(kernels, name, algorithm, which, dtype, layout)


def check_alone_and_together(kernels, name, algorithm, which, dtype, layout, tf32=False, **rest):
    case = replace(next(case for case in CONV2D if case.name == name), n=5)
    skip_refused(algorithm, dtype, case)
    x, w, b, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case))
    together = conv2d(kernels, case, which, algorithm, x, w, b, gy, layout, tf32, **rest)
    for i in (0, 3):
        image = x[i : i + 1].clone(), w, b, gy[i : i + 1].clone()
        alone = conv2d(kernels, replace(case, n=1), which, algorithm, *image, layout, tf32, **rest)
        assert same_bits(alone, together[i : i + 1].contiguous())


def depthwise_cases():
    """All shapes of strips, even and odd, with what they leave over; and a few that are none."""
    for kernel, stride, padding, sizes, rest in [
        (3, 1, 1, (2, 12, 9, 10), {}),
        (3, 1, 0, (1, 8, 17, 5), {"end": (2, 0)}),
        (3, 2, 1, (2, 8, 9, 12), {}),
        (3, 2, 1, (1, 4, 20, 11), {"end": (0, 2)}),
        (3, 2, 0, (1, 12, 8, 10), {"end": (1, 0)}),
        (3, 2, 2, (1, 4, 3, 6), {"end": (-1, 1)}),
        (5, 1, 2, (2, 6, 10, 9), {}),
        (5, 2, 2, (1, 8, 23, 14), {"end": (1, 2)}),
        (5, 2, 1, (2, 4, 9, 8), {"end": (3, 0)}),
        (7, 1, 3, (1, 6, 19, 8), {}),
        (3, 1, 1, (2, 52, 3, 4), {}),  # more channels than a block takes
        (3, 1, 1, (1, 2, 20, 20), {"k": 6}),
        (5, 2, 2, (1, 2, 9, 9), {"k": 4}),
        (3, 1, 2, (1, 8, 9, 8), {"dilation": (2, 2)}),
        (3, 3, 1, (1, 4, 9, 10), {}),
    ]:
        n, c, h, w = sizes
        pairs = [(v, v) for v in (kernel, stride, padding)]
        name = f"{kernel}x{kernel}-s{stride}-p{padding}-" + "x".join(map(str, sizes))
        end = rest.get("end", (padding, padding))
        yield Bordered(name, *sizes, rest.get("k", c), *pairs, rest.get("dilation", (1, 1)), c, end=end)


every_depthwise = pytest.mark.parametrize("case", [*depthwise_cases()], ids=str)


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "contiguous"),
        (torch.float64, "channels_last"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "contiguous"),
    ],
)
@pytest.mark.parametrize("which", PASSES)
@every_depthwise
def test_depthwise(kernels, case, which, layout, dtype):
    check_conv2d(kernels, case, "depthwise", which, dtype, layout)


@pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "channels_last"), (torch.bfloat16, "contiguous")], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("which", PASSES)
@every_depthwise
def test_depthwise_at_other_addresses(kernels, case, which, layout, dtype):
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case)]
    expected = conv2d(kernels, case, which, "depthwise", *operands, layout)
    offsets = [dtype.itemsize] * 4
    assert same_bits(expected, conv2d(kernels, case, which, "depthwise", *operands, layout, offsets=offsets))


def test_depthwise_leaves_out_what_no_result_has(kernels):
    """A strip's rows beyond the last, and taps that miss a cell: zeros there would make NaN of an infinite number."""
    for case in depthwise_cases():
        x, w, b, gy = (t if t is None else t.float() for t in conv2d_operands(case))
        x[:, :, -1, -1] = torch.inf
        infinite_gy = gy.clone()
        infinite_gy[:, :, -1, -1] = torch.inf
        for which in PASSES:
            operands = x, w, b, infinite_gy if which == "grad_input" else gy
            expected, got = (conv2d(kernels, case, which, row, *operands) for row in ("reference", "depthwise"))
            assert torch.equal(got.isnan(), expected.isnan()), (str(case), which)


def test_algorithms(kernels):
    assert kernels.emulation.algorithms() == ALGORITHMS


def test_workspace_is_bounded_and_does_not_look_at_the_batch(kernels):
    for case in CONV2D:
        for which in PASSES:
            for algorithm in ALGORITHMS[no_depthwise(case) :]:
                number = ALGORITHMS.index(algorithm), PASSES.index(which)
                cases = [replace(case, n=n) for n in (1, 7, 100_000)]
                sizes = {kernels.emulation.workspace(*number, conv2d_integers(case)) for case in cases}
                assert len(sizes) == 1 and sizes.pop() <= 512 * 64 * 64, (case, which, algorithm)


def test_an_image_too_large_for_32_bits_is_refused(kernels):
    case = replace(CONV2D[0], h=2**17, w=2**17)
    operand = torch.zeros(1)
    for algorithm in ("depthwise", "implicit_gemm", "direct", "im2col"):
        with pytest.raises(RuntimeError, match=f"the {algorithm} algorithm counts within an image in 32 bits"):
            kernels.call(
                f"conv2d/forward/{algorithm}", conv2d_integers(case), (operand, operand, None), ((1,), operand.dtype)
            )


@every_dtype
def test_an_empty_batch(kernels, dtype):
    for algorithm in ALGORITHMS:
        if (algorithm, dtype) == ("implicit_gemm", torch.float64):
            continue
        name = "depthwise" if algorithm == "depthwise" else "lecture-1"
        case = replace(next(case for case in CONV2D if case.name == name), n=0)
        x, w, b, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case))
        for which in PASSES:
            got = conv2d(kernels, case, which, algorithm, x, w, b, gy)
            assert bool((got == 0).all())
