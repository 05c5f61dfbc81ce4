#!/usr/bin/env bash
# Where the time of a run goes, with kdfast's ranges in it:
#
#   bash bench/profile.sh OUT                             one training step of each method, before and after kdfast
#   bash bench/profile.sh OUT -m kdfast.cli demo --out X  any Python command line: a script, or -m and a module
#
# With Nsight Systems (nsys) on a machine with a GPU: OUT/profile.nsys-rep for its viewer, and sums of ranges, kernels
# and API calls as CSV. Without either, torch.profiler: OUT/trace.json (open it in ui.perfetto.dev or chrome://tracing)
# and OUT/ranges.txt. PYTHON chooses the interpreter.
set -euo pipefail

OUT=${1:-}
if [[ -z $OUT || $OUT == -* ]]; then
  echo "usage: bash bench/profile.sh OUT [SCRIPT | -m MODULE] [ARGUMENTS...]" >&2
  exit 2
fi
shift
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
[[ $# -gt 0 ]] || set -- "$ROOT/bench/profile_step.py"
export KDFAST_PROFILE=1 PYTHONUNBUFFERED=1

on_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

if command -v nsys > /dev/null && on_gpu; then
  nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --force-overwrite=true --output="$OUT/profile" \
    "$PYTHON" "$@"
  nsys stats --force-export=true --report=nvtx_sum,cuda_gpu_kern_sum,cuda_api_sum --format=csv \
    --output="$OUT/profile" "$OUT/profile.nsys-rep"
else
  echo "no nsys, or no GPU for it: torch.profiler instead" >&2
  "$PYTHON" "$ROOT/bench/trace.py" "$OUT" "$@"
fi
