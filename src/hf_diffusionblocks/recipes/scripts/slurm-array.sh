#!/bin/bash
# A job per block on a cluster: an array of as many jobs as blocks, each on one device. Independent blocks only.
#   sbatch --array=0-2 slurm-array.sh cifar10-dit-s2 runs/cifar10-dit-s2 [section.key=value ...]
# Then, when all have ended (or at once: it waits for a day and says which block is missing):
#   diffusionblocks merge runs/cifar10-dit-s2/block-* --output-dir runs/cifar10-dit-s2/model --wait 86400
# A job that is preempted or times out gets SIGTERM, writes a checkpoint, is queued again, and goes on.
#SBATCH --job-name=diffusionblocks
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-block-%a.log
set -u
recipe=$1 output=$2
shift 2
srun ${PYTHON:-python} -m hf_diffusionblocks train "$recipe" "$@" \
    --block "$SLURM_ARRAY_TASK_ID" --output-dir "$output/block-$SLURM_ARRAY_TASK_ID"
status=$?
if [ "$status" -eq 130 ]; then  # stopped by the signal, with a checkpoint
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
