"""Ops: registration, fake implementations, autograd and the choice of backend, one file a family."""
