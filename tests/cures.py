"""Cures that errors print and a user can run: a command, an option, or a change of a file; and the test that runs each.

`found` reads them off the code; `tests/test_cures.py` holds TESTED and OPEN against it, so that a new cure needs a test.
Cures in prose may stand here, too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# a command or a line of Python, an option, a variable, a change of a file
RUNS = re.compile(
    r"`(?:cl-graft|pip|ray|python|accelerate|- ?)|--[a-z]|from_pretrained|CL_GRAFT"
    r"|\b(?:delete|move|rename|copy|save|install|set(?! up)|launch with)\b"
)


def found() -> set[str]:
    """`file: cure` of every `raise` whose message ends in such a cure; {} stands for what is filled in."""
    return {message for message in messages() if RUNS.search(message.partition(": ")[2])}


def messages() -> Iterator[str]:
    """`file: the last part of the message` of every error that is raised with one."""
    for folder in ("cl_graft", "scenarios", "baselines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    said = " ".join(map(_text, node.exc.args))
                    yield f"{path.relative_to(ROOT)}: {said.rpartition('; ')[2]}"


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "{}"


# {cure: the test that runs it, below tests/}
TESTED: dict[str, str] = {
    "cl_graft/experiment/prepare.py: launch its stages (--launch processes=8,zero=3), or give it a device that holds it.": "models/test_spread.py::test_a_cell_whose_stages_are_known_comes_to_the_same_result",
    "cl_graft/presets.py: give {}, or the folder that --out of `cl-graft tune` named.": "test_tune.py::test_a_missing_preset_is_made_by_the_command_that_the_error_names",
    "cl_graft/presets.py: make one by `{}`, and give --preset FOLDER.": "test_tune.py::test_a_missing_preset_is_made_by_the_command_that_the_error_names",
    "cl_graft/cli/pack.py: name the base with --base.": "skillpack/test_lossless_folders.py::test_inspect_and_diff",
    "cl_graft/skillpack/folders/apply.py: apply it without --dtype.": "skillpack/test_lossless_folders.py::test_the_commands",
    "cl_graft/skillpack/codecs/codec.py: put the pack, alone, on its base by Grafted or by `cl-graft pack apply`.": "skillpack/test_lossless_folders.py::test_the_commands",
    "cl_graft/skillpack/live/grafted.py: put it alone on its base by Grafted or by `cl-graft pack apply`.": "skillpack/test_lossless_folders.py::test_the_commands",
    "cl_graft/skillpack/folders/bits.py: save the model in one of these.": "skillpack/test_lossless_folders.py::test_any_two_dtypes",
    "cl_graft/experiment/executors/ray.py: start one with `ray start --head`.": "hosts/test_ray.py::test_a_host_is_lost_and_another_comes_in_the_middle_of_a_sweep",
    "cl_graft/experiment/executors/ray.py: run the same versions of Ray and Python as its head and, where that asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what `ray get-auth-token` prints there.": "hosts/test_ray.py::test_a_host_is_lost_and_another_comes_in_the_middle_of_a_sweep",
    "cl_graft/data/readers.py: put the data set's file there.": "test_cures.py::test_a_data_set_in_its_folder",
    "cl_graft/store/record.py: choose another --out, or delete the folder to compute it anew.": "test_cures.py::test_another_out_or_a_deleted_folder",
    "cl_graft/skillpack/format/header.py: load the base in transformers, save it by save_pretrained(NEW, save_original_format=False), and give NEW.": "test_cli_pack.py::test_experts_that_a_folder_keeps_apart",
    "cl_graft/bench/pack.py: give a checkout of it with --previous FOLDER.": "test_bench_deltas.py::test_an_engine_is_run_in_its_own_checkout",
    "cl_graft/bench/engines.py: make one of the earlier commit by `git worktree add FOLDER COMMIT`.": "test_bench_deltas.py::test_an_engine_is_run_in_its_own_checkout",
    "cl_graft/cli/pack.py: leave it out, or export --to peft.": "test_cures.py::test_a_rank_is_for_adapters",
    "cl_graft/cli/form.py: give both --rounding compensated and --calibration FILE, or neither.": "test_cli_form.py::test_compensated_rounding_by_calibration_text",
    "cl_graft/cli/run.py: `cl-graft sweep` runs several.": "test_cli_sweep.py::test_a_sweep_from_its_file_with_options_over_it",
    "cl_graft/cli/show.py: free space or copy the results elsewhere.": "test_cli.py::test_a_report_that_cannot_be_written",
    "cl_graft/cli/sweep.py: --out names no folder that a sweep was begun in.": "test_sweep_options.py::test_resume_takes_the_sweep_from_the_folder_of_its_results",
    "cl_graft/cli/sweep.py: give --out alone, or leave out --resume.": "test_sweep_options.py::test_resume_takes_the_sweep_from_the_folder_of_its_results",
    "cl_graft/data/hub.py: give the data set's hub id or a folder that `datasets` reads, and log in where it asks for that.": "test_cures.py::test_a_folder_that_datasets_reads",
    "cl_graft/data/stream_rows.py: mend the path, or give the folder that holds it with --data-dir.": "test_stream_file.py::test_a_data_set_s_folder_by_its_splits_and_from_the_data_folder",
    "cl_graft/data/adaptllm.py: make some by its raw2read.py and give their folder, or a data set with a column text, as domains.{}=PLACE.": "test_published_streams.py::test_domains_without_texts_are_told_why",
    "cl_graft/data/answered.py: {} with --data-dir.": "test_published_streams.py::test_where_the_hub_has_none_a_folder_is_the_cure",
    "cl_graft/data/classification_hub.py: {} {}, so give the folder that holds it with --data-dir.": "test_published_streams.py::test_where_the_hub_has_none_a_folder_is_the_cure",
    "scenarios/text_classification.py: give the folder that holds it with --data-dir.": "test_published_streams.py::test_where_the_hub_has_none_a_folder_is_the_cure",
    "cl_graft/data/readers.py: give the folder that holds it with --data-dir.": "test_cures.py::test_a_data_set_in_its_folder",
    "cl_graft/data/readers.py: give the folder that holds {} with --data-dir.": "test_cures.py::test_a_data_set_in_its_folder",
    "cl_graft/evaluation/engine.py: choose another --cache.": "evaluation/test_engine.py::test_what_a_server_cannot_do_is_refused_before_anything_is_computed",
    "cl_graft/evaluation/engine.py: start one that does, as `transformers serve`, or use --engine hf.": "evaluation/test_engine.py::test_transformers_own_server_says_what_the_model_here_says",
    "cl_graft/evaluation/engine.py: use --engine hf.": "evaluation/test_engine.py::test_validate_refuses_an_engine_that_cannot_score_or_is_away",
    "cl_graft/evaluation/judges.py: choose another by judge.model, or set judge.unclear=half.": "evaluation/test_judge.py::test_words_without_a_verdict_count_half_where_that_is_asked",
    "cl_graft/evaluation/judges.py: set judge.judge to a model, or to the address of an OpenAI-compatible server, as http://localhost:8000/v1.": "evaluation/test_judge.py::test_a_judge_in_a_cell",
    "cl_graft/evaluation/judges.py: set judge.model to one that it has.": "evaluation/test_judge.py::test_a_judge_in_a_cell",
    "cl_graft/evaluation/sandbox.py: if you accept that, pass --allow-code-execution or set {}=1.": "test_cli_sweep.py::test_validate_finds_what_would_stop_a_sweep",
    "cl_graft/experiment/cache.py: give a results folder, or the one that --cache named.": "test_cures.py::test_the_folder_that_out_named",
    "cl_graft/experiment/early.py: use --router-combine merge, or --engine hf.": "evaluation/test_engine.py::test_validate_refuses_an_engine_that_cannot_score_or_is_away",
    "cl_graft/experiment/outcomes.py: delete that experience's folder and the later ones to compute them anew.": "test_resume.py::test_what_is_to_be_deleted_is_computed_anew",
    "cl_graft/models/chat.py: set add_bos_token and add_eos_token in its tokenizer_config.json to false.": "models/test_chat.py::test_the_cure_of_that_leads_to_the_templates_own_ids",
    "cl_graft/models/embedded.py: free space there or set CL_GRAFT_CACHE to another folder.": "test_cures.py::test_another_folder_for_embedded_models",
    "cl_graft/models/published.py: free space there or set CL_GRAFT_CACHE to another folder.": "models/test_published.py::test_another_folder_for_fetched_models",
    "cl_graft/models/published.py: run `{}`.": "models/test_published.py::test_the_error_names_the_command_and_then_the_name_is_known_everywhere",
    "cl_graft/models/load.py: set eos_token in its tokenizer_config.json.": "test_cures.py::test_an_end_token_in_tokenizer_config",
    "cl_graft/models/weights.py: call the PEFT model's merge_and_unload() and save what it returns.": "skillpack/test_foreign.py::test_an_adapter_that_was_saved_with_its_model",
    "cl_graft/models/weights.py: move adapter_config.json and the adapter's weights to a folder of their own.": "skillpack/test_foreign.py::test_an_adapter_beside_a_model",
    "cl_graft/models/weights.py: move {} out of the folder, or what belongs to the other save.": "models/test_weights.py::test_a_file_beside_the_index_of_another_save",
    "cl_graft/models/weights.py: save again under stage3_gather_16bit_weights_on_model_save, or {}, and give NEW.": "skillpack/test_foreign.py::test_deepspeed",
    "cl_graft/models/weights.py: save the file again without it.": "models/test_weights.py::test_a_tensor_that_the_index_does_not_assign_there",
    "cl_graft/models/weights.py: save the model itself instead of what it is wrapped in.": "models/test_weights.py::test_one_tensor_under_two_names",
    "cl_graft/models/weights.py: save {} again without it.": "models/test_weights.py::test_a_tensor_that_the_index_does_not_assign_there",
    "cl_graft/plugins/kinds.py: make it a subclass of cl_graft.routing.base.Router with `update` and `scores`.": "test_cures.py::test_a_router_by_its_base",
    "cl_graft/plugins/kinds.py: make it one by @compressor() or @merger, or as a subclass of Strategy with a `learn`.": "test_cures.py::test_a_strategy_by_its_decorator",
    "cl_graft/plugins/signature.py: --set {} should read name.option=value, such as lora.rank=8.": "test_cures.py::test_set_as_it_should_read",
    "cl_graft/skillpack/folders/apply.py: apply the pack with --dtype float32.": "test_cli_form.py::test_what_overflows_goes_into_a_wider_dtype",
    "cl_graft/skillpack/folders/checkpoint.py: save the model in bfloat16 or float32.": "test_cures.py::test_weights_in_a_dtype_that_is_read",
    "cl_graft/skillpack/format/files.py: save it without.": "skillpack/test_besides.py::test_code_of_its_own_is_refused",
    "cl_graft/skillpack/live/attachment_points.py: pass an `example`: the keyword arguments of one forward of several samples.": "skillpack/test_attach.py::test_a_model_that_needs_another_call_is_given_an_example",
    "cl_graft/skillpack/live/grafted.py: apply it to a folder with `cl-graft pack apply`.": "test_cures.py::test_a_pack_of_more_rows_than_a_live_model_has",
    "cl_graft/skillpack/tools/gguf_adapter.py: export it to a folder (--to hf).": "skillpack/test_export.py::test_what_llama_cpp_does_not_take",
    "cl_graft/skillpack/tools/adapter.py: export it to a folder (--to hf).": "test_cures.py::test_what_no_adapter_holds_goes_to_a_folder",
    "cl_graft/store/record.py: delete its cell's folder to compute it anew.": "test_resume.py::test_what_is_to_be_deleted_is_computed_anew",
    "cl_graft/store/record.py: delete the file, and run the same command again.": "report/test_corrupt.py::test_a_torn_state_is_no_end_of_status",
    "cl_graft/tracking/wandb.py: run `wandb login`, or leave out --wandb online.": "test_early.py::test_who_is_logged_in_may_be_online",
    "cl_graft/store/files.py: delete its cell's folder to compute it anew.": "test_resume.py::test_what_is_to_be_deleted_is_computed_anew",
    "cl_graft/store/record.py: choose another --out or delete the folder.": "test_cures.py::test_another_out_or_a_deleted_folder",
    "cl_graft/store/record.py: choose another --out, or the version that wrote it.": "test_cures.py::test_results_of_another_format",
    "cl_graft/store/record.py: choose another --out.": "test_cures.py::test_a_place_where_nothing_can_be_made",
    "cl_graft/store/record.py: give the folder that --out named.": "test_cures.py::test_the_folder_that_out_named",
    "cl_graft/store/record.py: run `cl-graft run` with --out {} first.": "test_cures.py::test_the_folder_that_out_named",
    "cl_graft/store/record.py: wait for it or choose another --out.": "test_cures.py::test_a_cell_that_another_process_computes",
    "cl_graft/skillpack/compress/policy.py: add --method graftllm.": "skillpack/test_auto_gptq.py::test_a_pack_is_made_by_it",
    "cl_graft/strategy/route.py: raise --budget, or choose a smaller --router (centroids keeps least).": "routing/test_selection.py::test_a_router_that_takes_all_of_the_budget_is_refused_before_anything_is_computed",
    "cl_graft/strategy/storage.py: raise --budget or keep less.": "test_cures.py::test_a_larger_budget",
    "cl_graft/strategy/context.py: raise --budget or the method's compression.": "test_cures.py::test_a_larger_budget",
    "cl_graft/sweep_config.py: `cl-graft init` writes a file to begin with.": "test_cures.py::test_the_file_that_init_writes",
    "cl_graft/sweep_config.py: give some, as `cl-graft list {}` shows.": "test_cures.py::test_names_that_list_shows",
    "cl_graft/sweep_config.py: write `- lora: {rank: 8}`.": "test_cures.py::test_a_name_with_its_options",
    "cl_graft/sweep_config.py: write `- {}: {rank: 8}`.": "test_cures.py::test_a_name_with_its_options",
    "cl_graft/task.py: rename the suite.": "test_cures.py::test_a_suite_of_another_name",
    "cl_graft/training/launch.py: write a host and its devices as `host slots=8`.": "test_cures.py::test_a_host_and_its_devices",
    "cl_graft/training/term.py: launch with offload=false.": "test_cures.py::test_terms_under_another_stage_of_zero",
    "cl_graft/training/term.py: launch with zero=2.": "test_cures.py::test_terms_under_another_stage_of_zero",
    "cl_graft/training/term.py: move it there, so that a stage of several processes can find it by name.": "test_cures.py::test_a_term_at_the_top_level",
    "cl_graft/transfer/build.py: delete it to do its part of the build anew.": "transfer/test_cures.py::test_answers_that_cannot_be_continued",
    "cl_graft/transfer/config.py: bounds on it (--min-gap, --max-gap) need a --reward-model.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/config.py: give --samples 1 or a higher temperature.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/config.py: give a --min-gap below --max-gap.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/folder.py: build the data again into another --out.": "transfer/test_cures.py::test_what_is_read_back",
    "cl_graft/transfer/folder.py: choose an empty folder as --out.": "transfer/test_cures.py::test_another_folder_or_none",
    "cl_graft/transfer/folder.py: choose another --out or delete the folder.": "transfer/test_cures.py::test_another_folder_or_none",
    "cl_graft/transfer/folder.py: choose another --out, or delete the folder.": "transfer/test_cures.py::test_another_folder_or_none",
    "cl_graft/transfer/folder.py: give these as they were, in this order, further ones behind them, or choose another --out.": "transfer/test_cures.py::test_other_sources",
    "cl_graft/transfer/folder.py: make it, or finish it, with `cl-graft transfer build --out {}`.": "transfer/test_cures.py::test_what_is_read_back",
    "cl_graft/transfer/lines.py: delete it to do its part of the build anew.": "transfer/test_cures.py::test_answers_that_cannot_be_continued",
    "cl_graft/transfer/logits.py: build the data again by `cl-graft transfer build --logits`.": "transfer/test_logits.py::test_a_build_stores_them_for_every_source_and_goes_on_after_a_kill",
    "cl_graft/transfer/prompts.py: fill it, remove the row, or give a --reward-model for such rows.": "transfer/test_cures.py::test_a_row_that_the_rule_cannot_judge",
    "cl_graft/transfer/prompts.py: give --task (SCENARIO/TASK, or a scorer of answers: {}) or a --reward-model.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/prompts.py: give a --task that judges answers, or a --reward-model alone.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/sample.py: run `pip install cl-graft[vllm]` on a machine with a GPU, or use --backend hf.": "transfer/test_cures.py::test_a_source_by_another_backend",
    "cl_graft/transfer/sources.py: leave out --chat, or give a source that was trained to chat.": "transfer/test_cures.py::test_options",
    "cl_graft/transfer/sources.py: shorten the prompt or lower --max-new-tokens.": "transfer/test_cures.py::test_options",
}
# {cure: why no test here runs it}
OPEN: dict[str, str] = {
    "cl_graft/bench/peers.py: `pip install deltatensors=={}`.": "installs a package; where it is installed, tests/test_bench_deltas.py uses it.",
    "cl_graft/skillpack/compress/auto_gptq.py: install auto-gptq 0.7.1 anew.": "installs a package; where it is installed, tests/skillpack/test_auto_gptq.py uses it.",
    "cl_graft/skillpack/compress/auto_gptq.py: install it with `pip install --no-deps auto-gptq==0.7.1`.": "installs a package; where it is installed, tests/skillpack/test_auto_gptq.py uses it.",
    "cl_graft/cli/bench.py: run the same command in a checkout of the source, after `pip install --editable .` there.": "installs a package; the tests of `bench` run in such a checkout.",
    "cl_graft/evaluation/answers.py: install it with `pip install math-verify`.": "installs a package; where it is installed, tests/evaluation/test_answers.py uses it.",
    "cl_graft/evaluation/endpoint.py: run `pip install cl-graft[vllm]` on a machine with a GPU, or use --engine hf.": "installs a package; test_validate_refuses_an_engine_that_cannot_score_or_is_away takes hf.",
    "cl_graft/evaluation/engine.py: use --engine vllm, which starts one for each set of weights.": "vLLM needs a GPU; test_vllm_reads_the_same_token_ids_and_tells_the_same_likelihoods has its protocol.",
    "cl_graft/evaluation/vllm_server.py: see whether it serves the base by itself, or use --engine hf.": "vLLM needs a GPU; test_validate_refuses_an_engine_that_cannot_score_or_is_away takes hf.",
    "cl_graft/data/harness.py: run `pip install cl-graft[lm-eval]`.": "installs a package; where it is installed, tests/evaluation/test_lm_eval.py uses it.",
    "cl_graft/experiment/executors/ray.py: `pip install cl-graft[ray]`.": "installs a package; where it is installed, tests/executors/test_ray.py uses it.",
    "cl_graft/models/from_gguf.py: `pip install cl-graft[gguf]`.": "installs a package; where it is installed, tests/models/test_from_gguf.py uses it.",
    "cl_graft/models/from_gguf.py: join them first with `llama-gguf-split --merge` of llama.cpp.": "a program of llama.cpp, which no package here has.",
    "cl_graft/plugins/find.py: install its package as files.": "installs a package; tests/test_sources.py reads such as are installed as files.",
    "cl_graft/skillpack/tools/gguf_adapter.py: export --to peft, and run llama.cpp's convert_lora_to_gguf.py on that.": "the second half is a program of llama.cpp; the first is run by skillpack/test_export.py::test_what_llama_cpp_does_not_take.",
    "cl_graft/skillpack/tools/gguf_adapter.py: run `pip install cl-graft[gguf]`.": "installs a package; where it is installed, tests/skillpack/test_export.py uses it.",
    "cl_graft/skillpack/folders/tuned.py: run `pip install cl-graft[gguf]`.": "installs a package; where it is installed, tests/skillpack/test_tuned.py uses it.",
    "cl_graft/training/launch.py: install it with `pip install cl-graft[deepspeed]`.": "installs a package; where it is installed, tests/training/test_launch.py uses it.",
    "cl_graft/training/trainer.py: rename its file.": "is told after a step of training; the terms of tests/training/test_terms.py have other names.",
}
