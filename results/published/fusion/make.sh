#!/usr/bin/env bash
# Fuses one to four sources into mini-llama: packs, told apart or routed, against one fused model of the same bytes.
#
# Usage: results/published/fusion/make.sh [WORK-FOLDER]. Killed and started again it goes on; what is done is kept, and what
# is published is not made again while its tables are here.
# About nine hours of one core: an arrangement and kind of five seeds took 50 to 65 minutes beside another, its data 2 to
# 10, of which it takes over what the arrangement before it has. The sources are trained first where they are not cached, five
# to ten minutes each.
# What is made smaller, by variables: SEEDS, LIMIT (prompts of a task), STEPS, TEST (items of a task), TARGET, WORKERS;
# and of what: ARRANGEMENTS, of `experts` (each task from the source that is good at it) and counts (of the SOURCES, so
# many first ones, all for every task); KINDS, of `sft` and `dpo`, which is SFT, then DPO.
set -euo pipefail
published=$(realpath "$(dirname "$0")") work=$(realpath -m "${1:-results/fusion-study}")
read -ra seeds <<<"${SEEDS:-0 1 2 3 4}"
limit=${LIMIT:-600} steps=${STEPS:-120} test=${TEST:-200} target=${TARGET:-mini-llama} workers=${WORKERS:-2}
arrangements=${ARRANGEMENTS:-experts 1 2 3 4} kinds=${KINDS:-sft dpo}
read -ra sources <<<"${SOURCES:-mini-gpt2 mini-neox mini-opt mini-qwen2}"
read -ra tasks <<<"${TASKS:-math code cipher}"
read -ra experts <<<"${EXPERTS:-mini-neox mini-opt mini-qwen2}" # of the tasks, in their order
# per cent of the base: of a pack, and of the one fused model, as many bytes as all packs together
one=${BUDGET:-5} all=$((${BUDGET:-5} * ${#tasks[@]}))

joined() { local IFS=,; echo "$*"; }

for arrangement in $arrangements; do
  missing=()
  for kind in $kinds; do
    [[ -f $published/$arrangement-$kind-provenance.md ]] || missing+=("$kind")
  done
  ((${#missing[@]})) || continue
  mkdir -p "$work/$arrangement"
  cd "$work/$arrangement" # so that tables say data/math-{seed}, and no more
  if [[ $arrangement != experts && ! -d data ]]; then
    before=../$((arrangement - 1))/data # a source less: what it has answered is taken over
    [[ ! -d $before ]] || cp -r "$before" .
  fi
  train=()
  for n in "${!tasks[@]}"; do
    from=("${experts[n]}")
    [[ $arrangement == experts ]] || from=("${sources[@]:0:arrangement}")
    task=${tasks[n]} data=data/${tasks[n]}
    for seed in "${seeds[@]}"; do
      cl-graft transfer build "${from[@]/#/--source=}" --prompts "mini/$task" --task "mini/$task" --samples 4 \
        --temperature 1.5 --limit "$limit" --seed "$seed" --logits 10 --allow-code-execution --out "$data-$seed"
    done
    train+=(--train-on "$task=$data-{seed}")
  done
  for kind in "${missing[@]}"; do
    dpo=$([[ $kind == dpo ]] && echo true || echo false)
    sweep() {
      cl-graft sweep --scenarios mini --models "$target" --seeds "$(joined "${seeds[@]}")" --workers "$workers" \
        --set mini.tasks='"'"$(joined "${tasks[@]}")"'"' --set mini.steps="$steps" --set mini.test_size="$test" \
        --set mini.learning_rate=1e-3 --set mini.dpo="$dpo" --set mini.dpo_learning_rate=1e-5 \
        --set mini.dpo_beta=1.0 --set mini.dpo_length_normalised=true \
        --allow-code-execution --wandb off "${train[@]}" --out "$kind" --cache cache "$@"
    }
    # explicit: a pack a task, the task told, and inferred by a router, which takes one pack or two
    sweep --strategies graftllm_adaptive,graftllm --budgets "$one%" --task-ids given,inferred
    sweep --strategies graftllm_adaptive --budgets "$one%" --task-ids inferred --router-top-k 2
    # implicit, of the same bytes: one model, distilled at once or merged of students
    sweep --strategies fusechat --budgets "$one%" --set fusechat.pack=true
    sweep --strategies fusellm --budgets "$all%" --set fusellm.pack=true
    # of any size
    sweep --strategies individual,joint,fusellm,fusechat,sce,ties
    cl-graft report "$kind"
    for table in "$kind"/report/{*-budgets.md,*-budgets.csv,overview.md,provenance.md}; do
      cp "$table" "$published/$arrangement-$kind-${table##*[-/]}"
    done
    for table in "$kind"/report/*-ranking.md; do
      budget=$(sed -n '1s/.*budget \([0-9.]*\)%.*/\1/p' "$table")
      cp "$table" "$published/$arrangement-$kind-ranking-${budget}pct.md"
    done
  done
done
