#!/usr/bin/env bash
# Zero-shot asymmetry on made-up people: SA-Swin pretrained on healthy ones at 3 mm, then healthy ones and ones with a tumour on one side are
# scored by it, the training scans being what healthy ones look like. docs/asymmetry.md shows its table. An hour on a busy core.
# Usage: scripts/reproduce/asymmetry.sh OUT      (what is done in OUT is not done again)
here="$PWD"
source "$(dirname "$0")/../environment"
cd "$here"
[ $# -eq 1 ] || { sed -n '2,4p' "${BASH_SOURCE[0]}"; exit 2; }
out="$1"
mkdir -p "$out"
phantom() { "$PYTHON" -m asa.cli.phantom resolution=3 "$@"; }
prepare() { "$PYTHON" -m asa.cli.prepare prepare.midway=true prepare.crop=64 "$@"; }

phantom kind=t1 subjects=48 seed=1 out="'$out/train'"
phantom kind=t1 subjects=24 seed=2 out="'$out/healthy'"
phantom kind=brats subjects=24 seed=3 out="'$out/lesioned'"
for cohort in train healthy; do
  prepare data=bids data.root="'$out/$cohort'" out="'$out/${cohort}_store'"
done
prepare data=folder data.root="'$out/lesioned'" 'data.images={t1: "*/*_t1.nii.gz"}' 'data.label="*/*_seg.nii.gz"' \
  'labels={1: necrotic, 2: oedema, 4: enhancing}' out="'$out/lesioned_store'"
"$PYTHON" -m asa.cli.pretrain experiment=sa_swin_demo data.store="'$out/train_store'" out="'$out/pretrained'"
for cohort in healthy lesioned; do
  "$PYTHON" -m asa.cli.predict checkpoint="'$out/pretrained'" input="'$out/${cohort}_store'" healthy="'$out/train_store'" \
    out="'$out/${cohort}_maps'"
done
"$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/../asymmetry.py" "$out/pretrained" "$out/healthy_store" "$out/lesioned_store" \
  "$out/train_store"
