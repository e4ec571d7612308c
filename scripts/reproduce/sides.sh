#!/usr/bin/env bash
# Left and right on real brains: SA-Swin pretrained on 12 OASIS-1 brains at 3 mm, its scores of scans and of flipped ones; then six labels with a
# side learnt by small networks, without SACA and with it, and with and without its position codes. docs/asymmetry.md shows what it prints.
# Usage: scripts/reproduce/sides.sh DATA OUT
#   DATA: skull-stripped OASIS-1 brains, ID_SS.nii.gz, with manual regions, ID_glm.nii.gz (of the MICCAI 2012 multi-atlas challenge; the R
#         package malf.templates carries 15). OUT: a folder to write to. What is done there is not done again. Some 40 minutes on one core.
here="$PWD"
source "$(dirname "$0")/../environment"
cd "$here"
[ $# -eq 2 ] || { sed -n '2,6p' "${BASH_SOURCE[0]}"; exit 2; }
data="$1" out="$2"
sides="$(dirname "${BASH_SOURCE[0]}")/../sides.py"
run() { "$PYTHON" -m "$@"; }

"$PYTHON" "$sides" labels "$data" "$out/sides"
run asa.cli.prepare data=folder data.root="'$out/sides'" 'data.images={t1: "*_SS.nii.gz"}' 'data.label="*_sides.nii.gz"' \
  'labels={1: left_cortex, 2: right_cortex, 3: left_white, 4: right_white, 5: left_deep, 6: right_deep}' \
  prepare.midway=true prepare.spacing=3 'prepare.crop=[48,64,64]' out="'$out/store'"
run asa.cli.pretrain experiment=sa_swin_demo train.batch_size=2 train.steps=100 optim.warmup=10 train.validate_every=0 train.log_every=10 \
  data.split.validation=0 data.split.test=3 data.store="'$out/store'" out="'$out/pretrained'"
"$PYTHON" "$sides" flip "$out/pretrained" "$out/store"

learn() { # NAME STEPS SETTING...
  local name="$1" steps="$2"
  shift 2
  run asa.cli.finetune data.store="'$out/store'" data.split.validation=0 data.split.test=3 'crop=[32,32,64]' train.batch_size=1 \
    train.steps="$steps" train.log_every=10 optim.lr=2e-3 optim.warmup=5 augment.mirror_probability=0 augment.rotation=0 \
    'augment.scale=[1,1]' 'augment.gamma=[1,1]' out="'$out/$name'" "$@"
  run asa.cli.predict checkpoint="'$out/$name'" input="'$out/store'" part=test out="'$out/predictions/$name'"
}
learn unet 100 model=unet_tiny
learn unet_saca 100 model=unet_tiny model.symmetry=true
learn unet_sincos 100 model=unet_tiny model.position=sincos
learn unet_sincos_saca 100 model=unet_tiny model.position=sincos model.symmetry=true
learn sa_swin 100 model=sa_swin_unet_tiny
learn sa_swin_position 100 model=sa_swin_unet_tiny model.position=true
learn unet_longer 400 model=unet_tiny
learn unet_saca_longer 400 model=unet_tiny model.symmetry=true
"$PYTHON" "$sides" score "$out/sides" "$out"/predictions/*
