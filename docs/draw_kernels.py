"""Draws docs/kernels/*.svg, the pictures of docs/kernels.md: ``python docs/draw_kernels.py``."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent / "kernels"
GREY, LIGHT, DARK = "#e8e8e8", "#f7f7f7", "#444444"
BLUE, ORANGE, GREEN, RED = "#9ecae1", "#fdae6b", "#a1d99b", "#f4a6a0"
CHANNELS = [RED, GREEN, BLUE]
BORDER = "#ffffff"

# The same file each time, small, with its text as text.
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "cnnops", "font.size": 9, "font.family": "sans-serif"}
)


class Drawing:
    """Cells on a grid whose y axis points down, as an image's rows do."""

    def __init__(self, width: float, height: float, scale: float = 0.3):
        self.figure = Figure(figsize=(width * scale, height * scale), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), aspect="equal")
        self.axes.axis("off")
        self.order = iter(range(1, 10000))  # what is drawn later covers what is there

    def cell(self, x, y, colour=LIGHT, text="", width=1.0, height=1.0, line=0.7, edge=DARK, **style):
        style |= {"facecolor": colour, "edgecolor": edge, "linewidth": line, "zorder": next(self.order)}
        self.axes.add_patch(Rectangle((x, y), width, height, **style))
        if text != "":
            self.text(x + width / 2, y + height / 2, text, ha="center", size=7)

    def cells(self, x, y, rows, columns, colour: Callable | str = LIGHT, text: Callable = lambda i, j: "", **style):
        for i in range(rows):
            for j in range(columns):
                shade = colour(i, j) if callable(colour) else colour
                self.cell(x + j, y + i, shade, text(i, j), **style)

    def frame(self, x, y, width, height, colour="black", line=2.0):
        style = {"fill": False, "edgecolor": colour, "linewidth": line, "zorder": next(self.order)}
        self.axes.add_patch(Rectangle((x, y), width, height, **style))

    def text(self, x, y, text, ha="left", va="center", **style):
        self.axes.text(x, y, text, ha=ha, va=va, zorder=next(self.order), **style)

    def arrow(self, start, end, colour=DARK, curve=0.0):
        style = {"arrowstyle": "->", "color": colour, "linewidth": 1.2, "connectionstyle": f"arc3,rad={curve}"}
        self.axes.annotate("", end, start, arrowprops=style)

    def save(self, name: str):
        path = FOLDER / f"{name}.svg"
        self.figure.savefig(path, metadata={"Date": None})
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def window():
    d = Drawing(27, 9.5)
    d.text(1, 0.6, "input x, 6 x 6, padding 1", size=10)
    d.cells(1, 1.2, 8, 8, lambda i, j: GREY if 0 < i < 7 and 0 < j < 7 else BORDER, edge="#999999")
    for i, j, colour in (0, 0, "#d62728"), (2, 3, "#1f77b4"):
        d.frame(1 + j, 1.2 + i, 3, 3, colour)
    d.text(11.3, 0.6, "filter w", size=10)
    d.cells(11.3, 3.7, 3, 3, ORANGE, lambda i, j: f"w{i}{j}")
    d.text(9.7, 5.2, "·", size=16)
    d.arrow((14.8, 5.2), (17, 5.2))
    d.text(18, 0.6, "output y, 6 x 6", size=10)
    d.cells(18, 2.2, 6, 6, lambda i, j: {(0, 0): RED, (2, 3): BLUE}.get((i, j), LIGHT))
    d.text(11.3, 7.6, "nine products,", size=8)
    d.text(11.3, 8.3, "one sum", size=8)
    d.save("window")


