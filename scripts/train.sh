#!/usr/bin/env bash
# Train a model; on a fresh machine, set up first.
#
#   bash scripts/train.sh [CONFIG.toml] [--section.key value ...]
#
#   NGPU=4 bash scripts/train.sh ...        number of processes (default 1)
#   LOG_RANK=0,1 bash scripts/train.sh ...  whose output is shown (default 0)
#
# Without a configuration it trains the debug Mixture-of-Transformers on the embedded data.
set -euo pipefail

config=train_configs/mot/debugmodel.toml
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    config=$1
    # A path is meant from where the command was given.
    [ ! -e "$config" ] || config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config")
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
prepare_environment

processes=${NGPU:-1}
if [ "$processes" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ] && ! command -v nvidia-smi >/dev/null; then
    # torchrun would give each process one thread; share the cores instead.
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null || echo 1)
    OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
    export OMP_NUM_THREADS
fi
exec python scripts/launch.py --standalone --nproc_per_node="$processes" --local-ranks-filter "${LOG_RANK:-0}" \
    --role rank --tee 3 -m torchtitan_mixtures.train --config "$config" "$@"
