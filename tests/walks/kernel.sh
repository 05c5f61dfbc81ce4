#!/usr/bin/env bash
# A maintainer: measure, change nothing, pass the gate; break a row, and stand before it.
#   bash kernel.sh PYTHON TESTS
set -euo pipefail
python=$1
export PATH="$(dirname "$python"):$PATH"

"$python" - <<'CODE'
import json

def result(kdfast, **reason):
    samples = {"seconds": {"wall": [kdfast, kdfast, kdfast]}} if kdfast else reason
    rows = [{"name": "kdfast", **samples}, {"name": "eager", "seconds": {"wall": [2.0, 2.0, 2.0]}}]
    return {"format": 1, "name": "here", "errors": [], "cases": [{"key": "losses/mine", "providers": rows}]}

for name, text in {"before": result(1.0), "slower": result(1.5), "wrong": result(None, wrong="by 3")}.items():
    with open(f"{name}.json", "w") as file:
        json.dump(text, file)
CODE
kdfast bench --compare before.json before.json
if kdfast bench --compare before.json slower.json 2>said; then exit 1; fi
grep -q 'kdfast takes +50.0 %' said
if kdfast bench --compare before.json wrong.json 2>said; then exit 1; fi
grep -q 'was timed before and is not now (wrong: by 3)' said