def layouts():
    """Two rows of three pixels, three channels."""
    d = Drawing(27, 9)

    def line(y, title, of):
        d.text(4.5, y - 0.6, title, size=9)
        for place in range(18):
            c, pixel = of(place)
            d.cell(4.5 + place * 1.2, y, CHANNELS[c], "RGB"[c] + str(pixel), width=1.2)
        d.arrow((4.5, y + 1.35), (26.1, y + 1.35))
        d.text(4.5, y + 1.9, "addresses", size=7)

    for c in reversed(range(3)):
        d.cells(0.3 + 0.45 * c, 3.9 - 0.6 * c, 2, 3, CHANNELS[c], lambda i, j, c=c: "RGB"[c] + str(3 * i + j))
    d.text(0.3, 1.9, "one image", size=9)
    line(1.6, "contiguous (n, c, h, w): plane after plane, a row's neighbours lie together", lambda p: divmod(p, 6))
    line(
        6.3, "channels_last (n, h, w, c): pixel after pixel, a pixel's channels lie together", lambda p: (p % 3, p // 3)
    )
    d.save("layouts")


def tile():
    d = Drawing(25, 12)
    colours = [BLUE, GREEN, ORANGE]
    d.text(7, 0.6, "V = 3 vectors of the input, loaded once", size=9)
    for v in range(3):
        d.cells(7 + 4.3 * v, 1.2, 1, 4, colours[v], line=0.5)
    d.text(0.3, 3.1, "M weights,", size=9)
    d.text(0.3, 3.8, "one at a time, in", size=9)
    d.text(0.3, 4.5, "all lanes (broadcast)", size=9)
    for m in range(5):
        y = 3.1 + 1.4 * m
        d.cell(5.4, y, RED, f"w{m}")
        for v in range(3):
            d.cells(7 + 4.3 * v, y, 1, 4, LIGHT, line=0.5)
            d.frame(7 + 4.3 * v, y, 4, 1, "black", 1.2)
    d.text(7, 10.5, "M x V vectors of sums stay in registers: sum[m][v] += w[m] * x[v]", size=9)
    d.text(7, 11.3, "M + V loads for M * V multiply-adds", size=9)
    d.save("tile")


def direct():
    d = Drawing(30, 12.3)
    d.text(0.5, 0.6, "3 rows of the image, with the border that a 3x3 kernel sees: pitch P = 6", size=9)
    shade = [BLUE, GREEN, ORANGE]

    def colour(i, j):
        return shade[i] if 0 < j < 5 else BORDER

    d.cells(0.5, 1.2, 3, 6, colour, lambda i, j: str(6 * i + j))
    d.text(9.5, 2.7, "the same, one row behind the other: a line", size=9)
    for place in range(18):
        d.cell(9.5 + place, 3.2, colour(*divmod(place, 6)), str(place))
    d.text(0.5, 6.1, "input, shifted by tap (0, 0): 0", size=8)
    d.text(0.5, 8.0, "input, shifted by tap (1, 1): P + 1", size=8)
    d.text(0.5, 9.9, "outputs: place q = oh*P + ow", size=8)
    for y, shift in (5.6, 0), (7.5, 7):
        for place in range(8):
            d.cell(9.5 + place, y, colour(*divmod(place + shift, 6)), str(place + shift))
        for v in range(2):
            d.frame(9.5 + 4 * v, y, 4, 1, "black", 1.8)
    for place in range(8):
        vain = place % 6 > 3
        d.cell(
            9.5 + place,
            9.4,
            GREY if vain else LIGHT,
            f"{place // 6},{place % 6}" if not vain else "",
            hatch="////" if vain else "",
        )
    for v in range(2):
        d.frame(9.5 + 4 * v, 9.4, 4, 1, "black", 1.8)
    d.text(18.3, 6.1, "vectors of 4, whatever the width of a row", size=8)
    d.text(18.3, 9.9, "hatched: between two rows, computed in vain", size=8)
    d.text(0.5, 11.5, "One shift per tap serves all outputs; no edge is left to test for.", size=9)
    d.save("direct")


def im2col():
    d = Drawing(28, 13)
    d.text(0.5, 0.6, "input, 4 x 4", size=9)
    d.cells(0.5, 1.2, 4, 4, GREY, lambda i, j: str(4 * i + j))
    d.frame(0.5, 1.2, 3, 3, "#d62728")
    d.frame(1.5, 1.2, 3, 3, "#1f77b4")
    d.text(11.2, 0.6, "unfolded: a column per output, a row per tap", size=9)
    pixels = [(0, 0), (0, 1), (1, 0), (1, 1)]
    colours = [RED, BLUE, LIGHT, LIGHT]
    for column, (oh, ow) in enumerate(pixels):
        for row in range(9):
            kh, kw = divmod(row, 3)
            d.cell(11.2 + column, 1.2 + row, colours[column], str(4 * (oh + kh) + ow + kw))
    d.text(15.8, 5, "… the columns run on\nfrom image to image", size=8)
    d.text(0.5, 6.7, "filters, a row each", size=9)
    d.cells(0.5, 7.3, 3, 9, ORANGE)
    d.text(9.9, 8.8, "x", size=12)
    d.arrow((20.5, 8.8), (22.5, 8.8))
    d.text(23, 6.7, "outputs", size=9)
    d.cells(23, 7.3, 3, 4, lambda i, j: colours[j])
    d.frame(11.2, 1.2, 4, 4, "black", 2.2)
    d.text(0.5, 11.4, "The unfolded matrix never exists: blocks of it (black) are packed from the image", size=9)
    d.text(0.5, 12.2, "when the product wants them, and each serves many filters.", size=9)
    d.save("im2col")


def channels_last():
    d = Drawing(29, 12.6)
    d.text(0.5, 0.6, "channels_last input: a pixel is a run of channels", size=9)
    for i in range(3):
        for j in range(5):
            inside = 1 <= j <= 3
            for c in range(3):
                d.cell(0.5 + 3 * j + c, 1.2 + i, CHANNELS[c] if inside else LIGHT, line=0.4)
            d.frame(0.5 + 3 * j, 1.2 + i, 3, 1, DARK, 1.0)
    d.frame(3.5, 1.2, 9, 3, "black", 2.4)
    d.text(16.2, 2.2, "one output's window: three runs of memory,", size=9)
    d.text(16.2, 3.0, "each a row of taps x channels, read in place", size=9)
    d.text(8.0, 5.6, "vectors of output channels, packed weights", size=9)
    for v in range(2):
        d.cells(8 + 4.3 * v, 6.1, 1, 4, ORANGE, line=0.5)
    d.text(0.5, 7.9, "one number of each of", size=9)
    d.text(0.5, 8.6, "M neighbouring pixels'", size=9)
    d.text(0.5, 9.3, "windows, broadcast", size=9)
    for m in range(4):
        y = 7.6 + 1.2 * m
        d.cell(6.6, y, CHANNELS[0], f"p{m}")
        for v in range(2):
            d.cells(8 + 4.3 * v, y, 1, 4, LIGHT, line=0.5)
            d.frame(8 + 4.3 * v, y, 4, 1, "black", 1.2)
    d.text(17.3, 8.4, "sums of M pixels x V vectors of channels:", size=9)
    d.text(17.3, 9.2, "written as they stand, since in channels_last", size=9)
    d.text(17.3, 10.0, "a pixel's output channels lie together, too", size=9)
    d.save("channels_last")


def winograd():
    d = Drawing(30.7, 11.5)
    d.text(0.5, 0.6, "input: patches of 6x6, 4 apart", size=9)
    d.cells(0.5, 1.2, 6, 10, GREY, edge="#aaaaaa", line=0.5)
    d.frame(0.5, 1.2, 6, 6, "#d62728", 2.2)
    d.frame(4.5, 1.2, 6, 6, "#1f77b4", 2.2)
    d.arrow((11, 4.2), (12.8, 4.2))
    d.text(11, 2.9, "B' x B", size=8)
    d.text(13.2, 0.6, "36 points", size=9)
    d.cells(13.2, 1.2, 6, 6, RED, edge="#888888", line=0.5)
    d.text(13.2, 7.8, "times the filter's 36,", size=8)
    d.text(13.2, 8.5, "summed over channels:", size=8)
    d.text(13.2, 9.2, "36 small matrix products", size=8)
    d.arrow((19.7, 4.2), (21.5, 4.2))
    d.text(19.8, 2.9, "A' s A", size=8)
    d.text(22, 0.6, "output: tiles of 4x4", size=9)
    d.cells(22, 2.2, 4, 4, RED, edge="#888888", line=0.5)
    d.cells(26, 2.2, 4, 4, BLUE, edge="#888888", line=0.5)
    d.text(22, 7.8, "16 outputs: 144 products", size=8)
    d.text(22, 8.5, "by the formula, 36 here", size=8)
    d.text(0.5, 7.8, "they overlap by 2: what a 3x3", size=8)
    d.text(0.5, 8.5, "kernel sees beyond 4 outputs", size=8)
    d.text(
        0.5,
        10.7,
        "A transform is worth its additions when many share it: a patch by output channels, a filter by tiles.",
        size=9,
    )
    d.save("winograd")


def depthwise():
    d = Drawing(28, 9.6)
    d.text(0.5, 0.6, "channels_last, one channel per group", size=9)
    colours = [RED, GREEN, BLUE, ORANGE]
    rows = [("x at tap 0", "x"), ("weights of tap 0", "w"), ("sums, += x * w", "y")]
    for i, (title, letter) in enumerate(rows):
        y = 1.6 + 1.9 * i
        d.text(0.5, y + 0.5, title, size=9)
        for lane in range(8):
            d.cell(7 + lane * 1.2, y, colours[lane % 4] if i < 2 else LIGHT, f"{letter}{lane}", width=1.2)
        d.frame(7, y, 9.6, 1, "black", 1.6)
    d.text(17.4, 2.1, "a vector of channels of one pixel", size=9)
    d.text(17.4, 4.0, "each lane its own filter", size=9)
    d.text(17.4, 5.9, "no lane is empty, none is added to another", size=9)
    d.text(0.5, 7.9, "With small groups (here of 2) lane k picks channel j of its group:", size=9)
    for lane in range(8):
        d.cell(7 + lane * 1.2, 8.4, colours[lane // 2], f"x{lane // 2 * 2}", width=1.2)
    d.text(17.4, 8.9, "j = 0: lanes 0 and 1 read x0, lanes 2 and 3 x2, …", size=9)
    d.save("depthwise")


def pooling():
    d = Drawing(30, 11)
    d.text(0.5, 0.6, "forward, contiguous: neighbouring outputs are the lanes", size=9)
    values = [[3, 7, 2, 2, 5, 1, 0, 4], [1, 4, 8, 2, 6, 9, 4, 3]]
    shades = [RED, GREEN, BLUE, ORANGE]
    d.cells(0.5, 1.2, 2, 8, lambda i, j: shades[j // 2], lambda i, j: values[i][j])
    d.arrow((9, 2.2), (10.5, 2.2))
    best, where = [7, 8, 9, 4], [1, 2, 3, 1]
    d.cells(11, 1.2, 1, 4, lambda i, j: shades[j], lambda i, j: best[j])
    d.cells(11, 2.4, 1, 4, LIGHT, lambda i, j: where[j])
    d.text(15.5, 1.7, "the largest of each window", size=8)
    d.text(15.5, 2.9, "its place in the window, kh*2 + kw: one byte", size=8)
    d.text(0.5, 5.1, "backward: a pixel asks the windows that see it", size=9)
    colours = {(0, 0): "#d62728", (0, 1): "#9467bd", (1, 0): "#2ca02c", (1, 1): "#1f77b4"}
    d.cells(11, 5.8, 5, 5, lambda i, j: ORANGE if (i, j) == (2, 2) else GREY)
    for (i, j), colour in colours.items():
        d.cell(0.5 + 1.5 * j, 6.8 + 1.5 * i, GREY, "gy", edge=colour, line=2.0)
        d.frame(11 + 2 * j, 5.8 + 2 * i, 3, 3, colour)
    d.arrow((4, 8.3), (10.6, 8.3))
    d.text(17, 6.8, "3x3 windows, stride 2: four see the orange pixel.", size=8)
    d.text(17, 7.6, "It adds gy of those whose stored place is itself,", size=8)
    d.text(17, 8.4, "in one order, and is written once: no zero-fill,", size=8)
    d.text(17, 9.2, "nobody else writes there.", size=8)
    d.save("pooling")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in window, layouts, tile, direct, im2col, channels_last, winograd, depthwise, pooling:
        draw()
