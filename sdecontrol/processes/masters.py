"""Models of half precision that are tuned: their weights are kept in float32, of which each call makes its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..precision import at_least_single, dtype_of
from .modules import copied, standing_in, without_compiling


def half_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of half precision."""
    return [p for p in module.parameters() if p.is_floating_point() and at_least_single(p.dtype) != p.dtype]


class MasterWeights(nn.Module):
    """A copy of a model of half precision, called in it, whose parameters are float32: an optimiser's steps are
    smaller than the rounding of 8 bits, and would be lost (Micikevicius et al. 1710.03740).

    Gradients are those by the rounded weights, summed over calls in float32. A compiled model is called uncompiled:
    its weights are others in every call.

    Attributes:
        network: the copy. own_dtype: in which it is called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = without_compiling(copied(model))
        self.own_dtype: Any = dtype_of(model)
        masters: dict[int, nn.Parameter] = {}  # layers may share weights
        self._places: list[tuple[nn.Module, str, torch.dtype]] = []
        for part in self.network.modules():
            for name, p in list(part._parameters.items()):
                if p is None or at_least_single(p.dtype) == p.dtype:
                    continue
                if isinstance(part, nn.RNNBase):
                    raise ValueError(
                        f"the model has a {type(part).__name__} of {p.dtype}, whose weights torch keeps elsewhere too: "
                        "it cannot be tuned in half precision. Give the model in float32 (model.float()), and call "
                        "solve inside torch.autocast."
                    )
                if id(p) not in masters:
                    masters[id(p)] = nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
                part._parameters[name] = masters[id(p)]
                self._places.append((part, name, p.dtype))
        if any(dtype == torch.float16 for *_, dtype in self._places):
            warn(
                "a model of float16 is tuned: gradients below 6e-8 are lost on their way through it. bfloat16 "
                "(model.bfloat16()) has the range of float32."
            )

    def forward(self, *args: Any, **named: Any) -> Any:
        own: dict[tuple[int, torch.dtype], Tensor] = {}
        places: list[tuple[nn.Module, str, Tensor]] = []
        for part, name, dtype in self._places:
            master: Any = part._parameters[name]
            if (id(master), dtype) not in own:
                with torch.enable_grad():
                    own[id(master), dtype] = master.to(dtype)
            places.append((part, name, own[id(master), dtype]))
            # found before parameters are looked for, also where a checkpointed layer is computed again
            part.__dict__[name] = own[id(master), dtype]
        with standing_in(places):
            return self.network(*args, **named)

    def whole(self) -> nn.Module:
        """The model as it was given, with these weights rounded to its own precision."""
        made = copy.deepcopy(self)
        for part, name, dtype in made._places:
            master: Any = part._parameters[name]
            part._parameters[name] = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
        return made.network

    def _without_own(self) -> dict[str, Any]:
        for part, name, _ in self._places:
            part.__dict__.pop(name, None)  # made by every call
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> MasterWeights:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self._without_own(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._without_own())
