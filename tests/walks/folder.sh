#!/usr/bin/env bash
# A practitioner with a folder of images: train a teacher, distil a student, take it home. Run in an empty folder.
#   bash folder.sh PYTHON TESTS    the interpreter that has kdfast, and the folder of this script
set -euo pipefail
python=$1 here=$2
export PATH="$(dirname "$python"):$PATH"

"$python" "$here/shapes.py" flowers 150 40 # 900 to train on, 240 to test on

kdfast keys teach >said && grep -q image_size said
kdfast distill --help >said && grep -q epochs said
kdfast teach --data flowers --out runs/flowers/teacher --dry-run \
  image_size=24 epochs=50 2>said
grep -q 'flowers/train, 900 images, 6 classes of 150' said
grep -q 'flowers/val, 240 images' said
grep -q 'sides of 160 pixels shrunk to 24×24' said
grep -q 'nothing was written' said
test ! -e runs

started=$(date +%s)
kdfast teach --data flowers --out runs/flowers/teacher \
  model=resnet14 image_size=24 epochs=50 batch_size=32 \
  optimizer=adamw lr=0.003 schedule=cosine augment=[crop,flip]
kdfast distill --out runs/flowers/student method=fitnet \
  teacher=runs/flowers/teacher student=resnet8 \
  data=flowers test_data=flowers epochs=30 batch_size=32 \
  optimizer=adamw lr=0.003 schedule=cosine augment=[crop,flip] 2>said
cat said
echo "first student after $(($(date +%s) - started)) seconds, of them computing:"
times
grep -q "of the teacher's" said
grep -q 'runs/flowers/student/model.safetensors  (last epoch)' said
grep -q 'runs/flowers/student/best.safetensors  (best: ' said

"$python" - <<'CODE'
import json

metrics = json.load(open("runs/flowers/student/metrics.json"))
print({name: metrics[name] for name in ("teacher_accuracy", "best_accuracy", "share_kept")})
assert min(metrics["teacher_accuracy"], metrics["best_accuracy"]) > 0.5, "one in six is chance"
CODE
test "$(kdfast eval runs/flowers/student --data flowers/val -q --json | grep -o '"images": [0-9]*')" = '"images": 240'
kdfast export runs/flowers/student --to torch.export --weights best
"$python" - <<'CODE'
import sys

import torch

program = torch.export.load("runs/flowers/student/export/model.pt2").module()
assert program(torch.zeros(5, 3, 24, 24)).shape == (5, 6)
assert "kdfast" not in sys.modules
CODE
