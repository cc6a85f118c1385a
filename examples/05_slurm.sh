#!/bin/bash
# Train on two hosts with four GPUs each. Submit it from the root of the repository:
#
#     sbatch examples/05_slurm.sh recipes/imagenet/resnet50-str-90.23.yaml runs/str
#
# If it is submitted again, or restarted by SLURM after a preemption, the run continues from its last checkpoint.
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
out=${2:?a run directory on storage shared by all hosts}

# The address of the rendezvous: a free port of the first host.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs on the same host need different ports.
port=$((20000 + SLURM_JOB_ID % 10000))
# Otherwise restarted ranks would get the addresses of the failed ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Worker processes decode the images, so a rank needs only one thread.
export OMP_NUM_THREADS=1

# One launcher per host starts one rank per GPU. If a rank fails, it restarts all ranks, at most three times.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_PER_NODE" \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" \
    --no-python sparing train "$recipe" --out "$out" --resume auto
