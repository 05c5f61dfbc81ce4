"""Divergences of logits as modules."""

from __future__ import annotations

from kdfast.functional import divergence_loss, jsd_loss
from kdfast.functional._reduction import Reduction
from kdfast.functional.divergence import Kind
from kdfast.nn.fixed import Fixed, OfLogits

__all__ = ["DivergenceLoss", "JSDLoss"]


class JSDLoss(OfLogits, Fixed):
    """:func:`kdfast.functional.jsd_loss` with its options fixed.

    Args:
        beta: β in [0, 1]; 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher).
        temperature: T > 0.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.

    Shape:
        Two tensors of logits of one shape → a 0-d tensor (for ``reduction="none"``, one value a row).
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        *,
        dim: int = -1,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__(locals())

    function = staticmethod(jsd_loss)


class DivergenceLoss(OfLogits, Fixed):
    """:func:`kdfast.functional.divergence_loss` with its options fixed.

    Args:
        kind: Which divergence.
        temperature: T > 0.
        teacher_temperature: Of the teacher; None: the same.
        beta: β of ``"jsd"`` and ``"ab"``.
        alpha: α of the skew divergences, of ``"alpha"`` and of ``"ab"``.
        dim: The class dimension.
        reduction: As in :func:`~kdfast.functional.kd_kl_div`.

    Shape:
        Two tensors of logits of one shape → a 0-d tensor (for ``reduction="none"``, one value a row).
    """

    def __init__(
        self,
        kind: Kind = "forward_kl",
        temperature: float = 1.0,
        *,
        teacher_temperature: float | None = None,
        beta: float = 0.5,
        alpha: float = 0.5,
        dim: int = -1,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__(locals())

    function = staticmethod(divergence_loss)
