#!/usr/bin/env bash
# CSF, GM and WM on real brains, from 1, 3 and 12 labelled ones, with and without pretraining: the table of docs/oasis.md.
# Usage: scripts/reproduce/oasis.sh DATA OUT
#   DATA: 15 skull-stripped OASIS-1 brains, ID_SS.nii.gz, with FAST tissue labels, ID_tissues.nii.gz (1 CSF, 2 GM, 3 WM);
#         the R package malf.templates carries such a set. OUT: a folder to write to. What is done there is not done again.
here="$PWD"
source "$(dirname "$0")/../environment"
cd "$here"
[ $# -eq 2 ] || { sed -n '2,6p' "${BASH_SOURCE[0]}"; exit 2; }
data="$1" out="$2"
run() { "$PYTHON" -m "$@"; }
mkdir -p "$out"
# A word a stage and its seconds.
timed() { local name="$1" started=$SECONDS; shift; "$@"; echo "$name $((SECONDS - started))" >>"$out/seconds.txt"; }

timed prepare run asa.cli.prepare data=folder data.root="'$data'" 'data.images={t1: *_SS.nii.gz}' 'data.label=*_tissues.nii.gz' \
  'labels={1: csf, 2: gm, 3: wm}' out="'$out/store'"
timed pretrain run asa.cli.pretrain experiment=oasis_pretrain data.store="'$out/store'" out="'$out/pretrained'"
evaluations=()
for n in 1 3 12; do
  steps=200
  [ "$n" -lt 12 ] || steps=300
  for start in scratch pretrained; do
    name="${start}_$n"
    init=null
    [ "$start" = scratch ] || init="'$out/pretrained'"
    timed "finetune_$name" run asa.cli.finetune experiment=oasis_finetune data.store="'$out/store'" init="$init" \
      data.split_file="'$out/pretrained/split.json'" data.labelled="$n" train.steps="$steps" out="'$out/$name'"
    timed "predict_$name" run asa.cli.predict checkpoint="'$out/$name'" input="'$out/store'" part=test predict.precision=bf16 \
      out="'$out/predictions_$name'"
    run asa.cli.evaluate predictions="'$out/predictions_$name'" truth="'$out/store'" split_file="'$out/$name/split.json'" \
      out="'$out/evaluation_$name'"
    evaluations+=("$out/evaluation_$name")
  done
done
"$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/../results.py" "${evaluations[@]}"
echo "seconds of each stage: $out/seconds.txt"
