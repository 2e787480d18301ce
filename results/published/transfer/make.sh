#!/usr/bin/env bash
# Makes the tables beside it: mini-gpt2 teaches mini-llama math, SFT alone and SFT then DPO, five seeds, two budgets.
# About forty minutes on two cores. Usage: results/published/transfer/make.sh [WORK-FOLDER]
set -euo pipefail
out=${1:-results/transfer-study}
for seed in 0 1 2 3 4; do
  cl-graft transfer build --source mini-gpt2 --prompts mini/math --task mini/math --samples 8 --temperature 1.5 \
    --limit 2000 --seed "$seed" --out "results/transfer/math-$seed"
  for dpo in false true; do
    cl-graft sweep --scenarios mini --strategies individual,lora,graftllm,svd_quant,svd,magnitude --seeds "$seed" \
      --budgets 5%,10% --train-on "math=results/transfer/math-$seed" \
      --set mini.tasks=math --set mini.steps=240 --set mini.learning_rate=5e-4 --set mini.test_size=400 \
      --set "mini.dpo=$dpo" --set mini.dpo_learning_rate=1e-5 --set mini.dpo_beta=1.0 \
      --set mini.dpo_length_normalised=true --workers 2 --wandb off --out "$out"
  done
done
cl-graft report "$out"
for kind in False:sft True:sft-then-dpo; do
  for end in md csv png; do
    cp "$out"/report/mini-dpo-"${kind%%:*}"*budgets."$end" "results/published/transfer/${kind##*:}-budgets.$end"
  done
done
cp "$out/report/provenance.md" results/published/transfer/
