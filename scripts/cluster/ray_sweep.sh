#!/usr/bin/env bash
# A sweep as a job of a running Ray cluster whose machines share the output folder and have `kv-lm-eval[ray]`.
#
#     RAY_ADDRESS=http://HEAD:8265 OUT=/shared/results/mine scripts/cluster/ray_sweep.sh my.yaml
#
# GPUS may be a fraction: 0.5 puts two points on a GPU. The same command goes on where it was.
set -euo pipefail

config="${1:?which sweep? scripts/cluster/ray_sweep.sh CONFIG.yaml [further arguments of kv-lm-eval sweep]}"
out="${OUT:?set OUT to a folder that all machines share}"
: "${RAY_ADDRESS:?set RAY_ADDRESS to the job server of the cluster, such as http://HEAD:8265}"

exec ray job submit --working-dir . --runtime-env-json '{"excludes": [".git", ".venv", "results"]}' -- \
    kv-lm-eval sweep "$config" --output_path "$out" --executor ray --ray_address auto \
    --num_gpus "${GPUS:-1}" --num_cpus "${CPUS:-4}" "${@:2}"
