#!/usr/bin/env bash
# A researcher who wants numbers: seeds, a resumption that is refused and one that is not, a report.
#   bash numbers.sh PYTHON TESTS
set -euo pipefail
python=$1
export PATH="$(dirname "$python"):$PATH"

kdfast teach --data digits --out runs/teacher --quiet model=resnet8 image_size=8 epochs=3
kdfast distill --out runs/kd --seeds 2 --quiet --json method=kd \
  teacher=runs/teacher student=resnet8 data=digits test_data=digits epochs=2 >result
grep -q accuracy_mean result
grep -q '"share_kept_mean"' result
before=$(cat runs/kd/seed-0/recipe.yaml)
if kdfast distill --recipe runs/kd/seed-0/recipe.yaml --out runs/kd/seed-0 --resume lr=0.003 2>said; then exit 1; fi
grep -q 'lr: 0.05 before, 0.003 now' said
test "$before" = "$(cat runs/kd/seed-0/recipe.yaml)"
kdfast distill --recipe runs/kd/seed-0/recipe.yaml --out runs/kd/seed-0 --resume --quiet
if kdfast distill --out runs/x method=kd tacher=runs/teacher 2>said; then exit 1; fi
grep -q "did you mean 'teacher'?" said
