"""implicit_gemm in every way it multiplies and copies, emulated (cuda_on_cpu/README.md)."""

import pytest
import torch
from cases import CONV2D
from cuda_helpers import LAYOUTS, PASSES, needs_compiler, same_bits
from test_cuda_conv2d import (
    BORDERS,
    Bordered,
    check_alone_and_together,
    check_conv2d,
    conv2d,
    conv2d_cases,
    conv2d_expected,
    conv2d_operands,
    small_groups,
)

pytestmark = needs_compiler

# How implicit_gemm multiplies: the type of numbers, whether TF32 is allowed, and the GPU.
MATH = {
    "split": (torch.float32, False, 80),
    "tf32": (torch.float32, True, 80),
    "bfloat16": (torch.bfloat16, False, 80),
    "float16": (torch.float16, False, 80),
    "sm_75-float32": (torch.float32, True, 75),
    "sm_75-bfloat16": (torch.bfloat16, False, 75),
}
every_math = pytest.mark.parametrize("math", MATH)


def tiled_cases():
    """What fills tiles, and slices of the sum, and what leaves over a little of each."""
    for sizes, kernel, rest in [
        ((2, 16, 9, 9, 32), (3, 3), {"padding": (1, 1)}),  # whole vectors
        ((1, 8, 21, 21, 40), (1, 1), {}),  # the large tile
        ((1, 9, 19, 23, 33), (1, 2), {}),  # the large tile, number by number
        ((2, 24, 9, 8, 24), (3, 3), {"padding": (1, 1), "stride": (2, 2)}),
        ((3, 32, 5, 6, 48), (2, 3), {"padding": (1, 1), "groups": 2}),
        ((1, 16, 11, 9, 24), (3, 3), {"padding": (2, 1), "dilation": (2, 3)}),
        ((2, 8, 12, 11, 72), (2, 2), {"stride": (3, 2)}),
        ((1, 72, 4, 4, 8), (3, 3), {"padding": (1, 1)}),
        ((2, 20, 6, 5, 12), (2, 3), {"padding": (0, 1)}),  # runs of 4 channels, but no vectors of 8
    ]:
        n, c, h, w, k = sizes
        yield Bordered("x".join(map(str, sizes)), n, c, h, w, k, kernel, **rest)


@every_math
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", [*tiled_cases()], ids=str)
def test_implicit_gemm(kernels, case, which, layout, math):
    dtype, tf32, architecture = MATH[math]
    rounds = tf32 and architecture >= 80
    check_conv2d(kernels, case, "implicit_gemm", which, dtype, layout, rounds, architecture=architecture)


@pytest.mark.parametrize("math, layout", [("split", "channels_last"), ("tf32", "contiguous")])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", [case for case in conv2d_cases() if not small_groups(case)], ids=str)
def test_implicit_gemm_of_all_shapes(kernels, case, which, layout, math):
    test_implicit_gemm(kernels, case, which, layout, math)


@every_math
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", BORDERS[1:])
def test_implicit_gemm_beyond_the_border(kernels, border, layout, math):
    rest = {"padding": (2, 1), "end": (1, 3), "stride": (1, 2), "border": border}
    case = Bordered(border, 2, 16, 5, 6, 9, (3, 3), **rest)
    for which in ("forward", "grad_weight"):
        test_implicit_gemm(kernels, case, which, layout, math)


@every_math
@pytest.mark.parametrize("which", PASSES[:2])
@pytest.mark.parametrize("name, layout", [("asymmetric", "contiguous"), ("row-of-17", "channels_last")])
def test_implicit_gemm_of_an_image_alone(kernels, name, which, layout, math):
    dtype, tf32, architecture = MATH[math]
    check_alone_and_together(kernels, name, "implicit_gemm", which, dtype, layout, tf32, architecture=architecture)


def test_float32_stays_float32(kernels):
    """Relative L2 errors: without TF32 as small as other algorithms', with it as large as TF32's."""
    case = Bordered("precision", 1, 64, 6, 6, 16, (3, 3), padding=(1, 1))
    operands = [t if t is None else t.float() for t in conv2d_operands(case)]

    def error(which, algorithm, tf32=False):
        got = conv2d(kernels, case, which, algorithm, *operands, "channels_last", tf32, architecture=80)
        expected, _ = conv2d_expected(case, which)
        return float((got - expected).norm() / expected.norm())

    for which in PASSES:
        assert error(which, "implicit_gemm") < 1.5 * error(which, "im2col")
        assert 1e-4 < error(which, "implicit_gemm", tf32=True) < 4e-4


def test_implicit_gemm_is_not_for_float64(kernels):
    for which in PASSES:
        case = CONV2D[0]
        with pytest.raises(RuntimeError, match="implicit_gemm algorithm is for float32, bfloat16 and float16"):
            conv2d(kernels, case, which, "implicit_gemm", *conv2d_operands(case))


@pytest.mark.parametrize("which", PASSES)
def test_auto_takes_implicit_gemm_where_there_are_channels(kernels, which):
    """Its TF32 tells it apart."""
    # Few channels to sum over do, if there are 64 products.
    for c, k, kernel, taken in [(8, 8, 3, True), (7, 8, 3, False), (8, 7, 3, False), (3, 8, 5, which != "grad_input")]:
        case = Bordered("auto", 1, c, 7, 7, k, (kernel, kernel))
        operands = [t if t is None else t.float() for t in conv2d_operands(case)]
        exact, rounds = (
            conv2d(kernels, case, which, "auto", *operands, "contiguous", tf32, architecture=80)
            for tf32 in (False, True)
        )
        assert same_bits(exact, rounds) != taken
