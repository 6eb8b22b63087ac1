"""The emulation itself (cuda_on_cpu/README.md): what stands in for a GPU's instructions does what PTX says; and kernels
with a mistake planted in them (cuda_on_cpu/faults.cu) are found out, and are right without it."""

import pytest
import torch
from cuda_helpers import HALVES, LAZY, ORDERS, assert_same, draw, needs_compiler

pytestmark = needs_compiler


def words(*shape, seed=1):
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def warp(kernels, name, lanes, architecture=80):
    """Runs a collective: 32 lanes with 64 words each go in, 32 with 8 come out, as int32."""
    output = ((32, 8), torch.float32)
    got = kernels.run(f"collectives/{name}", [], (lanes.view(torch.float32),), output, architecture=architecture)
    return got.view(torch.int32)


# Fragments, by the formulas of the PTX ISA ("Matrix Fragments for mma.m16n8k8" and its like), one by one. PTX numbers
# elements, 2 of 16 bits to a register: element i of a is in half i % 2 of register i / 2. `group` is lane / 4, `thread`
# lane % 4.


def a_tf32(i, group, thread):
    return group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)


def b_tf32(i, group, thread):
    return thread + 4 * i, group


def a_half(i, group, thread):
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_half(i, group, thread):
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_float(i, group, thread):
    return group + (0 if i < 2 else 8), thread * 2 + (i & 1)


