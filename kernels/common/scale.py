"""What multiplies a row's loss, and how it and strides travel to a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scale(NamedTuple):
    """What multiplies a row's divergence: T²·weight/divisor, zero where the mask is False.

    ``temperature`` and ``divisor`` are floats, or 0-d tensors on the device that are read by the kernel, so
    that a captured graph sees their current values. ``weight`` and ``mask`` hold one value a row, contiguous.
    """

    temperature: torch.Tensor | float
    divisor: torch.Tensor | float
    weight: torch.Tensor | None
    mask: torch.Tensor | None

    def on(self, device: torch.device) -> Scale:
        """The same with numbers for 0-d tensors of another device: no kernel can read them, and the host need not wait.

        torch.compile hands a temperature in host memory on as it is, since it does not look at values.
        """
        if type(self.temperature) is float and type(self.divisor) is float:
            return self
        temperature, divisor = (
            float(x) if isinstance(x, torch.Tensor) and x.device.type == "cpu" != device.type else x
            for x in (self.temperature, self.divisor)
        )
        return self._replace(temperature=temperature, divisor=divisor)


def value_and_pointer(value: torch.Tensor | float) -> tuple[float, torch.Tensor | None]:
    """A number and where it lies in memory, one of which a kernel uses."""
    return (1.0, value) if isinstance(value, torch.Tensor) else (float(value), None)
