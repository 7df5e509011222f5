#!/usr/bin/env bash
# A sweep as a SLURM array: one value of one axis a task, each with a folder of its own, since two sweeps may not share one.
#
#     sbatch --array=0-2 scripts/cluster/slurm_sweep.sh                       # 64, 128, 256 pairs of the tiny sweep
#     sbatch --export=ALL,CONFIG=my.yaml,AXIS=capacity,VALUES="512 1024" --array=0-1 scripts/cluster/slurm_sweep.sh
#     kv-lm-eval report "$OUT"                                          # afterwards: all folders in one report
#
# A task that is stopped and started again (--requeue) goes on where it was. Further arguments go to `kv-lm-eval sweep`.
#SBATCH --job-name=kv-sweep
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=kv-sweep-%A_%a.log
set -euo pipefail

CONFIG="${CONFIG:-scripts/configs/tiny/snapkv_window_capacity.yaml}" # a file whose `vars` have AXIS
AXIS="${AXIS:-capacity}"
OUT="${OUT:-results/slurm}"
read -r -a values <<<"${VALUES:-64 128 256}"

task="${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=0-$((${#values[@]} - 1))}"
if ((task >= ${#values[@]})); then
    echo "array task $task of ${#values[@]} values (${values[*]}): use --array=0-$((${#values[@]} - 1))" >&2
    exit 2
fi
value="${values[task]}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-4}"

# exec: the signal before the time limit reaches the sweep itself, which then says what it keeps
exec kv-lm-eval sweep "$CONFIG" --set "$AXIS=$value" --output_path "$OUT/${AXIS}_$value" "$@"
