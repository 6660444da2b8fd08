"""An argument check that every operation shares."""

from __future__ import annotations

from torch import Tensor


def check_devices(first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError, naming the argument, unless all lie on the device of the first.

    On the meta device nothing is computed: a run for shapes keeps its integers on the CPU.
    """
    if first.is_meta:
        return
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, need {first.device}")
