#!/usr/bin/env bash
# An engineer with a training loop: look at the installation, put one call into the loop.
#   bash loop.sh PYTHON TESTS
set -euo pipefail
python=$1
export PATH="$(dirname "$python"):$PATH"

kdfast doctor | tee said
grep -q 'The core works.' said
test "$(grep -c 'pip install' said)" -le 1
cat >loop.py <<'CODE'
import torch
from kdfast.functional import kd_kl_div
from kdfast.methods import DMKD, DMKDConfig

torch.manual_seed(0)
student, teacher = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4).eval().requires_grad_(False)
optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
first = last = None
for _ in range(50):
    batch = torch.randn(64, 8)
    loss = kd_kl_div(student(batch), teacher(batch), temperature=4.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    first, last = first or float(loss.detach()), float(loss.detach())
assert last < first / 10, (first, last)
try:
    DMKD(DMKDConfig(), teacher)
except TypeError as error:
    assert "student: got a DMKDConfig, accepted: a network" in str(error), error
else:
    raise AssertionError("a config passed for a network")
CODE
"$python" loop.py
