"""Draws docs/kernels/cuda_*.svg, the pictures of docs/kernels_cuda.md: ``python docs/draw_kernels_cuda.py``."""

from draw_kernels import BLUE, BORDER, DARK, FOLDER, GREEN, GREY, LIGHT, ORANGE, RED, Drawing


def device():
    d = Drawing(30, 13.6)
    d.text(0.5, 0.6, "an H200: 132 processors, each with its own warps, registers and shared memory", size=9)
    for i in range(3):
        x = 0.5 + 8.2 * i
        d.frame(x, 1.2, 7.6, 6.6, DARK, 1.2)
        d.text(x + 0.3, 1.8, f"processor {i}" if i < 2 else "…", size=8)
        for warp in range(4):
            d.cell(x + 0.3 + 1.78 * warp, 2.3, GREEN, f"warp {warp}", width=1.65, height=0.9, line=0.5)
        d.cell(x + 0.3, 3.5, ORANGE, "registers, 256 KB: up to 255 a thread", width=7.0, height=1.1)
        d.cell(x + 0.3, 4.9, BLUE, "shared memory + L1, 256 KB", width=7.0, height=1.1)
        d.text(x + 0.3, 6.6, "a block lives on one processor", size=7)
        d.text(x + 0.3, 7.3, "from its first to its last thread", size=7)
    d.cell(0.5, 8.6, GREY, "L2 cache, 60 MB, of all", width=24.0, height=1.0)
    d.cell(0.5, 10.2, RED, "global memory, 141 GB: tensors lie here", width=24.0, height=1.0)
    d.text(25.0, 4.1, "no waiting", size=8)
    d.text(25.0, 5.5, "128 bytes a clock", size=8)
    d.text(25.0, 9.1, "a few times memory's", size=8)
    d.text(25.0, 10.7, "4.3 TB/s, all together", size=8)
    d.text(0.5, 12.2, "The nearer, the faster, and the smaller. A rung is a way to bring a number", size=9)
    d.text(0.5, 13.0, "near once and to use it often before it has to go.", size=9)
    d.save("cuda_device")


