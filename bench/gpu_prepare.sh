#!/usr/bin/env bash
# What travels to a machine with a GPU and without a network:
#
#   bash bench/gpu_prepare.sh DEST           DEST/tree: the checkout's files, with its revision in REVISION, and
#                                            DEST/wheels: what the campaign's peers need (bench/gpu_wheels.txt)
#   bash bench/gpu_prepare.sh DEST --dali    DEST/dali: DALI's wheel in parts of 48 MiB, an errand of its own
#
# There, `bash tree/bench/gpu_campaign.sh OUT` finds the wheels beside the tree. DALI's parts are joined and installed by
#
#   cat dali/*.part-* > nvidia_dali.whl && ...   as DEST/dali/README says
#
#   PIP       what downloads                                                           python3 -m pip
#   FOR       the Python that the wheels are for                                       3.12
#   LEAVE_OUT_WHEELS=1 makes the tree alone, for which no network is needed
set -euo pipefail

DEST=${1:-}
if [[ -z $DEST || $DEST == -* || (-n ${2:-} && $2 != --dali) ]]; then
  echo "usage: bash bench/gpu_prepare.sh DEST [--dali]" >&2
  exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PIP=${PIP:-python3 -m pip}
FOR=${FOR:-3.12}
mkdir -p "$DEST"
DEST=$(cd "$DEST" && pwd)

mebibytes() { du -sm --apparent-size "$1" | cut -f1; }

# pip matches each platform by its name: none of them stands for the older ones.
download() { # FOLDER REQUIREMENTS...
  local folder=$1 platforms=() tag
  shift
  for tag in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 \
    manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  $PIP download -q --no-deps --only-binary=:all: --implementation cp --python-version "$FOR" "${platforms[@]}" \
    -d "$folder" "$@"
}

if [[ ${2:-} == --dali ]]; then
  rm -rf "$DEST/dali"
  mkdir -p "$DEST/dali"
  download "$DEST/dali" "$(sed -n '/^nvidia-dali-cuda130==/p' "$ROOT/tests/constraints.txt")"
  wheel=$(basename "$DEST"/dali/*.whl)
  split -b 48M -d "$DEST/dali/$wheel" "$DEST/dali/$wheel.part-"
  rm "$DEST/dali/$wheel"
  printf 'cat %s.part-* > %s && python3 -m pip install --no-index --no-deps --target site %s\n' "$wheel" "$wheel" "$wheel" \
    > "$DEST/dali/README"
  ls -l "$DEST/dali"
  exit 0
fi

rm -rf "$DEST/tree" "$DEST/wheels"
mkdir -p "$DEST/tree"
# What git knows, and what it would take in: no environments, no builds, no results of other machines' runs.
(
  cd "$ROOT"
  git ls-files -z --cached --others --exclude-standard -- . ':!docs/pages/assets' ':!bench/results' |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar --null -T - -cf -
) | tar -xf - -C "$DEST/tree"
revision=$(git -C "$ROOT" rev-parse HEAD)
[[ -z $(git -C "$ROOT" status --porcelain) ]] || revision+=+
echo "$revision" > "$DEST/tree/REVISION"
size=$(mebibytes "$DEST/tree")
if ((size > 20)); then
  echo "gpu_prepare: the tree is $size MiB; 20 are meant to travel. What is large:" >&2
  du -am "$DEST/tree" | sort -rn | head -n 8 >&2
  exit 1
fi
if [[ -z ${LEAVE_OUT_WHEELS:-} ]]; then
  download "$DEST/wheels" -r "$ROOT/bench/gpu_wheels.txt"
  total=$(mebibytes "$DEST")
  if ((total > 64)); then
    echo "gpu_prepare: $total MiB in all; 64 are meant to travel at once" >&2
    exit 1
  fi
fi
echo "$DEST: tree $size MiB at $revision${LEAVE_OUT_WHEELS:+, no wheels}"
[[ -n ${LEAVE_OUT_WHEELS:-} ]] || ls "$DEST/wheels"
