#!/usr/bin/env bash
# Train on the nodes of a Slurm cluster; the job goes on by itself after each time limit.
#
#   bash scripts/submit_slurm.sh CONFIG.toml [options] [--section.key value ...]
#
#   --nodes N            (default 1)
#   --gpus-per-node G    and as many processes on each (default NGPU, else 1). 0 asks for no GPUs:
#                        NGPU processes on CPUs, or on what --sbatch-arg=--gres=gpu:8 asks for
#   --time T, --partition P, --account A, --job-name NAME     as sbatch has them
#   --sbatch-arg=ARG     any other argument of sbatch; may be repeated
#   --dry-run            print the command, do nothing
#   --                   only keys of the TOML follow
#
#   LOG_RANK=0,1         which processes of each node to show (default 0), each line with its node
#
# Two minutes before its time limit the job puts itself back into the queue, where it also goes
# when a node fails. It then resumes from the last checkpoint in job.dump_folder, so a checkpoint
# (checkpoint.interval) must fit into the time limit. `scancel` ends it for good.
#
# Given to sbatch (`sbatch [its options] scripts/submit_slurm.sh CONFIG.toml ...`, from the
# checkout) or started in an allocation of salloc, it trains on the nodes that are already there.
#
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail

stop() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

usage() {
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

quoted() {
    local words
    printf -v words '%q ' "$@"
    printf '%s\n' "${words% }"
}

# --- What was asked for -------------------------------------------------------------------------

config='' dry_run=no
nodes='' gpus='' name=''
sbatch_arguments=() # what --time and the like become
submission=''       # the first option that only a submission can follow
overrides=()        # keys of the TOML and their values

parse() {
    local option value
    while [ $# -gt 0 ]; do
        option=${1%%=*}
        case $option in
            --)
                shift
                overrides+=("$@")
                return
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --dry-run)
                [ "$1" = --dry-run ] || stop "--dry-run takes no value: $1."
                dry_run=yes
                ;;
            --nodes | --gpus-per-node | --time | --partition | --account | --job-name | --sbatch-arg)
                if [[ $1 = *=* ]]; then
                    value=${1#*=}
                else
                    [ $# -gt 1 ] && [[ $option = --sbatch-arg || $2 != --* ]] ||
                        stop "$option needs a value."
                    value=$2
                    shift
                fi
                [ -n "$value" ] || stop "$option needs a value."
                submission=${submission:-$option}
                case $option in
                    --nodes) nodes=$value ;;
                    --gpus-per-node) gpus=$value ;;
                    --job-name) name=$value ;;
                    --sbatch-arg) sbatch_arguments+=("$value") ;;
                    *) sbatch_arguments+=("$option=$value") ;;
                esac
                ;;
            --*.*) overrides+=("$1") ;;
            *)
                # A value of the key before it, which may be negative or empty; else CONFIG.
                if [[ $1 = -* && ! ( ${#overrides[@]} -gt 0 && $1 =~ ^-[0-9.] ) ]]; then
                    stop "unknown option $1. Keys of the TOML are --section.key;" \
                        "--help lists the options, and --sbatch-arg=$1 gives sbatch one of its own."
                elif [ ${#overrides[@]} -gt 0 ]; then
                    overrides+=("$1")
                elif [ -z "$config" ]; then
                    config=$1
                else
                    stop "'$1' after the configuration '$config': neither an option nor a" \
                        "--section.key of the TOML."
                fi
                ;;
        esac
        shift
    done
}

parse "$@"
[ -n "$config" ] ||
    stop "no configuration: bash scripts/submit_slurm.sh CONFIG.toml [options]" \
        "(see train_configs/, and --help)."
[[ ${nodes:=1} =~ ^[1-9][0-9]{0,5}$ ]] || stop "--nodes $nodes: must be a whole number, at least 1."
[[ ${gpus:=${NGPU:-1}} =~ ^(0|[1-9][0-9]{0,3})$ ]] ||
    stop "--gpus-per-node $gpus: must be a whole number; 0 asks for no GPUs."

# --- Where: Slurm runs a copy of this file, which says nothing about the checkout ---------------

# A path is meant from where the command was given.
if [ -f "$config" ]; then
    config=$(cd "$(dirname "$config")" && pwd -P)/$(basename "$config")
fi
here=$(dirname "${BASH_SOURCE[0]}")
for root in "$here/.." "$PWD" "$PWD/.." "${SLURM_SUBMIT_DIR:-$PWD}" "${SLURM_SUBMIT_DIR:-$PWD}/.." ''; do
    [ -z "$root" ] || [ ! -f "$root/scripts/launch.py" ] || break
done
[ -n "$root" ] || stop "$PWD is not the checkout of torchtitan_mixtures: give the command there," \
    "or submit with bash PATH/scripts/submit_slurm.sh, which works anywhere."
# -P: one path on all machines, whatever links lead to it.
cd -P "$root"
root=$PWD
[ -f "$config" ] || stop "$config: no such configuration (see $root/train_configs)."
. scripts/environment.sh

# --- Outside Slurm: submit this file ------------------------------------------------------------

# A mistake in the configuration is better told now than when the nodes are there. What the nodes
# have (data, GPUs) is not looked at.
check_configuration() {
    NODES=$nodes PROCESSES=$1 python - --config "$config" "${@:2}" <<'PYTHON'
import os
import sys

from torchtitan_mixtures.layout_checks import check_batch_sizes
from torchtitan_mixtures.train import parse_job, quiet_the_host
from torchtitan_mixtures.user_errors import one_message

sys.argv[0] = "scripts/train.sh"  # whose --help lists the keys
quiet_the_host()
with one_message():
    job = parse_job(sys.argv[1:], check=lambda job: None)
    ranks = int(os.environ["NODES"]) * int(os.environ["PROCESSES"])
    layout = job.parallelism
    for kind in ("tensor", "context", "pipeline"):
        ranks //= max(1, getattr(layout, f"{kind}_parallel_degree"))
    check_batch_sizes(job, max(1, ranks))
    if not job.checkpoint.enable:
        print("warning: checkpoint.enable is false: a job that reaches its time limit starts over "
              "from step 0, again and again. --sbatch-arg=--no-requeue prevents it.",
              file=sys.stderr)
PYTHON
}

submit() {
    local command processes=${NGPU:-1}
    [ -n "$name" ] || name=$(basename "$config" .toml)
    command=(
        sbatch "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1
        "--chdir=$root" "--output=outputs/slurm/%x-%j.out"
    )
    if [ "$gpus" -gt 0 ]; then
        command+=("--gpus-per-node=$gpus")
        processes=$gpus
    fi
    # Without GPUs, and no NGPU, the job counts those that another argument of sbatch asked for.
    if [ "$gpus" -gt 0 ] || [ -n "${NGPU:-}" ]; then
        command+=("--export=ALL,NGPU=$processes")
    fi
    command+=("${sbatch_arguments[@]}" "$root/scripts/submit_slurm.sh" "$config")
    [ ${#overrides[@]} -eq 0 ] || command+=(-- "${overrides[@]}")
    if [ "$dry_run" = yes ]; then
        quoted "${command[@]}"
        return
    fi
    command -v sbatch >/dev/null ||
        stop "sbatch is not on PATH: submit from a login node of the cluster," \
            "or see the command with --dry-run."
    # Here and once, not by every node; they have the same checkout.
    prepare_environment
    check_configuration "$processes" "${overrides[@]}"
    mkdir -p outputs/slurm # sbatch would not, and the job would fail without a word
    "${command[@]}"
}

# --- In a job: one torchrun on every node -------------------------------------------------------

requeue() {
    interrupted=yes
    [ "$requeued" = no ] || return 0
    requeued=yes
    echo "The time limit is near: job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "warning: it could not be requeued (see above); it ends at its time limit." >&2
}

train() {
    local command first processes=${NGPU:-${SLURM_GPUS_ON_NODE:-1}}
    local node_count=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
    [[ $SLURM_JOB_ID =~ ^[0-9]+$ ]] || stop "SLURM_JOB_ID=$SLURM_JOB_ID: not the number of a job."
    [ -z "$submission" ] ||
        stop "$submission, but this already runs in Slurm job $SLURM_JOB_ID: give it to sbatch or" \
            "salloc. To submit another job from here: env -u SLURM_JOB_ID bash scripts/submit_slurm.sh ..."
    [[ $processes =~ ^[1-9][0-9]*$ ]] || stop "NGPU=$processes: must be a whole number, at least 1."
    first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}") && [ -n "$first" ] ||
        stop "scontrol cannot say which nodes job $SLURM_JOB_ID has (see above)."
    first=${first%%$'\n'*}

    # All variables, as the job may have been submitted without; no more nodes when one has failed.
    command=(
        srun "--nodes=$node_count" "--ntasks=$node_count" --ntasks-per-node=1
        --export=ALL --kill-on-bad-exit=1 --label
    )
    # srun does not take this over from sbatch.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # Jobs that share a node need ports of their own; below those that Linux gives out.
    command+=(
        python scripts/launch.py "--nnodes=$node_count" "--nproc_per_node=$processes"
        --rdzv_backend=c10d "--rdzv_endpoint=$first:$((20000 + SLURM_JOB_ID % 10000))"
        "--rdzv_id=$SLURM_JOB_ID" --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3
        -m torchtitan_mixtures.train --config "$config" "${overrides[@]}"
    )
    if [ "$dry_run" = yes ]; then
        quoted "${command[@]}"
        return
    fi
    prepare_environment
    quoted "${command[@]}"

    # In the background: bash runs a trap only once the command before it has ended.
    local status=0 srun
    interrupted=no requeued=no
    trap requeue USR1
    "${command[@]}" &
    srun=$!
    trap 'interrupted=yes; kill -TERM "$srun" 2>/dev/null || true' TERM INT
    wait "$srun" || status=$?
    while [ "$interrupted" = yes ]; do # by a signal: srun goes on
        interrupted=no status=0
        wait "$srun" || status=$?
    done
    return "$status"
}

if [ -n "${SLURM_JOB_ID:-}" ]; then
    train
else
    submit
fi
