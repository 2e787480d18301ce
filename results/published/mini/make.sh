#!/usr/bin/env bash
# Learns `mini` with every strategy, tuned, told the task and not, three seeds; begins with what is done, cells.tar.xz.
#
# Usage: results/published/mini/make.sh [WORK-FOLDER]. Killed and started again it goes on; what is done is kept, here and,
# with KEEP=1, in cells.tar.xz, by which another machine goes on: finished cells without packs.
# About three hours of two quiet cores for 276 cells. WORKERS, SEEDS and MODEL are variables. What methods are tuned to
# comes with CL-Graft; TUNE=1 tunes them anew, first, in 342 trials, about as long.
# Unlearning (gradient_ascent, negation) is for a stream that unlearns; fusellm and fusechat need other sources: both
# have tables of their own.
set -euo pipefail
published=$(realpath "$(dirname "$0")") work=$(realpath -m "${1:-results/mini-study}")
seeds=${SEEDS:-0,1,2} model=${MODEL:-mini-llama} workers=${WORKERS:-2} preset=tuned
[[ -z ${TUNE:-} ]] || preset=tuning

mkdir -p "$work"
cd "$work" # so that tables say `tuning`, and no more
. "$published/../finished.sh"
restore "$published/cells.tar.xz"
common=(--scenarios mini --models "$model" --budgets 10% --allow-code-execution --wandb off --cache cache --workers "$workers")
# arguments: strategies, and the options that they are given; those of README first
each() {
  "$@" --strategies sequential,joint,lora,replay,agem,ewc,lwf,o_lora
  "$@" --strategies individual,graftllm,graftllm_adaptive,svd_quant,delta_come
  "$@" --strategies lora --set lora.convention=each
  "$@" --strategies model_grafting,model_tailor
  "$@" --strategies model_tailor --set model_tailor.convention=each
  "$@" --strategies magmax,slao,sure,dft,gem,i_lora,lora_intruders,osf
  # one fine-tuning a task: what differs is what is kept of it, or how it is merged
  "$@" --strategies task_arithmetic,ties,sce,pcb,knots,consensus,emr,tall_mask,twin_merging
  "$@" --strategies svd,magnitude,bitdelta,compeft,dare,delta_dct,impart,loraquant,ultradelta
  "$@" --strategies model_grafting --set model_grafting.convention=summed
  "$@" --strategies lamol,sdft
}
sweep() {
  cl-graft sweep "${common[@]}" --seeds "$seeds" --preset $preset --task-ids given,inferred --out cells "$@"
  keep "$published/cells.tar.xz" cells
}
[[ $preset == tuned ]] || each cl-graft tune "${common[@]}" --trials 8 --seed 0 --out tuning
each sweep

cl-graft report cells --paper --named graftllm_adaptive --named graftllm --named lora --named sequential --named replay \
  --named ewc --named ties --named individual
rm -f "$published"/{mini-*,overview*}
cp cells/report/mini-*.{md,csv} cells/report/{overview,provenance}.md "$published/"
cp cells/report/paper/overview-2col.png "$published/mini-overview.png"
for figure in curves bytes kl plasticity; do
  cp "cells/report/paper/mini/$figure-2col.png" "$published/mini-$figure.png"
done
[[ $preset == tuned ]] || cp "tuning/mini__$model.json" "$published/../../../cl_graft/tuned/"
