"""Adapters: frozen modules with a trained change beside them. Pure torch."""

from secura_lightning.adapters.base import AdapterConfig, AdapterLayer, Fusion
from secura_lightning.adapters.describe import describe_adapter, rebuild_adapter
from secura_lightning.adapters.full import FullConfig
from secura_lightning.adapters.inject import AdapterSet, inject
from secura_lightning.adapters.lora import LoRAConfig
from secura_lightning.adapters.secura import SECURAConfig

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterSet",
    "FullConfig",
    "Fusion",
    "LoRAConfig",
    "SECURAConfig",
    "describe_adapter",
    "inject",
    "rebuild_adapter",
]
