#!/bin/bash
# A recipe under SLURM, on one GPU or on many nodes. Arguments of the script are those of the recipe:
#
#   sbatch recipes/cluster/slurm.sh --config recipes/llava15_7b_8gb.yaml --train_file mine.json --output_dir runs/mine
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 recipes/cluster/slurm.sh --config ...
#   sbatch --export=ALL,RECIPE=recipes/pretrain_projector.py recipes/cluster/slurm.sh --config ...
#
# Submit it in the repository's folder, where `make env` was run, on a disk that every node sees. Two minutes before the
# time is up SLURM sends SIGUSR1; the recipe saves and ends with status 75, and the job goes back into the queue, where
# the same command resumes it. A preempted job is requeued by SLURM itself (--requeue). Any other status ends the job.

#SBATCH --job-name=qllava
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
PYTHON="${PYTHON:-.venv/bin/python}"
RECIPE="${RECIPE:-recipes/finetune_lora.py}"
TRY_AGAIN=75 # the recipe's status after SIGUSR1

# SLURM signals the steps; if it signals this shell too, the shell must survive to read the step's status.
trap ':' USR1

if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  # One task per GPU, configured by torch.distributed's variables. No launcher is used: torchrun would be killed by the
  # SIGUSR1 that its workers must handle, and would exit with its own status instead of theirs.
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
  export MASTER_ADDR MASTER_PORT
  # shellcheck disable=SC2016 # each task fills in its own numbers
  ENTER='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
else
  ENTER='exec "$@"'
fi

# The first task to end must not kill those that are still saving; one that hangs is ended after two minutes.
srun --kill-on-bad-exit=0 --wait=120 bash -c "$ENTER" task "$PYTHON" "$RECIPE" "$@"
status=$?

if [ "$status" -eq "$TRY_AGAIN" ]; then
  echo "Saved before the time limit. Job $SLURM_JOB_ID goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
