"""Low-rank adapters by PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..processes.modules import copied
from ..tensors import check_count, check_positive


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2106.09685), which PEFT adds: they alone are trained, and saved.

    Args:
        rank: of the matrices beside each layer's own.
        targets: names, or last parts of names, of the layers that get them; the attention's by default.
        alpha: their scale times the rank; the rank if not given.
    """

    rank: int = 8
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_positive("alpha", self.alpha, optional=True)
        if isinstance(self.targets, str) or not all(isinstance(name, str) for name in self.targets):
            raise TypeError(f"targets must be several names of layers, such as ('to_q', 'to_v'), got {self.targets!r}.")

    def added_to(self, network: nn.Module) -> nn.Module:
        """A network with the same weights and these adapters; the given one stays as it is.

        Raises:
            ImportError: PEFT is not installed. ValueError: no layer has such a name.
        """
        try:
            from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("LoRA needs PEFT; pip install 'sdecontrol[diffusers]'.") from error
        weights = tuple(network.parameters())
        flags = [p.requires_grad for p in weights]
        settings = {
            "r": self.rank,
            "target_modules": list(self.targets),
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
        }
        try:
            return get_peft_model(copied(network, shared=weights), LoraConfig(**settings))  # type: ignore[arg-type]
        finally:
            for p, flag in zip(weights, flags):
                p.requires_grad_(flag)
