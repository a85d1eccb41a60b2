#!/usr/bin/env bash
# Trains the model that a TOML describes; sets up a Python environment first if need be.
#
#   ./run_llama_train.sh [--section.key value ...]
#
# CONFIG_FILE   the TOML, or the name of a shipped one (default: train_configs/debug_model.toml)
# NGPU          processes, one a GPU (default: the GPUs of this machine; on a CPU 1)
# LOG_RANK      ranks whose progress is shown, such as 0 or 0,3 (default: 0)
#
# Relative paths start where you stand.
set -euo pipefail

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
CONFIG_FILE=${CONFIG_FILE:-$PWD/train_configs/debug_model.toml}

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env
if [[ -e $here/torchtitan/train.py && ! $here -ef $PWD ]]; then
    die "$here is another clone, whose code Python would run: use the run_llama_train.sh there."
fi
cd "$here"

has_gpu=false
if [[ -e /dev/nvidiactl || -e /dev/kfd || -e /dev/dxg ]]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [[ $gpus == 0 ]] || has_gpu=true
fi
if [[ -z ${NGPU:-} ]]; then
    NGPU=1
    [[ $has_gpu == false ]] || NGPU=$gpus
fi
[[ $NGPU =~ ^[1-9][0-9]*$ ]] || die "NGPU = $NGPU: it is the number of processes, 1 or more."

export LOG_RANK=${LOG_RANK:-0}
if [[ $has_gpu == true ]]; then
    # Segments that grow lose less memory to fragmentation.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi

if [[ " $* " == *" --comm.mode"[\ =]fake_backend* || " $* " == *" --"@(check|help)[\ =]* ]]; then
    # A dry run or a check is one process, however many it is for.
    export WORLD_SIZE=${WORLD_SIZE:-$NGPU}
    NGPU=1
fi
if [[ $NGPU == 1 ]]; then
    # Without torchrun: the exit status is the run's own.
    exec "$PYTHON" -m torchtitan.train --job.config_file "$CONFIG_FILE" "$@"
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    # torchrun would set it to 1, with a warning.
    threads=$(($(getconf _NPROCESSORS_ONLN) / NGPU))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
# One message here instead of one amid a traceback of the launcher.
echo "Checking the run for $NGPU processes ..." >&2
report=$(WORLD_SIZE=$NGPU "$PYTHON" -m torchtitan.cli train \
    --job.config_file "$CONFIG_FILE" --check full "$@" 2>&1) || {
    status=$?
    printf '%s\n' "$report" >&2
    exit "$status"
}
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$NGPU" \
    --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    -m torchtitan.train --job.config_file "$CONFIG_FILE" "$@"
