#!/usr/bin/env bash
# Everything that only a GPU can tell, for a machine that is yours for minutes:
#
#   bash bench/gpu_campaign.sh OUT              from the beginning
#   bash bench/gpu_campaign.sh OUT --resume     what OUT/results.jsonl does not have yet
#   bash bench/gpu_campaign.sh OUT --dry-run    every step at its smallest, on a CPU
#
#   PYTHON   an interpreter with torch and triton                                      python3
#   PARTS    some of bench/campaign/plan.py's parts, e.g. PARTS="losses feature"       all, most wanted first
#   BUDGET   seconds until the last part is ended                                      540
#   WHEELS   a folder of wheels that the interpreter lacks                             ../wheels beside the tree
#   CACHE    where Triton's and Inductor's caches stay between runs                    under TMPDIR
#
# It needs no network, no installed kdfast and no virtual environment, and leaves the tree as it is. In OUT there are at
# most four files: results.jsonl (a line for everything that is known, on disk before the next thing is begun), run.log,
# tests.xml and ncu.csv. Kill it when you like: what has a line is kept, and --resume goes on.
set -uo pipefail

usage() {
  echo "usage: [PARTS=\"...\"] [BUDGET=seconds] bash bench/gpu_campaign.sh OUT [--resume] [--dry-run]" >&2
  exit 2
}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-}
[[ -n $OUT && $OUT != -* ]] || usage
shift
RESUME='' DRY=''
for word in "$@"; do
  case $word in
    --resume) RESUME=1 ;;
    --dry-run) DRY=--dry ;;
    *) usage ;;
  esac
done
PYTHON=${PYTHON:-python3}
[[ $OUT == /* ]] || OUT=$PWD/$OUT
if [[ -e $OUT/results.jsonl && ! $RESUME ]]; then
  echo "gpu_campaign: $OUT holds a campaign; --resume goes on with it, or name another folder" >&2
  exit 2
fi

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
CACHE=${CACHE:-${TMPDIR:-/tmp}/kdfast-campaign-cache-$(id -u)}
STAGE=$CACHE/stage-$$
for old in "$CACHE"/stage-*; do # of campaigns that were killed
  kill -0 "${old##*-}" 2> /dev/null || rm -rf "$old"
done
mkdir -p "$STAGE" || exit 1
trap 'rm -rf "$STAGE"' EXIT
export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor
KDFAST_COMMIT=$(git -C "$ROOT" rev-parse HEAD 2> /dev/null || cat "$ROOT/REVISION" 2> /dev/null || true)
export KDFAST_COMMIT

# The layout of an installed kdfast (kernels/ and recipes/ inside the package), and what its tests read.
stage() {
  local name
  for name in kdfast tests bench csrc docs kernels recipes pyproject.toml README.md CHANGELOG.md Makefile; do
    cp -r "$ROOT/$name" "$STAGE/" || return
  done
  rm -f "$STAGE"/kdfast/_C*.so
  cp -r "$ROOT/kernels" "$STAGE/kdfast/kernels" && cp -r "$ROOT/recipes" "$STAGE/kdfast/recipes"
}
stage || { echo "gpu_campaign: could not copy the tree to $STAGE" >&2; exit 1; }

# The tree first, then wheels, then whatever the caller has there: a peer that was carried along must be found.
export PYTHONPATH=$STAGE:$STAGE/site${PYTHONPATH:+:$PYTHONPATH}
WHEELS=${WHEELS:-$ROOT/../wheels}
if compgen -G "$WHEELS/*.whl" > /dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$STAGE/site" \
    "$WHEELS"/*.whl || echo "gpu_campaign: the wheels of $WHEELS could not be installed; their rows will say so" >&2
fi

[[ $DRY ]] && echo "dry run on a CPU: nothing that is timed here means anything"
cd "$STAGE" && "$PYTHON" -m bench.campaign "$OUT" "$STAGE" ${DRY:+"$DRY"}
