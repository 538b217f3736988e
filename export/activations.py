"""Activations under the names of a hub config's ``hidden_act``."""

from collections.abc import Callable
from functools import partial

from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,  # by erf
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
}
