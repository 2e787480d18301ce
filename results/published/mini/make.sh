#!/usr/bin/env bash
# Tunes every strategy on `mini` by one protocol, then learns the stream with each, told the task and not, three seeds.
#
# Usage: results/published/mini/make.sh [WORK-FOLDER]. Killed and started again it goes on; what is done is kept.
# About six hours of two quiet cores: three for 280 trials, three for 165 cells. WORKERS, SEEDS and MODEL are variables.
# Unlearning (gradient_ascent, negation) is for a stream that unlearns; fusellm and fusechat need other sources: both
# have tables of their own.
set -euo pipefail
published=$(realpath "$(dirname "$0")") work=$(realpath -m "${1:-results/mini-study}")
seeds=${SEEDS:-0,1,2} model=${MODEL:-mini-llama} workers=${WORKERS:-2}

# a pack a task, of one fine-tuning each: what differs is what is kept of it, or how it is merged
kept=individual,graftllm,graftllm_adaptive,svd_quant,svd,magnitude,bitdelta,compeft,dare,delta_come,delta_dct,impart,loraquant,ultradelta
merged=task_arithmetic,ties,sce,pcb,knots,consensus,emr,tall_mask,twin_merging
trained=sequential,joint,lora,replay,ewc,lwf,o_lora,agem,gem,magmax,osf,slao,i_lora,sure,dft,lora_intruders,lamol,sdft

mkdir -p "$work"
cd "$work" # so that tables say `tuning`, and no more
common=(--scenarios mini --models "$model" --budgets 10% --allow-code-execution --wandb off --cache cache --workers "$workers")
# arguments: strategies, and the options that they are given
each() {
  "$@" --strategies "$kept,$merged"
  "$@" --strategies "$trained"
  "$@" --strategies lora --set lora.convention=each
  "$@" --strategies model_grafting,model_tailor
  "$@" --strategies model_grafting --set model_grafting.convention=summed
  "$@" --strategies model_tailor --set model_tailor.convention=each
}
each cl-graft tune "${common[@]}" --trials 8 --seed 0 --out tuning
each cl-graft sweep "${common[@]}" --seeds "$seeds" --preset tuning --task-ids given,inferred --out cells

cl-graft report cells --paper --named graftllm_adaptive --named graftllm --named lora --named sequential --named replay \
  --named ewc --named ties --named individual
rm -f "$published"/{mini,overview}*
cp cells/report/mini-*.{md,csv} cells/report/{overview,provenance}.md "$published/"
cp cells/report/paper/overview-2col.png "$published/mini-overview.png"
for figure in curves bytes kl plasticity; do
  cp "cells/report/paper/mini/$figure-2col.png" "$published/mini-$figure.png"
done
cp "tuning/mini__$model.json" "$published/../../../cl_graft/tuned/"