def to_lanes(matrix, place, count):
    """The elements [32, count] that the lanes hold of a matrix."""
    return torch.stack(
        [torch.stack([matrix[place(i, lane // 4, lane % 4)] for i in range(count)]) for lane in range(32)]
    )


@pytest.mark.parametrize(
    "dtype, steps, depth",
    [(torch.float32, 1, 4), (torch.float32, 2, 8)] + [(half, s, 8 * s) for half in HALVES for s in (1, 2)],
    ids=["tf32-k4", "tf32-k8", "bfloat16-k8", "bfloat16-k16", "float16-k8", "float16-k16"],
)
def test_mma(kernels, dtype, steps, depth):
    a, b, c = (draw(seed, *shape).float() for seed, shape in enumerate([(16, depth), (depth, 8), (16, 8)]))
    if dtype == torch.float32:
        # The 13 bits that a TF32 has not must make no difference.
        a, b = (t.view(torch.int32) & ~0x1FFF for t in (a, b))
        registers_a, registers_b = to_lanes(a, a_tf32, 2 * steps), to_lanes(b, b_tf32, steps)
        registers_a, registers_b = (t | words(*t.shape) & 0x1FFF for t in (registers_a, registers_b))
        a, b, name = a.view(torch.float32), b.view(torch.float32), "tf32"
    else:
        a, b, name = a.to(dtype), b.to(dtype), str(dtype).removeprefix("torch.")
        registers_a, registers_b = (
            t.contiguous().view(torch.int32) for t in (to_lanes(a, a_half, 4 * steps), to_lanes(b, b_half, 2 * steps))
        )
    lanes = words(32, 64)
    lanes[:, : 2 * steps], lanes[:, 4 : 4 + steps] = registers_a, registers_b
    lanes[:, 6:10] = to_lanes(c, c_float, 4).view(torch.int32)
    got = warp(kernels, f"mma_{name}_{steps}", lanes)[:, :4].view(torch.float32)
    expected = (a.double() @ b.double() + c.double()).float()
    assert_same(got, to_lanes(expected, c_float, 4))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(kernels, count, transposed):
    lanes = words(32, 64)
    matrices = lanes[: 8 * count, :4].contiguous().view(torch.int16).view(count, 8, 8)
    if transposed:
        matrices = matrices.mT.contiguous()
    got = warp(kernels, f"ldmatrix_{count}" + "_trans" * transposed, lanes)[:, :count]
    # Lane 4 * row + t has elements 2 * t and 2 * t + 1 of a row.
    assert torch.equal(got.T, matrices.view(torch.int32).reshape(count, 32))


def test_shuffles(kernels):
    lanes, lane = words(32, 64), torch.arange(32)
    lanes[:, 1] = draw(2, 32).float().view(torch.int32)
    got, x = warp(kernels, "shuffles", lanes), lanes[:, 0]
    assert torch.equal(got[:, 0], x[(lane * 7 + 3) % 32])
    assert torch.equal(got[:, 1], torch.where(lane < 27, x[(lane + 5).clamp(max=31)], x))
    assert torch.equal(got[:, 2], x[lane ^ 9])
    ballot = sum(1 << i for i in range(32) if (int(x[i]) & 0xFFFFFFFF) % 3 == 0)
    assert [int(bits) & 0xFFFFFFFF for bits in got[:, 3]] == [ballot] * 32
    assert got[:, 4].tolist() == [1 + 2] * 32
    sums = lanes[:, 1].contiguous().view(torch.float32)
    for half in (16, 8, 4, 2, 1):
        sums = sums[:half] + sums[half:]
    assert torch.equal(got[:, 5], sums.expand(32).contiguous().view(torch.int32))
    assert torch.equal(got[:, 6], x[31].expand(32))


def test_roundings(kernels):
    lanes = words(32, 64)
    special = [0x3F801000, 0x3F800FFF, 0x3F803000, -0x7FFFF001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0, 0x1000, 0xFFF]
    lanes[: len(special), 0] = torch.tensor([x - 2**32 if x >= 2**31 else x for x in special], dtype=torch.int32)
    lanes[16:, :2] = draw(3, 16, 2).float().view(torch.int32)
    got, x = warp(kernels, "roundings", lanes), lanes[:, :2].contiguous().view(torch.float32)
    # TF32: of the two neighbours that have 10 bits of mantissa the nearer, and of two equals the one further from zero.
    below = (lanes[:, :2] & ~0x1FFF).contiguous()
    up = (lanes[:, :2] & 0x1FFF) >= 0x1000
    expected = torch.where(x.isnan(), 0x7FFFFFFF, below + 0x2000 * up)
    assert torch.equal(got[:, :2], expected)
    for column, dtype in (2, torch.float16), (3, torch.bfloat16):
        assert_same(got[:, column : column + 1].contiguous().view(dtype), x.to(dtype))
    assert_same(got[:, 4].contiguous().view(torch.float32), x[:, 1].half().float())


@pytest.mark.parametrize("last", [0, 1, 7, 12, 16])
@pytest.mark.parametrize("first", [0, 3, 4])
def test_copy_async(kernels, first, last):
    lanes = words(32, 64)
    lanes[:, 33], lanes[:, 32] = first, last
    got = warp(kernels, "copy_async", lanes)
    expected = torch.cat([lanes[:, 1:2], torch.zeros(32, 1, dtype=torch.int32), lanes[:, 2:8]], 1)
    raw = expected.view(torch.uint8)
    raw[:, first:4] = 0
    raw[:, 16 + last :] = 0
    assert torch.equal(got, expected)


GEMMS = [  # m, n, k
    (64, 64, 32),
    (1, 1, 1),
    (65, 70, 33),
    (16, 130, 100),
]


@pytest.mark.parametrize("steps_first", [True, False])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("sizes", GEMMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_matrix_product_with_tensor_cores(kernels, dtype, sizes, stages, steps_first):
    if dtype == torch.float32 and not steps_first:
        pytest.skip("ldmatrix transposes 16-bit numbers only")
    check_gemm(kernels, dtype, sizes, stages, steps_first)


def check_gemm(kernels, dtype, sizes, stages, steps_first, architecture=80):
    m, n, k = sizes
    vector = 16 // dtype.itemsize
    a, b = draw(1, m, k), draw(2, k, n)
    if dtype == torch.float32:  # what TF32 has
        a, b = (((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (a, b))

    def padded(t):
        """With rows of a multiple of 16 bytes, and NaN in what that adds."""
        t = t.to(dtype)
        columns = -(-t.shape[1] // vector) * vector
        return torch.cat([t, torch.full((t.shape[0], columns - t.shape[1]), float("nan"), dtype=dtype)], 1).contiguous()

    a_rows, b_rows = padded(a), padded(b.T if steps_first else b)
    integers = [m, n, k, a_rows.shape[1], b_rows.shape[1], steps_first, stages]
    got = kernels.run("gemm", integers, (a_rows, b_rows), ((m, n), torch.float32), architecture=architecture)
    a, b = a.to(dtype).double(), b.to(dtype).double()
    error, magnitude = (got.double() - a @ b).abs(), a.abs() @ b.abs()
    assert bool((error <= 2**-22 * magnitude).all()), f"{(error / magnitude).max():.1e}"


def test_more_shared_memory_than_48_kilobytes(kernels):
    for architecture in 75, 90:
        check_gemm(kernels, torch.float16, (64, 64, 300), 8, True, architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_cores_that_an_architecture_has_not(kernels, dtype):
    """On a GPU they stop the kernel, also when a newer one runs code that was compiled for sm_75."""
    with pytest.raises(RuntimeError, match=r"multiplies what tensor cores of sm_75 cannot, .*gemm_tile.h:\d+"):
        check_gemm(kernels, dtype, (64, 64, 32), 2, True, architecture=75)


# What finds each mistake: words of the message; DIFFERS and UNWRITTEN are about results, and no message.
DIFFERS, UNWRITTEN = "shows in the result", "written by no thread"
RACE = "data race"
FAULTS = {  # name: what the emulation says; with AddressSanitizer; with ThreadSanitizer. Only where they differ.
    "missing_barrier": (DIFFERS, None, RACE),
    "missing_trailing_barrier": (DIFFERS, None, RACE),
    "missing_sync_warp": (DIFFERS, None, RACE),
    "missing_wait": (DIFFERS, None, RACE),
    "wait_for_too_few": (DIFFERS, None, RACE),
    "never_waits": (r"thread \d+ of block 0 ends with a cp.async under way that it never waited for, .*faults.cu:\d+",),
    "read_beyond": (r"thread \d+ of block 0 reads or writes 0 bytes beyond the end of input 0", "SEGV", "SEGV"),
    "write_beyond": (r"thread \d+ of block 0 reads or writes 0 bytes beyond the end of output 0", "SEGV", "SEGV"),
    "read_before": (r"thread \d+ of block 0 reads or writes \d+ bytes before input 0", "SEGV|poison", "SEGV"),
    "shared_beyond": (
        r"thread \d+ of block 0 reads or writes 0 bytes beyond the end of shared memory",
        "SEGV",
        "SEGV",
    ),
    "unwritten": (UNWRITTEN,),
    "writes_its_input": ("wrote to input 0",),
    "two_writers": (DIFFERS, None, RACE),
    "early_return": (r"not all threads of the block reach: threads 0-158 wait at the barrier, .*; threads 159 ended",),
    "two_barriers": (r"threads 0-2, 4-159 wait at the barrier, .*faults.cu:\d+; threads 3 wait at the barrier",),
    "misaligned": (r"accesses 16 bytes at an address 4 over a multiple of that, .*faults.cu:\d+",),
    "misaligned_copy": (r"accesses 16 bytes at an address 8 over a multiple of that, .*faults.cu:\d+",),
    "overflow": ("at an address far from all that it was given", "signed integer overflow", "SEGV"),
    "two_shuffles": (r"not all 32 lanes of warp 0 reach: lanes 0-15 wait at the shuffle_xor, .*; lanes 16-31 wait at",),
    "lanes_left_out": ("not all 32 lanes of warp 4 reach: lanes 0-23 wait at the shuffle_xor, .*; lanes 24-31 ended",),
    "half_a_warp": ("not all 32 lanes of warp 4 reach: .*; lanes 16-31 do not exist",),
    "shuffle_beside_a_barrier": ("lanes 0-4, 6-31 wait at the shuffle_xor, .*; lanes 5 wait at the barrier",),
    "too_much_shared_memory": ("asks for 65540 bytes of shared memory, and a block may have 65536 on sm_75",),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_found(kernels, name):
    size = 152 if name in ("lanes_left_out", "read_beyond", "write_beyond") else 160
    x = draw(4, size).float()
    output = ((size,), torch.float32)
    for order in ORDERS + LAZY:
        [got] = kernels.call(f"fault/{name}", [size, 0], (x,), output, **order)
        torch.testing.assert_close(got, x.flip(0))
    assert_same(kernels.run(f"fault/{name}", [size, 0], (x,), output), got)
    says = dict(zip(["", "address", "thread"], FAULTS[name], strict=False)).get(kernels.sanitizer) or FAULTS[name][0]
    with pytest.raises((RuntimeError, AssertionError), match=says):
        kernels.run(f"fault/{name}", [size, 1], (x,), output)


def test_after_a_mistake_all_goes_on(kernels):
    x = draw(5, 64).float()
    with pytest.raises(RuntimeError, match="barrier"):
        kernels.call("fault/early_return", [64, 1], (x,), ((64,), x.dtype))
    assert_same(kernels.run("fault/early_return", [64, 0], (x,), ((64,), x.dtype)), x.flip(0))
