#!/usr/bin/env bash
# Asymmetry on made-up people at 3 mm: SA-Swin pretrained on 48 healthy ones and 24 with a tumour on one side, of whom it is known who is healthy
# and nothing else; then others, 24 of each, are scored. Usage: scripts/reproduce/asymmetry.sh OUT    (what is done there is not done again)
here="$PWD"
source "$(dirname "$0")/../environment"
cd "$here"
[ $# -eq 1 ] || { sed -n '2,3p' "${BASH_SOURCE[0]}"; exit 2; }
mkdir -p "$1"
out="$(realpath "$1")"
phantom() { "$PYTHON" -m asa.cli.phantom resolution=3 "$@"; }
prepare() { "$PYTHON" -m asa.cli.prepare prepare.midway=true prepare.crop=64 "$@"; }

phantom kind=t1 subjects=48 seed=1 out="'$out/people/healthy'"
phantom kind=brats subjects=24 seed=4 out="'$out/people/patients'"
phantom kind=t1 subjects=24 seed=2 out="'$out/healthy'"
phantom kind=brats subjects=24 seed=3 out="'$out/lesioned'"
echo id,t1 >"$out/scans.csv"
echo id,health >"$out/health.csv"
for file in "$out"/people/healthy/*/anat/*_T1w.nii.gz "$out"/people/patients/*/*_t1.nii.gz; do
  id="$(basename "$file" .nii.gz)"
  id="${id%_T1w}" id="${id%_t1}"
  case "$file" in */healthy/*) health=1 ;; *) health=0 ;; esac
  echo "$id,$file" >>"$out/scans.csv"
  echo "$id,$health" >>"$out/health.csv"
done
prepare data=folder data.root="'$out'" data.table="'$out/scans.csv'" out="'$out/train_store'"
prepare data=bids data.root="'$out/healthy'" out="'$out/healthy_store'"
prepare data=folder data.root="'$out/lesioned'" 'data.images={t1: "*/*_t1.nii.gz"}' 'data.label="*/*_seg.nii.gz"' \
  'labels={1: necrotic, 2: oedema, 4: enhancing}' out="'$out/lesioned_store'"
"$PYTHON" -m asa.cli.pretrain experiment=sa_swin_demo data.store="'$out/train_store'" data.health="'$out/health.csv'" out="'$out/pretrained'"
for cohort in healthy lesioned; do
  "$PYTHON" -m asa.cli.predict checkpoint="'$out/pretrained'" input="'$out/${cohort}_store'" out="'$out/${cohort}_maps'"
done
"$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/../asymmetry.py" "$out/pretrained" "$out/healthy_store" "$out/lesioned_store"
