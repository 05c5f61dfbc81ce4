#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under nine minutes:
#
#   bash bench/gpu_campaign.sh OUT              all parts
#   PARTS="tests losses" bash bench/gpu_campaign.sh OUT
#   bash bench/gpu_campaign.sh OUT --dry-run    every command line at its smallest, on a CPU
#
# It asks for a Python with torch and triton (PYTHON=python3) and a CUDA GPU; no network, no installed kdfast, no
# virtual environment. It works on a copy, so the checkout stays as it is. A part that fails or runs out of its time
# does not stop the others; the summary comes last. What is missing (a compiler, pytest, ncu, a peer) is named.
#
#   build      the C++ extension, with the compiler and torch's own copy of pybind11
#   doctor     what is installed, which backend runs each op, a self-test on the GPU
#   tests      the tests marked `gpu`
#   losses denoise replay data    the kernels' benchmark suites, each into OUT/SUITE/results.{json,md}
#   methods    every other suite, together into OUT/methods/
#   sanitizer  compute-sanitizer memcheck over one small call of each family
#   ncu        Nsight Compute on the main kernels
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-}
DRY=${2:-}
if [[ -z $OUT || $OUT == -* || (-n $DRY && $DRY != --dry-run) ]]; then
  echo "usage: [PARTS=\"...\"] bash bench/gpu_campaign.sh OUT [--dry-run]" >&2
  exit 2
fi
PYTHON=${PYTHON:-python3}
KERNELS="losses denoise replay data"
ALL="build doctor tests $KERNELS methods sanitizer ncu"
PARTS=${PARTS:-$ALL}
for part in $PARTS; do
  if [[ " $ALL " != *" $part "* ]]; then
    echo "gpu_campaign: PARTS: got $part; accepted: $ALL" >&2
    exit 2
  fi
done
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)

# Seconds of each part; together 530.
declare -A LIMIT=([build]=60 [doctor]=15 [tests]=110 [losses]=85 [denoise]=40 [replay]=35 [data]=35 [methods]=90 [sanitizer]=30 [ncu]=30)

STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
KDFAST_COMMIT=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null || true)
export KDFAST_COMMIT PYTHONPATH=$STAGE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if [[ $DRY ]]; then
  # Tests are collected, suites take their smallest sizes, and tools that a CPU has no use for are only looked up.
  BENCH=(--tiny --device cpu)
  for part in "${!LIMIT[@]}"; do LIMIT[$part]=$((4 * LIMIT[$part])); done # a CPU may be slow, and shared
else
  BENCH=(--quick --device cuda)
fi

# The layout of an installed kdfast (kernels/ and recipes/ inside the package), and what its tests read.
stage() {
  local name
  for name in kdfast tests bench csrc docs kernels recipes pyproject.toml README.md CHANGELOG.md Makefile; do
    cp -r "$ROOT/$name" "$STAGE/" || return
  done
  rm -f "$STAGE"/kdfast/_C*.so
  cp -r "$ROOT/kernels" "$STAGE/kdfast/kernels" && cp -r "$ROOT/recipes" "$STAGE/kdfast/recipes"
}

absent() {
  echo "ABSENT: $1"
  return 69
}

