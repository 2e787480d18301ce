#!/usr/bin/env bash
# Learns streams of real tasks with SmolLM2-135M: the base and one model a task first, then every group of methods, tuned.
#
# Usage: results/published/real/make.sh DATA-FOLDER [WORK-FOLDER]. Killed and started again it goes on; what is done is
# kept, here and, with KEEP=1, in STREAM.tar.xz, by which another machine goes on: finished cells without packs.
# STREAMS (of classification, math_code, superni, classification_reversed, math_code_dpo), METHODS (names of groups), SEEDS,
# TRIALS and WORKERS are variables. All groups are run of one seed before the next, so that a table is broad first and its
# errors come later. A stage is half a gigabyte: those that only one group trains are removed when its cells are done, and the
# packs of finished cells, too, but for PACKS=keep. The task is inferred at 1 % alone: that triples what is evaluated; GIVEN=1
# leaves it for another time.
set -euo pipefail
published=$(realpath "$(dirname "$0")") data=$(realpath "$1") work=$(realpath -m "${2:-results/real-study}")
streams=${STREAMS:-classification math_code superni classification_reversed math_code_dpo} workers=${WORKERS:-2} trials=${TRIALS:-8} seeds=${SEEDS:-0 1 2}
groups=${METHODS:-alone layers plain packs model_tailor model_grafting lora_each model_tailor_each replay ewc budgets stored merged lwf o_lora agem osf slao sure joint}

. "$published/../finished.sh"
# to calibrate on 64 texts of a task; on 256, the default, it took a core 12 minutes
few="--set graftllm.calibration_batches=2 --set graftllm_adaptive.calibration_batches=2"
declare -A methods=( # strategies, and options; a group without an entry is a strategy
  [alone]=individual
  [layers]=layers.py
  [plain]=individual,sequential,lora
  [packs]="graftllm,graftllm_adaptive $few"
  [model_grafting]='model_grafting --set model_grafting.epochs=8 --set model_grafting.batches=2 --set model_grafting.batch_size=8'
  [budgets]="graftllm,graftllm_adaptive $few --budgets 0.3%,10%"
  [stored]=svd_quant,magnitude,bitdelta,compeft,dare,delta_come
  [merged]=task_arithmetic,ties,sce,emr,tall_mask,twin_merging
  [lora_each]='lora --set lora.convention=each'
  [model_tailor]='model_tailor --set model_tailor.calibration_batches=2'
  [model_tailor_each]='model_tailor --set model_tailor.calibration_batches=2 --set model_tailor.convention=each'
)
[[ -d $(python -c 'from cl_graft.models.published import located; print(located("smollm2-135m"))') ]] ||
  cl-graft models fetch smollm2-135m

# publish STREAM FOLDER KIND...: the folder's tables of these kinds, called STREAM-FOLDER-BUDGET-KIND.md
publish() {
  local stream=$1 folder=$2 kind table name
  shift 2
  for kind in "$@"; do
    for table in "$folder"/report/*"$kind".{md,csv}; do
      [[ -f $table ]] || continue # no router, no confusion
      name=${table##*/}
      cp "$table" "$published/$stream-$folder-${name##*-budget-}"
    done
  done
}

for stream in $streams; do
  mkdir -p "$work/$stream"
  cd "$work/$stream" # so that tables say `tuning`, and no more
  file=$published/$stream.yaml
  restore "$published/$stream.tar.xz"
  cp "$published/layers.py" . # so that no path of this machine is told
  for seed in $seeds; do
    for group in $groups; do
      [[ -e done-$group-$seed ]] && continue # here; elsewhere its finished cells are only looked at
      read -ra named <<<"${methods[$group]:-$group}"
      # what fine-tunes each task from the base shares its stages; what else a group trains is its own, and goes with it
      cache=cache
      [[ $group =~ ^(alone|layers|plain|packs|budgets|stored|merged|model_grafting|model_tailor_each)$ ]] || cache=cache-$group
      common=(--strategies "${named[@]}" --data-dir "$data" --workers "$workers")
      if [[ $group =~ ^(alone|layers)$ ]]; then # the same fine-tunings, untuned
        [[ $seed == 0 ]] || continue
        [[ $group == alone ]] || common+=(--set 'layers.without=["first","middle","last","rest"]')
        cl-graft sweep "${common[@]}" --seeds 0 --out first --cache $cache "$file"
      else
        # packs of fine-tunings of individual have no strength to tune, and its rate, which was the recipe's own
        preset=(--preset tuning)
        [[ ! $group =~ ^(packs|budgets)$ ]] || preset=()
        if [[ -n ${preset[*]} && ! -e tuned-$group ]]; then
          trial_cache=cache-trials
          [[ $group != plain ]] || trial_cache=cache # its first seed goes on from there
          cl-graft tune "${common[@]}" --trials "$trials" --seed 0 --out tuning --cache $trial_cache "$file"
          touch "tuned-$group"
          keep "$published/$stream.tar.xz" first tuning cells
          rm -rf cache-trials
        fi
        ids=given # where all prompts are answered alike, to infer the task changes nothing
        [[ -z ${GIVEN:-} ]] && [[ $group =~ ^(packs|stored|merged|model_grafting|.*_each)$ ]] && ids=given,inferred
        cl-graft sweep "${common[@]}" --seeds "$seed" --task-ids $ids "${preset[@]}" --out cells --cache $cache "$file"
        [[ $cache == cache ]] || rm -rf "$cache"
        [[ ${PACKS:-} == keep ]] || rm -rf tuning/trials/*/packs cells/*/packs
      fi
      keep "$published/$stream.tar.xz" first tuning cells
      touch "done-$group-$seed"
    done
  done
  for folder in first cells; do
    [[ -d $folder ]] || continue
    cl-graft report "$folder"
    publish "$stream" "$folder" ranking matrices provenance
  done
  [[ -d cells ]] || continue
  publish "$stream" cells overview metrics intervals costs kl confusion routing tasks
  cl-graft report cells --paper
  for figure in cells/report/paper/*/{curves,bytes,plasticity,kl}-2col.png; do
    [[ ! -f $figure ]] || cp "$figure" "$published/$stream-$(basename "$figure" -2col.png).png"
  done
done
