"""Convolution and max-pooling for PyTorch whose every bit is defined by the naive loop.

``functional`` has the functions of ``torch.nn.functional``, ``modules`` the layers, ``convert``
exchanges the layers of a model, ``explain`` describes them, ``conv_matrix`` is a convolution as a
sparse matrix, ``cs231n`` has the course's four functions.
"""

import json
import sys

__version__ = "0.1.0"

try:
    from . import cs231n, functional
except ImportError as error:
    if sys.argv == ["-m", "doctor", "--json"]:  # which cannot be imported either
        print(json.dumps({"torch_naiveconv": __version__, "advice": [str(error)]}, indent=2))
    raise
from .audit import audit
from .conformance import SPEC_ID
from .drift import drift
from .explain_model import explain
from .functional import implementations
from .matrix import conv_matrix
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
    "audit",
    "conv_matrix",
    "convert",
    "cs231n",
    "drift",
    "explain",
    "functional",
    "implementations",
]
