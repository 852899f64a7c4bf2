"""Models with adapters, as PEFT makes them: the reference is the model without them, and they alone are trained.

Nothing of PEFT is imported. A layer with adapters has ``adapter_layer_names``, the names of its parts that are theirs,
and a flag that leaves them out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import at_least_single
from .masters import MasterWeights, half_parameters
from .modules import copied, standing_in, without_compiling


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "adapter_layer_names") and hasattr(m, "_disable_adapters")]


def _own(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters."""
    parts = [getattr(layer, name, None) for layer in _layers(model) for name in layer.adapter_layer_names]
    found = {id(p): p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    return list(found.values())


class WithoutAdapters(nn.Module):
    """A model called without its adapters, whose weights it shares; the model itself stays as it is.

    Attributes:
        base: a copy of the model's layers with the same parameters, adapters left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = copied(model, shared=tuple(model.parameters()))
        for layer in _layers(self.base):
            if layer.merged_adapters:
                raise ValueError("the model's adapters are merged into its weights; unmerge_adapter() takes them out.")
            layer._disable_adapters = True
        self._given = [model]
        if not any(p.requires_grad for p in _own(model)):
            raise ValueError(
                "none of the model's adapters takes gradients: there is nothing to train. Load them with "
                "is_trainable=True, or without inference_mode."
            )

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.base(*args, **named)

    def tunable(self) -> Adapters:
        """A copy with adapters of its own, and the same weights beside them."""
        return Adapters(self._given[0])


def _to_single(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = at_least_single(p.data)


class Adapters(nn.Module):
    """A model whose adapters are its parameters; its other weights are those of another one, and not its own to train,
    to copy or to save.

    Low-rank adapters of half precision are kept in float32, so that no step of training is lost; the layers of PEFT
    take both.

    Attributes:
        own_dtype: in which the model is called: that of its other weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        theirs = {id(p) for p in _own(model)}
        self.network = without_compiling(copied(model, shared=[p for p in model.parameters() if id(p) not in theirs]))
        self._given: list[nn.Module] = [model]
        self._fixed: list[tuple[nn.Module, str, Tensor]] = []
        own = {id(p) for p in _own(self.network)}
        for layer in _layers(self.network):
            layer._disable_adapters = False
            for name in layer.adapter_layer_names:
                if name.startswith("lora_") and isinstance(part := getattr(layer, name, None), nn.Module):
                    _to_single(part)
        for part in self.network.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and id(p) not in own:
                    del part._parameters[name]
                    self._fixed.append((part, name, p.detach()))
                    part.__dict__[name] = self._fixed[-1][2]
        floating = (t.dtype for *_, t in self._fixed if t.is_floating_point())
        self.own_dtype: torch.dtype | None = next(floating, None)

    def forward(self, *args: Any, **named: Any) -> Any:
        with standing_in(self._fixed):
            return self.network(*args, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        memo.update({id(t): t for *_, t in self._fixed} | {id(self._given): self._given})
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def whole(self) -> nn.Module:
        """The model as it was given, a copy, with these adapters."""
        made = without_compiling(copied(self._given[0]))
        made.load_state_dict(self.network.state_dict(), strict=False)
        for layer in _layers(made):
            layer._disable_adapters = False
        return made


def as_reference(model: Any) -> Any:
    """A pre-trained model as its user gave it; without its adapters, where it has some.

    Raises:
        ValueError: adapters that are merged, or without parameters to train.
    """
    return WithoutAdapters(model) if isinstance(model, nn.Module) and _layers(model) else model


def tunable_copy(model: nn.Module) -> nn.Module:
    """A copy to be trained: of a model with adapters these alone are its own, and one of half precision has its weights
    in float32."""
    if isinstance(model, WithoutAdapters):
        return model.tunable()
    if isinstance(model, nn.parallel.DistributedDataParallel):  # gradients are summed over processes elsewhere
        model = model.module
    return MasterWeights(model) if half_parameters(model) else copied(model)
