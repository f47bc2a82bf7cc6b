"""Convolution and max-pooling for PyTorch whose every bit is defined by the naive loop.

``functional`` has the functions of ``torch.nn.functional``, ``modules`` the layers, ``convert``
exchanges the layers of a model, ``cs231n`` has the course's four functions.
"""

from . import cs231n, functional
from .functional import implementations
from .modules import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    convert,
)

__version__ = "0.1.0"
SPEC_ID = (
    "NC-1"  # the numeric contract (docs/contract.md); another order of additions gets another id
)

__all__ = [
    "SPEC_ID",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "convert",
    "cs231n",
    "functional",
    "implementations",
]
