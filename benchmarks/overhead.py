"""What a call costs beside the computing: every kind of module on a 1x1x4x4 input, ours and torch.nn's in turn.

Prints microseconds, the least of many rounds: a median would tell of the machine's other users.
"""

import time

import torch
from rich.console import Console
from rich.table import Table

import cnnops

MODULES = {
    "Conv2d": (1, 1, 3),
    "ConvTranspose2d": (1, 1, 3),
    "MaxPool2d": (2,),
    "AvgPool2d": (2,),
    "AdaptiveAvgPool2d": (2,),
    "ReLU": (),
    "ReLU6": (),
    "LeakyReLU": (),
}


def least(*calls, rounds=25, repeats=1000):
    """Microseconds of each call; the rounds take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            best[i] = min(best[i], (time.perf_counter() - start) / repeats * 1e6)
    return best


def main():
    torch.set_num_threads(1)
    table = Table("module", "forward: ours", "torch.nn", "with backward: ours", "torch.nn")
    for name, arguments in MODULES.items():
        calls = [], []
        for library in cnnops.nn, torch.nn:
            module = getattr(library, name)(*arguments)
            x = torch.randn(1, 1, 4, 4)
            leaf = x.clone().requires_grad_()
            inputs, gy = [leaf, *module.parameters()], torch.ones_like(module(x))
            calls[0].append(lambda module=module, x=x: module(x))
            calls[1].append(lambda m=module, x=leaf, inputs=inputs, gy=gy: torch.autograd.grad(m(x), inputs, gy))
        with torch.no_grad():
            forward = least(*calls[0])
        table.add_row(name, *(f"{t:.2f}" for t in (*forward, *least(*calls[1]))))
    Console().print(table)


if __name__ == "__main__":
    main()
