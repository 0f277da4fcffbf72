#!/usr/bin/env bash
# What only a GPU can show, in about ten minutes and without network: the tests of the five files on the card,
# then the measurements of benchmarks/gpu.py. `benchmarks/gpu.sh --tiny` runs the same on a CPU in about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --no-index --no-deps --dry-run --quiet -r requirements.txt  # fails if one is missing or old
device=cuda
tests=(tests/test_{opd,rollout,schedules,train,eval_math}.py tests/extras/test_graphs.py)
if [[ " $* " == *" --tiny "* ]]; then
  device=cpu
  tests=(tests/test_opd.py tests/test_schedules.py)  # the others take minutes
fi
if [[ $device == cuda ]] && ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "error: there is no CUDA device here: add --tiny, which runs on a CPU" >&2
  exit 2
fi
workers=()
if python -c "import xdist" 2>/dev/null; then
  workers=(-n "$(nproc | awk '{print $1 < 4 ? 1 : $1 < 16 ? 4 : 8}')")
fi
failed=0
python -m pytest -q --slow "${workers[@]}" --device "$device" "${tests[@]}" || failed=$?
python benchmarks/gpu.py "$@"
exit "$failed"
