"""``nn.Module``s: torch's own classes with this package's functions in their forward.

Being subclasses that add no state, they keep state_dict, repr, deepcopy, pickle and isinstance
checks. :func:`convert` exchanges the layers of a whole model by exchanging their class.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import functional as F

__all__ = [
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
]


class _Layer:
    """The keyword `impl` of every layer; a class attribute: exchanged layers have it too."""

    impl: str | None = None
    _function: str  # its name in `functional`, where torch.fx finds and wraps it

    def __init__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if impl is not None:
            self.impl = impl

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script calls before all else."""
        raise RuntimeError(F.NO_TORCHSCRIPT)


class _Conv(_Layer):
    def __init__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> None:
        # torch's constructor refuses 'same' with a stride; the functions here do not.
        same = len(args) < 5 and kwargs.get("padding") == "same" and kwargs.get("stride", 1) != 1
        if same:
            kwargs["padding"] = "valid"
        super().__init__(*args, impl=impl, **kwargs)
        if same:
            setattr(self, "padding", "same")  # noqa: B010 - the type of torch's attribute differs

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return getattr(F, self._function)(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            impl=self.impl,
        )


class _ConvTranspose(_Layer):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        spatial = len(self.kernel_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            spatial,
            self.dilation,
        )
        return getattr(F, self._function)(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            tuple(output_padding),
            self.groups,
            self.dilation,
            impl=self.impl,
        )


class _MaxPool(_Layer):
    ties: str = "first"

    def __init__(self, *args: Any, ties: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if ties is not None:
            self.ties = ties

    def forward(self: Any, input: Tensor) -> Any:
        return getattr(F, self._function)(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
            ties=self.ties,
            impl=self.impl,
        )


class _MaxUnpool(_Layer):
    def forward(
        self: Any, input: Tensor, indices: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        return getattr(F, self._function)(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class Conv1d(_Conv, nn.Conv1d):
    """``torch.nn.Conv1d`` computed by :func:`functional.conv1d`; also takes ``impl``."""

    _function = "conv1d"


class Conv2d(_Conv, nn.Conv2d):
    """``torch.nn.Conv2d`` computed by :func:`functional.conv2d`; also takes ``impl``.

    >>> import torch
    >>> layer = Conv2d(3, 8, kernel_size=3, padding=1)
    >>> layer
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    >>> layer(torch.zeros(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    _function = "conv2d"


class Conv3d(_Conv, nn.Conv3d):
    """``torch.nn.Conv3d`` computed by :func:`functional.conv3d`; also takes ``impl``."""

    _function = "conv3d"


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` computed by :func:`functional.conv_transpose1d`."""

    _function = "conv_transpose1d"


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` computed by :func:`functional.conv_transpose2d`."""

    _function = "conv_transpose2d"


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` computed by :func:`functional.conv_transpose3d`."""

    _function = "conv_transpose3d"


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` computed by :func:`functional.max_pool1d`; also takes ``ties``."""

    _function = "max_pool1d"


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` computed by :func:`functional.max_pool2d`; also takes ``ties``."""

    _function = "max_pool2d"


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` computed by :func:`functional.max_pool3d`; also takes ``ties``."""

    _function = "max_pool3d"


class MaxUnpool1d(_MaxUnpool, nn.MaxUnpool1d):
    """``torch.nn.MaxUnpool1d`` computed by :func:`functional.max_unpool1d`."""

    _function = "max_unpool1d"


class MaxUnpool2d(_MaxUnpool, nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` computed by :func:`functional.max_unpool2d`."""

    _function = "max_unpool2d"


class MaxUnpool3d(_MaxUnpool, nn.MaxUnpool3d):
    """``torch.nn.MaxUnpool3d`` computed by :func:`functional.max_unpool3d`."""

    _function = "max_unpool3d"


OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): globals()[name] for name in __all__ if name != "convert"
}
TORCHS = {ours: torchs for torchs, ours in OURS.items()}

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, back: bool = False) -> Model:
    """Exchange every convolution and max-pooling layer of a model, in place.

    Layers keep their parameters, hooks and identity: only their class changes. Parametrized layers
    (``weight_norm``) and lazy ones are exchanged too. Subclasses of torch's layers that other
    packages define are left alone: they may compute something else.

    Args:
        model: any module; itself a layer or a container of layers.
        back: True turns this package's layers into torch's again.

    Returns:
        The same model.

    >>> from torch import nn
    >>> model = convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)))
    >>> [type(layer).__module__.split(".")[0] for layer in model]
    ['torch_naiveconv', 'torch', 'torch_naiveconv']
    """
    table = TORCHS if back else OURS
    for module in model.modules():
        kind = type(module)
        if kind in table:
            module.__class__ = table[kind]
        elif is_parametrized(module) and kind.__base__ in table:
            # The class of this one layer (and its copies): torch's, plus a property per tensor.
            module.__class__ = type(kind.__name__, (table[kind.__base__],), dict(vars(kind)))
        elif isinstance(module, LazyModuleMixin) and module.cls_to_become in table:
            module.cls_to_become = table[module.cls_to_become]
    return model
