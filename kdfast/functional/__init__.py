"""What users call: validated, documented, dispatched to a kernel or to the reference."""

from kdfast.functional.denoise import denoise_step

__all__ = ["denoise_step"]
