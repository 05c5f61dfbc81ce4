"""What contributors run in a checkout: ``python -m kdfast.dev new-op NAME`` writes an op to begin with."""

from kdfast.dev.skeleton import new_op

__all__ = ["new_op"]
