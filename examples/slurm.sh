#!/bin/bash
# One run on two hosts of four GPUs each. Submit it from the folder of the recipe:
#
#     sbatch slurm.sh recipes/imagenet/resnet50-str-90.23.yaml runs/str
#
# Submitted again, or started again by SLURM after a preemption, it goes on after the last finished epoch.
#SBATCH --job-name=sparing
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=${1:?a recipe}
out=${2:?a run directory, on storage that all hosts see}

# Where the hosts meet: any free port of the first of them.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a host must not share the port.
port=$((20000 + SLURM_JOB_ID % 10000))
# Restarted ranks would otherwise look for each other at the addresses of the dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Decoding runs in processes of its own, so that a rank needs no threads.
export OMP_NUM_THREADS=1

# One launcher a host; it starts a rank a GPU, and up to three times all of them again if one dies.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_PER_NODE" \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" \
    --no-python sparing train "$recipe" --out "$out" --resume auto
