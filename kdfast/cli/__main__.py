"""``python -m kdfast.cli``, which ``torchrun -m kdfast.cli`` and ``accelerate launch -m kdfast.cli`` need."""

from __future__ import annotations

from kdfast.cli import main

main()
