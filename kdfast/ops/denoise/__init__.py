"""One step of a linear sampler: checks, the eager path, and the op that torch.compile sees."""

from kdfast.ops.denoise.eager import StepResult, denoise_step, guided_output, predicted_variance
from kdfast.reference.denoise import COLUMNS, NO_GUIDANCE, Guidance

__all__ = [
    "COLUMNS",
    "NO_GUIDANCE",
    "Guidance",
    "StepResult",
    "denoise_step",
    "guided_output",
    "predicted_variance",
]
