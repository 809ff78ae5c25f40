#!/usr/bin/env bash
# Stands in for scontrol: $STANDIN/job is the job.
echo "scontrol $*" >>"$STANDIN/slurm"
if [[ $1 == show ]]; then cat "$STANDIN/job"; fi
