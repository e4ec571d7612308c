#!/usr/bin/env bash
# The picture in the README, made on phantoms: scripts/reproduce/figure.sh OUT
here="$PWD"
source "$(dirname "$0")/../environment"
cd "$here"
[ $# -eq 1 ] || { sed -n '2p' "${BASH_SOURCE[0]}"; exit 2; }
out="$1"
mkdir -p "$out"
"$PYTHON" -m asa.cli.phantom kind=t1 subjects=60 seed=5 resolution=2 out="'$out/t1'"
"$PYTHON" -m asa.cli.prepare data=bids data.root="'$out/t1'" prepare.crop='[80,96,80]' out="'$out/store'"
"$PYTHON" -m asa.cli.pretrain experiment=figure data.store="'$out/store'" out="'$out/run'"
"$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/../figure.py" "$out/run" "$out/store" "$out/reconstruction.png"
