"""How long a call takes on a device: CUDA events around replays of a graph; on a CPU the benchmark's own clock.

What is timed is a list of calls that differ only in where their operands lie, called in turn: with enough copies no
operand is still in the cache when its turn comes again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from math import ceil

import torch

from benchmarks import measure

SAMPLE = 1e-3  # seconds
LONGEST_GRAPH = 200  # calls
COPIES = 32  # at most
Sampler = Callable[[], float]  # seconds per call


def rounds(seconds: float, least: int = 5, most: int = 20) -> Iterator[int]:
    end = time.monotonic() + seconds
    for turn in range(most):
        if turn >= least and time.monotonic() > end:
            return
        yield turn


class CpuClock:
    device = "cpu"
    modes = ("eager",)
    why_not_captured = "a CPU has no CUDA graphs"

    def copies(self, bytes_of_one: int) -> int:
        return 2

    def sampler(self, calls: list[Callable], mode: str = "eager") -> Sampler:
        turns = cycle(calls)
        once = max(measure.sample(lambda: next(turns)(), 2), 1e-9)
        number = ceil(SAMPLE / once)
        return lambda: measure.sample(lambda: next(turns)(), number)

    def free(self) -> None:
        pass


class CudaClock:
    device = "cuda"
    modes = ("eager", "captured")

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size

    def copies(self, bytes_of_one: int) -> int:
        return max(1, min(COPIES, ceil(3 * self.cache / bytes_of_one)))

    def elapsed(self, work: Callable) -> float:
        with torch.cuda.stream(self.stream):
            self.start.record()
            work()
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3

    def sampler(self, calls: list[Callable], mode: str = "captured") -> Sampler:
        """captured: a graph of calls, as many as last a millisecond. eager: as many calls, launches included."""
        torch.cuda.synchronize()  # operands were made on another stream

        def eager():
            for call in islice(cycle(calls), number):
                call()

        number = max(3, len(calls))
        self.elapsed(eager)  # whatever is chosen, compiled or loaded at the first call
        if mode == "captured":
            number = len(calls)
            replay = self.capture(calls, number).replay
            self.elapsed(replay)
            more = self.enough(self.elapsed(replay) / number, len(calls))
            if more > number:
                number, replay = more, self.capture(calls, more).replay
            self.elapsed(replay)
            return lambda: self.elapsed(replay) / number
        number = self.enough(self.elapsed(eager) / number, len(calls))
        return lambda: self.elapsed(eager) / number

    def enough(self, once: float, copies: int) -> int:
        return copies * max(1, min(LONGEST_GRAPH // copies, ceil(SAMPLE / once / copies)))

    def capture(self, calls: list[Callable], number: int) -> torch.cuda.CUDAGraph:
        """Results stay until every copy had its turn, so that they are written to as many places."""
        graph, kept = torch.cuda.CUDAGraph(), deque(maxlen=len(calls))
        with torch.cuda.stream(self.stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in islice(cycle(calls), number):
                    kept.append(call())
            finally:
                graph.capture_end()
        return graph

    def free(self) -> None:
        """The memory of graphs that are gone; emptying the allocator takes long, so not after each."""
        if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory / 4:
            torch.cuda.empty_cache()


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def race(samplers: dict[str, Sampler], seconds: float) -> dict[str, list[float]]:
    """Quartile, median, quartile of each, in turns."""
    samples = measure.take_turns(samplers, rounds(seconds))
    return {name: measure.spread(times) for name, times in samples.items()}
