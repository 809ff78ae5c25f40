#!/usr/bin/env bash
# Stands in for srun: one task, here.
echo "${JAX_LOCAL_DEVICE_IDS:-} srun $*" >>"$STANDIN/slurm"
while [[ $1 == --* ]]; do shift; done
exec "$@"
