#!/usr/bin/env bash
# Fuses one to four sources into mini-llama: a pack a source against one fused model, at equal bytes, five seeds.
#
# Usage: results/published/fusion/make.sh [WORK-FOLDER]. Killed and started again it goes on; what is done is kept.
# What is made smaller, by variables: SEEDS, LIMIT (prompts of a task), STEPS, TEST (items of a task), TARGET, WORKERS;
# and of what: ARRANGEMENTS, of `experts` (each task from the source that is good at it) and counts (of the SOURCES, so
# many first ones, all for every task); KINDS, of `sft` and `dpo`, which is SFT, then DPO.
set -euo pipefail
work=${1:-results/fusion-study}
seeds=${SEEDS:-0 1 2 3 4} limit=${LIMIT:-1500} steps=${STEPS:-160} test=${TEST:-200}
target=${TARGET:-mini-llama} workers=${WORKERS:-2}
arrangements=${ARRANGEMENTS:-experts 1 2 3 4} kinds=${KINDS:-sft dpo}
read -ra sources <<<"${SOURCES:-mini-gpt2 mini-neox mini-opt mini-qwen2}"
read -ra tasks <<<"${TASKS:-math code cipher}"
read -ra experts <<<"${EXPERTS:-mini-neox mini-opt mini-qwen2}"  # of the tasks, in their order
# as many bytes in the one fused model as in all packs together
one=${BUDGET:-5} all=$((${BUDGET:-5} * ${#tasks[@]}))

for arrangement in $arrangements; do
  for seed in $seeds; do
    train=()
    for n in "${!tasks[@]}"; do
      from=("${experts[n]}")
      [[ $arrangement == experts ]] || from=("${sources[@]:0:arrangement}")
      task=${tasks[n]} data=$work/data/$arrangement-${tasks[n]}-$seed
      cl-graft transfer build "${from[@]/#/--source=}" --prompts "mini/$task" --task "mini/$task" --samples 4 \
        --temperature 1.5 --limit "$limit" --seed "$seed" --logits 10 --allow-code-execution --out "$data" >/dev/null
      train+=(--train-on "$task=$data")
    done
    for kind in $kinds; do
      recipe=(--set "mini.tasks=$(IFS=,; echo "${tasks[*]}")" --set "mini.steps=$steps" --set mini.learning_rate=1e-3
        --set "mini.test_size=$test" --set "mini.dpo=$([[ $kind == dpo ]] && echo true || echo false)"
        --set mini.dpo_learning_rate=1e-5 --set mini.dpo_beta=1.0 --set mini.dpo_length_normalised=true)
      sweep() {
        cl-graft sweep --scenarios mini --models "$target" --seeds "$seed" --workers "$workers" --wandb off \
          --allow-code-execution "${recipe[@]}" "${train[@]}" --out "$work/$arrangement-$kind" "$@"
      }
      # explicit: a pack a task, the task told, and inferred by a router
      sweep --strategies graftllm,graftllm_adaptive --budgets "$one%" --task-ids given,inferred
      # implicit, of the same bytes: one model, distilled at once or merged of students
      sweep --strategies fusechat --budgets "$one%" --set fusechat.pack=true
      sweep --strategies fusellm --budgets "$all%" --set fusellm.pack=true
      # of any size
      sweep --strategies individual,joint,fusellm,fusechat,sce,ties
    done
  done
done
for arrangement in $arrangements; do
  for kind in $kinds; do
    cl-graft report "$work/$arrangement-$kind"
    cp "$work/$arrangement-$kind/report/provenance.md" "results/published/fusion/$arrangement-$kind-provenance.md"
    cp "$work/$arrangement-$kind/report/overview.md" "results/published/fusion/$arrangement-$kind.md" 2>/dev/null || true
  done
done