part_build() {
  local cxx=${CXX:-c++} suffix includes
  command -v "$cxx" > /dev/null || { absent "no C++ compiler ($cxx): kdfast.replay is left out"; return; }
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || return
  includes=$("$PYTHON" -c 'import sysconfig, torch.utils.cpp_extension as c
print(*("-I" + path for path in [*c.include_paths(), sysconfig.get_path("include")]))') || return
  # shellcheck disable=SC2086 # the includes are several words
  "$cxx" -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -ffp-contract=off -pthread \
    -I"$STAGE/csrc" $includes "$STAGE"/csrc/*.cpp -o "$STAGE/kdfast/_C$suffix" &&
    "$PYTHON" -c 'import kdfast._C; print("built", kdfast._C.__name__)'
}

part_doctor() {
  "$PYTHON" -c '
import sys
from kdfast.experiments import doctor
report = doctor.run()
print(report.as_text())
sys.exit(not report.healthy)'
}

part_tests() {
  "$PYTHON" -c 'import pytest, hypothesis' || { absent "pytest and hypothesis are needed"; return; }
  # Without the project's addopts and plugins, which need not be here; another family's
  # missing dependency must not hide this one's results.
  local options=(-o addopts= -p no:cacheprovider -q -m gpu --continue-on-collection-errors)
  # Most of the time goes into compiling kernels, on the CPU: several processes, where pytest has them.
  if [[ $DRY ]]; then
    options+=(--collect-only)
  elif "$PYTHON" -c 'import xdist' 2> /dev/null; then
    options+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist load)
  fi
  (cd "$STAGE" && "$PYTHON" -m pytest "${options[@]}" --junit-xml="$OUT/tests.xml" tests)
}

suite() { "$PYTHON" -m kdfast.benchmarks --suite "$1" "${BENCH[@]}" --out "$OUT/$1"; }
part_losses() { suite losses; }
part_denoise() { suite denoise; }
part_replay() { suite replay; }
part_data() { suite data; }
# Whatever has no part of its own; written after each suite, so that a limit costs the last ones only.
part_methods() {
  local name chosen=()
  for name in $("$PYTHON" -m kdfast.benchmarks --list); do
    [[ " $KERNELS " == *" $name "* ]] || chosen+=(--suite "$name")
  done
  "$PYTHON" -m kdfast.benchmarks "${chosen[@]}" "${BENCH[@]}" --out "$OUT/methods"
}

smoke() { "$PYTHON" "$STAGE/bench/kernel_smoke.py" --device "$([[ $DRY ]] && echo cpu || echo cuda)" "$@"; }

part_sanitizer() {
  smoke || return
  local tool
  tool=$(find_tool compute-sanitizer) || { absent "compute-sanitizer is not installed"; return; }
  [[ $DRY ]] || PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --error-exitcode 1 \
    "$PYTHON" "$STAGE/bench/kernel_smoke.py" --device cuda
}

part_ncu() {
  smoke --large || return
  local tool
  tool=$(find_tool ncu) || { absent "ncu is not installed"; return; }
  [[ $DRY ]] || "$tool" --clock-control none --kernel-name 'regex:kd_kl|denoise|replay|pair' --launch-count 12 \
    --section SpeedOfLight --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis \
    --csv --log-file "$OUT/ncu.csv" "$PYTHON" "$STAGE/bench/kernel_smoke.py" --device cuda --large
}

find_tool() {
  command -v "$1" || { [[ -x /usr/local/cuda/bin/$1 ]] && echo "/usr/local/cuda/bin/$1"; }
}

stage || { echo "gpu_campaign: could not copy the checkout to $STAGE" >&2; exit 1; }
"$PYTHON" -c 'import torch, triton' || { echo "gpu_campaign: $PYTHON has no torch or no triton" >&2; exit 1; }
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && [[ ! $DRY ]]; then
  echo "gpu_campaign: torch finds no CUDA device; --dry-run tries every command on a CPU" >&2
  exit 1
fi
[[ $DRY ]] && echo "dry run on a CPU: nothing that is timed here means anything"

# Parts run in a shell of their own, so that `timeout` can end all of one, its children included.
export -f part_build part_doctor part_tests part_losses part_denoise part_replay part_data part_methods
export -f part_sanitizer part_ncu
export -f absent suite smoke find_tool
export STAGE OUT DRY PYTHON KERNELS
SUMMARY="$OUT/summary.txt"
: > "$SUMMARY"
failures=0
for part in $PARTS; do
  printf '\n== %s (%ds so far) ==\n' "$part" "$SECONDS"
  began=$SECONDS
  timeout --signal=INT --kill-after=10 "${LIMIT[$part]}" bash -c "BENCH=(${BENCH[*]}); part_$part" 2>&1 | tee "$OUT/$part.log" | tail -n 40
  status=${PIPESTATUS[0]}
  case $status in
    0) verdict=ok ;;
    69) verdict="absent: $(sed -n 's/^ABSENT: //p' "$OUT/$part.log" | tail -n 1)" ;;
    124 | 137) verdict="ran out of its ${LIMIT[$part]} s" ;;
    *) verdict="failed with $status; see $part.log" ;;
  esac
  [[ $status == 0 || $status == 69 ]] || failures=$((failures + 1))
  printf '%-10s %4ds  %s\n' "$part" $((SECONDS - began)) "$verdict" >> "$SUMMARY"
done

printf '\n== summary (%ds) ==\n' "$SECONDS"
cat "$SUMMARY"
echo "Results are in $OUT; bench/results/GPU/DATE/ is where a campaign's results belong."
[[ $failures == 0 ]]
