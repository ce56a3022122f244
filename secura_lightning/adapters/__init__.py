"""Adapters: frozen modules with a trained change beside them. Pure torch."""

from secura_lightning.adapters.base import AdapterConfig, AdapterLayer, Fusion
from secura_lightning.adapters.curlora import CURLoRAConfig
from secura_lightning.adapters.describe import describe_adapter, rebuild_adapter
from secura_lightning.adapters.dora import DoRAConfig
from secura_lightning.adapters.full import FullConfig
from secura_lightning.adapters.inject import AdapterSet, inject, merge
from secura_lightning.adapters.lora import LoRAConfig
from secura_lightning.adapters.lora_null import LoRANullConfig
from secura_lightning.adapters.null_sequence import LoRANullSequenceConfig
from secura_lightning.adapters.secura import SECURAConfig
from secura_lightning.adapters.svd_init import MiLoRAConfig, PiSSAConfig

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterSet",
    "CURLoRAConfig",
    "DoRAConfig",
    "FullConfig",
    "Fusion",
    "LoRAConfig",
    "LoRANullConfig",
    "LoRANullSequenceConfig",
    "MiLoRAConfig",
    "PiSSAConfig",
    "SECURAConfig",
    "describe_adapter",
    "inject",
    "merge",
    "rebuild_adapter",
]
