#!/usr/bin/env bash
# Every gpu test, every benchmark and its peers, in less than nine minutes, without a network.
#
#   benchmarks/kernels/gpu.sh [--only OP] ...          arguments go to benchmarks.kernels.run
#   benchmarks/kernels/gpu.sh --tune [--op TABLE] ...  to benchmarks.kernels.tune: tiles are timed
#
# Needs python3 (or $PYTHON) with torch, Triton and pytest. Peers: what `fetch_peers.sh` put into .peers/ on a
# machine with a network; without it the columns stay empty. Results: $OUT, or
# benchmarks/kernels/results; the table comes last.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=${TMPDIR:-/tmp}/tidemill-peers
if [ ! -d "$site" ] && compgen -G '.peers/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .peers/*.whl ||
    echo 'no peers: their wheels could not be installed'
fi
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}:$PWD/.peers/sources:$site" PYTHONUNBUFFERED=1
what=run
if [ "${1:-}" = --tune ]; then
  what=tune
  shift
fi
exec "$python" -m "benchmarks.kernels.$what" --out "${OUT:-benchmarks/kernels/results}" "$@"