def tile():
    """A block's tile of the product, with the slices that it reads."""
    d = Drawing(31, 16.2)
    d.text(9.2, 0.6, "weights: steps of the sum down, output channels across", size=9)
    d.cells(9.2, 1.2, 6, 8, lambda i, j: ORANGE if i in (2, 3) else LIGHT, edge="#999999", line=0.5)
    d.frame(9.2, 3.2, 8, 2, "#d62728", 2.2)
    d.text(17.6, 4.2, "a slice: 64 bytes of steps", size=8)
    d.text(0.5, 7.2, "unfolded input:", size=9)
    d.text(0.5, 7.9, "a pixel per row", size=9)
    d.cells(2.7, 8.4, 6, 6, lambda i, j: BLUE if j in (2, 3) else LIGHT, edge="#999999", line=0.5)
    d.frame(4.7, 8.4, 2, 6, "#d62728", 2.2)
    warps = [RED, GREEN, GREEN, RED]
    d.text(9.2, 7.9, "outputs, 128 pixels x 64 channels, of 4 warps", size=9)
    d.cells(9.2, 8.4, 6, 8, lambda i, j: warps[i // 3 * 2 + j // 4], edge="#999999", line=0.4)
    for i in range(2):
        for j in range(2):
            d.frame(9.2 + 4 * j, 8.4 + 3 * i, 4, 3, "black", 1.8)
            d.text(11.2 + 4 * j, 9.9 + 3 * i, f"warp {2 * i + j}", ha="center", size=8)
    d.text(17.8, 9.2, "A slice of 16 steps of float32:", size=9)
    d.text(17.8, 10.0, "(128 + 64) x 16 numbers brought,", size=9)
    d.text(17.8, 10.8, "128 x 64 x 16 products made of them.", size=9)
    d.text(17.8, 12.2, "Sums stay in registers until the last slice:", size=9)
    d.text(17.8, 13.0, "64 of each thread's registers.", size=9)
    d.text(
        0.5, 15.5, "Neither matrix exists: rows of the left one are looked up in the image as they are brought.", size=9
    )
    d.save("cuda_tile")


def pipeline():
    d = Drawing(30, 9.6)
    d.text(0.5, 0.6, "three slices in shared memory: two on their way while one is multiplied", size=9)
    colours = [BLUE, ORANGE, GREEN]
    for stage in range(3):
        d.text(0.5, 2.2 + 1.5 * stage, f"place {stage}", size=9)
    for number in range(6):
        stage, start = number % 3, 3.5 + 3.3 * number
        d.cell(start, 1.7 + 1.5 * stage, BORDER, f"{number} comes", width=6.6, height=1.0, hatch="///", edge="#aaaaaa")
        d.cell(start + 6.6, 1.7 + 1.5 * stage, colours[stage], f"{number}: multiply", width=3.3, height=1.0)
    for number in range(8):
        x = 3.5 + 3.3 * number
        d.axes.plot([x, x], [1.3, 6.3], color="#999999", linewidth=0.7, linestyle=":")
    d.arrow((3.5, 6.8), (29.5, 6.8))
    d.text(28.2, 7.4, "time", size=8)
    d.text(
        0.5,
        8.1,
        "Dotted: a barrier. It says that a slice is there, and that all have done with the one before,",
        size=9,
    )
    d.text(0.5, 8.9, "whose place the next one gets. cp.async brings it past the registers, and nobody waits.", size=9)
    d.save("cuda_pipeline")


def tensor_core():
    d = Drawing(31, 15.6)
    d.text(0.5, 0.6, "one instruction of a warp, mma m16n8k8: 16 x 8 sums, 8 steps", size=9)
    d.cells(6.5, 1.3, 4, 4, ORANGE, edge="#888888", line=0.4)
    d.text(10.9, 3.3, "b: 8 x 8", size=8)
    d.cells(1.5, 5.8, 8, 4, BLUE, edge="#888888", line=0.4)
    d.text(1.5, 5.3, "a: 16 x 8", size=8)
    d.cells(6.5, 5.8, 8, 4, GREEN, edge="#888888", line=0.4)
    d.text(10.9, 9.6, "sums: 16 x 8,", size=8)
    d.text(10.9, 10.4, "4 in each lane", size=8)
    d.text(
        0.5,
        14.8,
        "1024 products in one instruction; a multiply-add of a warp makes 32. (A cell here: 2 x 2 numbers.)",
        size=9,
    )
    d.text(16, 0.6, "float32 out of TF32, which keeps 10 bits of mantissa", size=9)

    def number(y, title, parts):
        d.text(16, y + 0.5, title, size=8)
        for x, width, colour, text in parts:
            d.cell(18.2 + x, y, colour, text, width=width, line=0.6)

    number(1.6, "x", [(0, 2.6, GREY, "sign, exp."), (2.6, 3.2, RED, "10 bits"), (5.8, 3.9, BLUE, "13 bits more")])
    number(3.4, "big", [(0, 2.6, GREY, "sign, exp."), (2.6, 3.2, RED, "10 bits")])
    number(5.2, "small", [(3.2, 2.6, GREY, "sign, exp."), (5.8, 3.2, BLUE, "11 of the 13")])
    d.text(16, 7.6, "x * w  =  big * big", size=9)
    d.text(16, 8.5, "          +  big * small  +  small * big", size=9)
    d.text(16, 9.4, "          +  small * small,", size=9)
    d.text(16, 10.3, "the last being about 2^-22 of the whole: left out.", size=9)
    d.text(16, 11.6, "Three products on tensor cores, small ones first,", size=9)
    d.text(16, 12.4, "give what float32 asks for.", size=9)
    d.save("cuda_tensor_core")


def vectors():
    d = Drawing(30, 12.4)
    shades = [RED, GREEN, BLUE, ORANGE]
    d.text(
        0.5, 0.6, "channels_last: a thread takes 16 bytes of a pixel's channels, of each pixel of its window", size=9
    )
    for pixel in range(4):
        for c in range(8):
            x = 0.5 + 7 * (pixel % 2) + 0.8 * c
            d.cell(x, 1.3 + 1.3 * (pixel // 2), BLUE if c < 4 else GREEN, f"c{c}", width=0.8, line=0.4)
    d.arrow((14.3, 2.5), (16.1, 2.5))
    for c in range(8):
        d.cell(16.6 + 0.8 * c, 1.6, BLUE if c < 4 else GREEN, f"y{c}", width=0.8, line=0.4)
        d.cell(16.6 + 0.8 * c, 2.8, LIGHT, str(c * 5 % 4), width=0.8, line=0.4)
    d.text(23.4, 2.1, "thread 0 blue,", size=8)
    d.text(23.4, 2.9, "thread 1 green", size=8)
    d.text(0.5, 5.0, "contiguous, windows of 2x2: a thread takes 16 bytes of each of two rows", size=9)
    d.cells(0.5, 5.6, 2, 8, lambda i, j: shades[j // 2], line=0.5)
    for v in range(2):
        d.frame(0.5 + 4 * v, 5.6, 4, 2, "black", 2.0)
    d.arrow((9, 6.6), (10.8, 6.6))
    d.cells(11.2, 5.6, 1, 4, lambda i, j: shades[j])
    d.cells(11.2, 6.8, 1, 4, LIGHT, lambda i, j: [1, 2, 3, 1][j])
    d.text(16, 6.1, "two largest numbers, 8 bytes", size=8)
    d.text(16, 7.3, "and their places, 2 bytes: of each thread", size=8)
    d.text(
        0.5, 9.3, "activations: 16 bytes, two at a time, a block's width apart, all read before one is written", size=9
    )
    for v in range(2):
        for thread in range(5):
            for number in range(4):
                d.cell(0.5 + 13.5 * v + 2.2 * thread + 0.55 * number, 9.9, shades[v], width=0.55, line=0.4)
            d.frame(0.5 + 13.5 * v + 2.2 * thread, 9.9, 2.2, 1, "black", 1.2)
            d.text(1.6 + 13.5 * v + 2.2 * thread, 11.6, f"thread {thread}", ha="center", size=7)
    d.save("cuda_vectors")


def strip():
    d = Drawing(29, 9.6)
    d.text(0.5, 0.6, "depthwise: a thread walks down a strip of its column", size=9)
    d.cells(0.5, 1.2, 6, 7, lambda i, j: BLUE if 2 <= j <= 4 else LIGHT, edge="#999999", line=0.5)
    d.frame(2.5, 1.2, 3, 3, "#d62728", 2.2)
    d.frame(2.5, 4.2, 3, 3, "#1f77b4", 2.2)
    d.text(7.8, 1.8, "6 rows of 3 numbers read", size=8)
    d.arrow((8, 4.2), (10.3, 4.2))
    d.cells(11, 2.2, 4, 1, GREEN, lambda i, j: f"y{i}")
    d.text(12.6, 3.2, "4 outputs, each of 9 products", size=8)
    d.text(12.6, 4.2, "(more in the kernel)", size=8)
    d.text(12.6, 5.2, "18 reads for 36 products;", size=8)
    d.text(12.6, 6.2, "one output alone: 9 for 9", size=8)
    d.text(
        0.5,
        8.3,
        "Its weights and its open sums are in registers. Neighbouring threads take neighbouring columns,",
        size=9,
    )
    d.text(0.5, 9.1, "or in channels_last vectors of channels, so memory is read in whole lines.", size=9)
    d.save("cuda_strip")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in device, tile, pipeline, tensor_core, vectors, strip:
        draw()
