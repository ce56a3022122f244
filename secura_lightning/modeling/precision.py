"""What ``trainer.precision`` means, for commands that run a model without a trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Lightning's short names.
_FULL_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def full_name(precision: Any) -> str:
    """Lightning's full name of ``trainer.precision``, such as ``bf16-mixed`` for ``bf16``; None is ``32-true``."""
    return _FULL_NAMES.get(str(precision), str(precision))


def autocast_type(precision: Any) -> torch.dtype | None:
    """The type that ``trainer.precision`` multiplies in under autocast, or None where it means no autocast."""
    return _AUTOCAST.get(full_name(precision))


def autocast(precision: Any, device: str) -> AbstractContextManager[object]:
    """The autocast of ``trainer.precision`` on a type of device, as ``fit`` has it."""
    kind = autocast_type(precision)
    return nullcontext() if kind is None else torch.autocast(device, kind)
