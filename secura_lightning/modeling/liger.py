"""liger-kernel's fused kernels (norms, rotary embedding, gated MLP) in a loaded base model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from secura_lightning.errors import ConfigError

_OFF = "or set model.liger: false"


def apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Replace what liger-kernel has kernels for, before adapters are injected; the loss stays ours.

    Args:
        model: The base model.
        device: Where it will be trained.

    Raises:
        ConfigError: The device is no CUDA GPU, liger-kernel is not installed, or has nothing for this architecture.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"model.liger: its kernels need a CUDA GPU, and this run is on {device.type}: use one, {_OFF}"
        )
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise ConfigError(
            f"model.liger: liger-kernel is not installed: pip install 'secura_lightning[liger]', {_OFF}"
        ) from error
    kind = model.config.model_type
    if kind not in known:  # liger-kernel itself would say so in a log line, and do nothing
        raise ConfigError(f"model.liger: liger-kernel has no kernels for {kind}: use another base, {_OFF}")
    apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
