"""What the compiler makes of kernels for GPUs that are not here; where that cannot be seen, importing this skips."""

from __future__ import annotations

import pytest

from tests.conftest import INTERPRETING

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from bench.static_audit import CAPABILITIES, TOOLS, KernelReport, audit, meta

if not (TOOLS / "cuobjdump").exists():
    pytest.skip("this build of Triton brings no disassembler", allow_module_level=True)

__all__ = ["CAPABILITIES", "KernelReport", "audit", "meta"]
