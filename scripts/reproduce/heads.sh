#!/usr/bin/env bash
# Two raw heads with their skulls (openmsNN_T1W.nii.gz, open_ms_data, CC BY) to the store with deepbet and with ROBEX, and how well the two agree.
# Usage: scripts/reproduce/heads.sh DATA OUT
[ $# = 2 ] || { echo "usage: scripts/reproduce/heads.sh DATA OUT" >&2; exit 2; }
data="$(realpath "$1")" out="$(realpath -m "$2")"
source "$(dirname "$0")/../environment"
export OMP_NUM_THREADS=1
for strip in deepbet robex; do
  "$PYTHON" -m asa.cli.prepare data=folder data.root="'$data'" 'data.images={t1: openms*_T1W.nii.gz}' out="'$out/$strip'" \
    prepare.bias=true prepare.strip=$strip prepare.register=true prepare.midway=true check=also
done
"$PYTHON" scripts/agreement.py "$out/deepbet" "$out/robex"
