"""Full fine-tuning through the adapter interface: a target trains a clone of its weight, the base keeps the original.

``W = W0 + (W_t - W0)`` with ``W_t`` trained: reversible, measurable and checkpointed like every other adapter. Works on
any module whose own parameters are ``weight`` and ``bias`` (linear layers, embeddings, norms). Weights that the model
ties stay tied: the modules share one trained clone. Weight decay acts on the weight itself, as without an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from secura_lightning.adapters.base import ALL_LINEAR, AdapterLayer, TargetedConfig, require
from secura_lightning.adapters.numerics import dense_weight, gathered, is_linear, is_quantized, stored_layout
from secura_lightning.errors import ConfigError

EVERYTHING = "everything"


@dataclass(kw_only=True)
class FullConfig(TargetedConfig):
    """Full fine-tuning of the targets: `all-linear`, `everything` (embeddings, norms and head too), or names."""

    keywords: ClassVar[tuple[str, ...]] = (ALL_LINEAR, EVERYTHING)
    whole_weights: ClassVar[bool] = True

    def accepts(self, module: nn.Module) -> bool:
        """Linear modules for `all-linear`, otherwise every module that owns parameters."""
        return is_linear(module) if self.targets == ALL_LINEAR else bool(_own_parameters(module))

    def check_model(self, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Refuse to train half of a tied pair.

        Raises:
            ConfigError: A target's weight is shared with a module that is not a target.
        """
        chosen = {id(module) for module in targets.values()}
        owners = {id(p): name for name, module in targets.items() for p in _own_parameters(module).values()}
        for name, module in model.named_modules():
            tied = [owners[id(p)] for p in _own_parameters(module).values() if id(p) in owners]
            require(
                not tied or id(module) in chosen,
                f"model.adapter.targets names {', '.join(tied)}, whose weight is tied to {name}: name both, or neither",
            )

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> FullLayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        if is_quantized(base):
            raise ConfigError(
                f"model.adapter.class_path FullConfig cannot train {name}, whose weight is quantised: "
                "set model.quantization: none, or choose an adapter such as LoRAConfig"
            )
        strange = sorted(set(_own_parameters(base)) - {"weight", "bias"})
        require(
            not strange,
            f"{name} ({type(base).__name__}) owns parameters that full fine-tuning does not know "
            f"({', '.join(strange)}): leave it out with model.adapter.exclude",
        )
        return FullLayer(base)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module._parameters.items() if value is not None}


class FullLayer(AdapterLayer):
    """A module that runs with trained clones of its ``weight`` and ``bias``.

    Args:
        base: The frozen module.

    Attributes:
        tuned_weight: Clone of the weight in the working type and the base's layout, or None.
        tuned_bias: Clone of the bias, or None.
    """

    tuned_weight: nn.Parameter | None
    tuned_bias: nn.Parameter | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        for name in ("weight", "bias"):
            own = _own_parameters(base).get(name)
            # fp32 also on a bf16 base: a bf16 weight would swallow most steps of the optimizer.
            clone = None if own is None else nn.Parameter(own.detach().to(self.work_dtype, copy=True))
            self.register_parameter(f"tuned_{name}", clone)

    @property
    def weight(self) -> Tensor | None:
        """The weight in use; model code that computes with ``module.weight`` itself gets the trained one."""
        return self.tuned_weight if self.enabled else cast("Tensor | None", self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        return self.tuned_bias if self.enabled else cast("Tensor | None", getattr(self.base, "bias", None))

    def _set_tied(self, name: str, value: Tensor | None) -> None:
        own = getattr(self, f"tuned_{name}")
        if isinstance(value, nn.Parameter) and own is not None and value.requires_grad:
            self.register_parameter(f"tuned_{name}", value)
        else:
            super()._set_tied(name, value)

    def share_clones(self, clones: dict[int, nn.Parameter]) -> None:
        """Modules that share a frozen weight train one clone of it; see :meth:`AdapterLayer.share_clones`."""
        for name, original in _own_parameters(self.base).items():
            clone = cast(nn.Parameter, getattr(self, f"tuned_{name}"))
            self.register_parameter(f"tuned_{name}", clones.setdefault(id(original), clone))

    def merge_key(self) -> int:
        """Equal for layers that share a clone."""
        return id(self.tuned_weight)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's forward with the trained weight and bias."""
        if not self.enabled:
            return cast(Tensor, self.base(*args, **kwargs))
        trained = {
            name: clone.to(cast(Tensor, getattr(self.base, name)).dtype)
            for name, clone in (("weight", self.tuned_weight), ("bias", self.tuned_bias))
            if clone is not None
        }
        if type(self.base) is nn.Linear and len(args) == 1:  # the same, without functional_call's bookkeeping
            return F.linear(args[0], trained["weight"], trained.get("bias"))
        return cast(Tensor, functional_call(self.base, trained, args, kwargs))

    def untouched(self) -> dict[str, Tensor]:
        """The base's own weight and bias."""
        return {
            f"tuned_{name}": value.detach().to(self.work_dtype, copy=True)
            for name, value in _own_parameters(self.base).items()
        }

    def delta_weight(self) -> Tensor:
        """W_t - W0 in the working type, (out, in) for linear modules and in the weight's own shape otherwise."""
        if self.tuned_weight is None:
            raise AttributeError(f"{type(self.base).__name__} has no weight")
        tuned = stored_layout(self.base, gathered(self.tuned_weight.detach()))
        return tuned - dense_weight(self.base).to(tuned.dtype)

    def delta_bias(self) -> Tensor | None:
        """b_t - b_0, or None without a bias."""
        if self.tuned_bias is None:
            return None
        tuned, own = gathered(self.tuned_bias.detach()), gathered(cast(Tensor, self.base.bias).detach())
        return tuned - own.to(tuned.dtype)

    def merged_weight(self, onto: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """W_t rounded to the base's type: not W0 + (W_t - W0), whose rounding could differ."""
        assert self.tuned_weight is not None
        if onto is not None:
            return super().merged_weight(onto, dtype)
        return self.tuned_weight.detach().to(dtype or cast(Tensor, self.base.weight).dtype, copy=True)

    def merged_bias(self) -> Tensor | None:
        """b_t rounded to the base's type."""
        if self.tuned_bias is None:
            return None
        return self.tuned_bias.detach().to(cast(Tensor, self.base.bias).dtype, copy=True)
