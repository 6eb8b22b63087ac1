"""A few cases of every CUDA kernel, emulated under sanitizers (cuda_on_cpu/README.md). `make sanitize` runs all."""

import pytest
import test_cuda_activation as activation
import test_cuda_conv2d as conv2d
import test_cuda_conv_block as conv_block
import test_cuda_implicit_gemm as implicit_gemm
import test_cuda_pool2d as pool2d
import test_emulation as emulation
import torch
from cases import AVG_POOL2D, CONV2D, MAX_POOL2D
from cuda_helpers import ALGORITHMS, HALVES, LAYOUTS, PASSES, SANITIZER, Kernels, needs_compiler
from emulated import has_sanitizer

pytestmark = [needs_compiler, pytest.mark.skipif(SANITIZER != "", reason="all other tests run with a sanitizer")]


@pytest.fixture(scope="module", params=["address", "thread"])
def sanitized(request):
    if not has_sanitizer(request.param):
        pytest.skip(f"this compiler, or this machine, has no {request.param} sanitizer")
    kernels = Kernels(request.param)
    yield kernels
    kernels.close()


def case_of(table, name):
    return next(case for case in table if case.name == name)


@pytest.mark.parametrize("name", emulation.FAULTS)
def test_a_mistake_is_found(sanitized, name):
    emulation.test_a_mistake_is_found(sanitized, name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_matrix_product_with_tensor_cores(sanitized, dtype):
    emulation.check_gemm(sanitized, dtype, (65, 70, 33), 3, True)
    if dtype in HALVES:
        emulation.check_gemm(sanitized, dtype, (65, 70, 33), 2, False)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_conv2d(sanitized, algorithm, which):
    # Half of the combinations with each sanitizer, which take seconds.
    number = ALGORITHMS.index(algorithm) + PASSES.index(which) + (sanitized.sanitizer == "thread")
    dtype = [torch.float32, torch.bfloat16][number % 2]
    conv2d.check_conv2d(sanitized, case_of(CONV2D, "asymmetric"), algorithm, which, dtype, LAYOUTS[number % 2])


@pytest.mark.parametrize("which", PASSES)
def test_depthwise(sanitized, which):
    for number, case in enumerate([*conv2d.depthwise_cases()][::3]):
        layout = LAYOUTS[(number + (sanitized.sanitizer == "thread")) % 2]
        conv2d.test_depthwise(sanitized, case, which, layout, [torch.float32, torch.bfloat16][number // 2 % 2])


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("math", ["split", "tf32", "float16"])
def test_implicit_gemm(sanitized, which, math):
    layout = LAYOUTS[sanitized.sanitizer == "thread"]
    case = conv2d.Bordered("sanitized", 1, 16, 5, 7, 16, (2, 3), padding=(1, 1), stride=(2, 1))
    implicit_gemm.test_implicit_gemm(sanitized, case, which, layout, math)


@pytest.mark.parametrize("algorithm", conv_block.FUSED)
def test_conv_block(sanitized, algorithm):
    number = conv_block.FUSED.index(algorithm) + (sanitized.sanitizer == "thread")
    dtype, layout = [torch.float32, torch.bfloat16][number % 2], LAYOUTS[number % 2]
    case = conv2d.Bordered("sanitized", 2, 16, 5, 7, 9, (2, 3), padding=(1, 1))
    conv_block.check(sanitized, case, algorithm, conv_block.drawn(case, dtype), layout, activations=["relu6"])
    conv_block.test_backward(sanitized, "leaky_relu", 5, 7, layout, dtype)
    conv_block.test_backward(sanitized, "relu", 5, 8, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_border(sanitized, layout):
    case = case_of(conv2d.bordered_cases(), "reflect-strided")
    conv2d.test_fold_border(sanitized, case, layout, torch.float64)
    for algorithm in ALGORITHMS:
        conv2d.check_conv2d(sanitized, case, algorithm, "forward", torch.float32, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling(sanitized, layout):
    pool2d.test_max_pool2d(sanitized, case_of(MAX_POOL2D, "dilated-strided"), torch.float32, "ties", layout)
    pool2d.test_avg_pool2d(sanitized, AVG_POOL2D[1], torch.float16, layout)
    pool2d.test_adaptive_pooling(sanitized, (7, 9), (3, 4), torch.float32, layout)
    pool2d.test_max_unpool2d(sanitized, 2, 3, 40, 25, layout, torch.float32)


def test_activations(sanitized):
    activation.test_relu(sanitized, 1025, torch.float32)
    activation.test_hardtanh(sanitized, 1025, (-0.7, 0.1), torch.bfloat16)
    activation.test_hardtanh(sanitized, 1025, (-1000, 1000), torch.int8)
    activation.test_leaky_relu(sanitized, 1025, -0.5, torch.float16)
    activation.test_prelu_and_channel_sums(sanitized, 5, 4, 511, torch.float64)
