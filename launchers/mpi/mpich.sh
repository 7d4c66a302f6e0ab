#!/usr/bin/env bash
# MPICH, Intel MPI or MVAPICH, which all start processes with Hydra's mpiexec. Copy, edit the first part, then
# from any of the hosts, or a login node that reaches them by ssh without a password:
#
#   bash mpich.sh launchers/dga_train.py --ds_config ds_configs/zero2.json --model MODEL --corpus DIR
#   HOSTFILE=cpu_hosts bash mpich.sh tools/shard_corpus.py TEXT... --tokenizer MODEL --output DIR
#
# Training needs no mpi4py. Sharding needs one that finds this MPI: export MPI4PY_MPIABI=mpich, and
# LD_LIBRARY_PATH with the folder of its libmpi.so.12.
set -euo pipefail

HOSTFILE=${HOSTFILE:-hosts}          # a line for each node:  node01:4     (4: its GPUs)
PYTHON=${PYTHON:-.venv/bin/python}   # at this path on every node
MPIEXEC=${MPIEXEC:-mpiexec.hydra}
INTERFACE=${INTERFACE:-}             # between the nodes, for example ib0 or eth0; empty: they find out

# Cores: free, or each GPU's process its share:  BIND=(-bind-to core:8)
BIND=(-bind-to none)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# ------------------------------------------------------------------------------------------------------------
slots=$(awk -F'[: ]' '!/^#/ && NF {n += $2 ? $2 : 1} END {print n}' "$HOSTFILE")
MASTER_ADDR=${MASTER_ADDR:-$(awk -F'[: ]' '!/^#/ && NF {print $1; exit}' "$HOSTFILE")}   # where rank 0 runs
MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 12000))}   # Hydra tells its ranks nothing to choose one by
export MASTER_ADDR MASTER_PORT
options=()
if [[ -n $INTERFACE ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    options+=(-iface "$INTERFACE")
fi

# Hydra hands the whole environment on to the other nodes.
exec "$MPIEXEC" -f "$HOSTFILE" -n "$slots" "${options[@]}" "${BIND[@]}" "$PYTHON" "$@"
