"""The networks of the lecture notes, as they are written there.

Each takes `ops`, the module that convolution, pooling and ReLU come from: `cnnops.nn` makes our network, `torch.nn` its
twin. Everything else (linear layers, dropout) is torch's in both. Comments give the shape after a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F


def lecture(ops) -> nn.Module:
    """Four convolutions without padding, one pooling, one linear layer."""
    return nn.Sequential(
        ops.Conv2d(1, 16, 5),  # 16 x 24 x 24
        ops.ReLU(),
        ops.Conv2d(16, 32, 5),  # 32 x 20 x 20
        ops.ReLU(),
        ops.MaxPool2d(2),  # 32 x 10 x 10
        ops.Conv2d(32, 64, 5),  # 64 x 6 x 6
        ops.ReLU(),
        ops.Conv2d(64, 128, 5),  # 128 x 2 x 2
        ops.ReLU(),
        nn.Flatten(),  # 512
        nn.Linear(512, 10),
    )


def two_layer(ops) -> nn.Module:
    """Two convolutions that keep the size, each pooled to half of it."""
    return nn.Sequential(
        ops.Conv2d(1, 32, 3, padding=1),  # 32 x 28 x 28
        ops.ReLU(),
        ops.MaxPool2d(2),  # 32 x 14 x 14
        ops.Conv2d(32, 64, 3, padding=1),  # 64 x 14 x 14
        ops.ReLU(),
        ops.MaxPool2d(2),  # 64 x 7 x 7
        nn.Flatten(),  # 3136
        nn.Linear(3136, 10),
    )


def keras(ops) -> nn.Module:
    """The notes' Keras model: 840,554 parameters, nearly all of them in the dense layer, hence the dropout."""
    return nn.Sequential(
        ops.Conv2d(1, 32, 5),  # 32 x 24 x 24
        ops.ReLU(),
        ops.MaxPool2d(2),  # 32 x 12 x 12
        nn.Dropout(0.2),
        ops.Conv2d(32, 32, 3),  # 32 x 10 x 10
        ops.ReLU(),
        ops.MaxPool2d(2),  # 32 x 5 x 5
        nn.Dropout(0.2),
        nn.Flatten(),  # 800
        nn.Linear(800, 1024),
        ops.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(1024, 10),
    )


def mlp(ops) -> nn.Module:
    """No convolution at all, for comparison: two hidden layers, and log-probabilities for the NLL loss."""
    return nn.Sequential(
        nn.Flatten(),  # 784
        nn.Linear(784, 512),
        ops.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 512),
        ops.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
        nn.LogSoftmax(dim=1),
    )


@dataclass(frozen=True)
class Model:
    build: Callable[..., nn.Module]
    loss: Callable = F.cross_entropy


MODELS = {
    "lecture": Model(lecture),
    "two-layer": Model(two_layer),
    "keras": Model(keras),
    "mlp": Model(mlp, F.nll_loss),
}
