"""What trainers change of a model besides its weights is put back, so that a recalled stage leads to the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from cl_graft.config import Launch
from cl_graft.evaluation.generate import answers
from cl_graft.models.embedded import toy_tokenizer
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training.config import dpo_job, sft_job
from cl_graft.training.fit import fit

EXAMPLES = [Example(f"Q: Copy ab{c}.\nA: ", f"ab{c}") for c in "cdefghij"]
PAIRS = [Pair(e.prompt, e.completion, "zz") for e in EXAMPLES]
HALF = Preference(steps=2, batch=4, learning_rate=1e-3)
TASK = Task("t", EXAMPLES, (), "exact", training=Training(2, 4, 1e-3, preference=HALF))
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "qwen3-moe": lambda **k: hf.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=16, **k
    ),
    "mixtral": lambda **k: hf.MixtralConfig(**SHAPE, num_local_experts=4, **k),
    "gpt2": lambda **k: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **k),
    "llama-dynamic": lambda **k: hf.LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 8},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        **k,
    ),
}


def made(name):
    tokenizer = toy_tokenizer()
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    config = MODELS[name](vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    return hf.AutoModelForCausalLM.from_config(config).eval(), tokenizer


def about(model):
    """All of a model that is not its weights, as plain data."""
    return copy.deepcopy(
        {
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "modules": {
                name: {
                    k: (list(v.values()) if "hooks" in k else v)
                    for k, v in vars(module).items()
                    if k == "forward" or "hooks" in k or isinstance(v, (bool, int, float, str))
                }
                for name, module in model.named_modules()
            },
            "buffers": {name: x.tolist() for name, x in model.named_buffers()},
        }
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_model_is_as_it_was_but_for_its_weights(tmp_path, name, checkpointing):
    """Mixtures of experts: output_router_logits stayed on (TRL 1.16), and `generate` fails with it (transformers 5.23).
    GPT-2: DPO left every dropout at 0, and so the next task's SFT trained without. Dynamic positions grew."""
    model, tokenizer = made(name)
    before = about(model)
    for job in (sft_job(TASK, 0), dpo_job(TASK, PAIRS, 0)):
        fit(model, tokenizer, *job, Launch(checkpointing=checkpointing), tmp_path / job[1].kind)
        assert about(model) == before
    assert len(answers(model, tokenizer, ["Q: Copy abc.\nA: ", "Q"], 4)) == 2


def test_an_adapter_of_the_trainers_own_is_gone(nano, tmp_path):
    """TRL's DPO (1.16) puts a second adapter beside one that is trained, as its reference."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = nano
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    names = [name for name, _ in wrapped.named_parameters()]
    learned = [p.requires_grad for p in wrapped.parameters()]
    fit(wrapped, tokenizer, *dpo_job(TASK, PAIRS, 0), Launch(), tmp_path)
    assert [name for name, _ in wrapped.named_parameters()] == names
    assert [p.requires_grad for p in wrapped.parameters()] == learned


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_a_mixture_of_experts_runs_to_its_end(tmp_path, name, call):
    model, tokenizer = made(name)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ("mini.tasks=math", "mini.steps=2", "mini.train_size=8", "mini.test_size=4")
    options = [word for size in sizes for word in ("--set", size)]
    done = call(
        *("run", "--scenario", "mini", "--strategy", "individual", "--wandb", "off"),
        *("--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options),
    )
    assert done.code == 0, done.err
