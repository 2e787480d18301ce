#!/usr/bin/env bash
# transformers 5.23.0: `transformers serve` passes over `echo` and `logprobs`, and answers by weights that are gone.
#
# Asked at /v1/completions as harnesses ask OpenAI-compatible servers for the likelihood of a text (echo, logprobs), the guess
# was a refusal that names the fields, as for those it does not know. Seen: HTTP 200, the text without the prompt, and no
# log-probabilities; a warning stands in the server's own log, once. And a folder is loaded once by its path: where other
# weights are written to the same folder, as a training run does, the answers are those of the first for as long as the
# model is asked at least every 300 seconds, with nothing that says so. `POST /reset` lets go of it.
#
# Installs pinned packages in a temporary folder, serves two random models there, and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${serve:-0}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers[serving]==5.23.0"
export HF_HUB_OFFLINE=1 PORT=8917 FOLDER="$folder"
"$folder/env/bin/transformers" serve --host 127.0.0.1 --port $PORT --device cpu >"$folder/log" 2>&1 &
serve=$!
"$python" - <<'PYTHON'
import json, os, time, urllib.request

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

root, place = f"http://127.0.0.1:{os.environ['PORT']}", os.environ["FOLDER"] + "/model"
words = {"<s>": 0, "</s>": 1, **{f"w{n}": n + 2 for n in range(30)}}
raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def save(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, bos_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    ids = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False),
                         max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


def ask(path, **body):
    data = json.dumps(body).encode()
    asked = urllib.request.Request(root + path, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(asked, timeout=120))


def said(**more):
    body = {"model": place, "prompt": "w1 w2 w3", "max_tokens": 8, "temperature": 0.0}
    return ask("/v1/completions", **body | more)["choices"][0]


for _ in range(120):
    try:
        urllib.request.urlopen(root + "/health", timeout=2)
        break
    except OSError:
        time.sleep(1)
first = save(0)
choice = said(echo=True, logprobs=1)
print("asked for echo and logprobs:", choice)
assert "logprobs" not in choice and not choice["text"].startswith("w1 w2 w3"), "the behaviour is another now"
assert choice["text"] == first
second = save(1)
print("weights on disk now say:", second)
print("the server says:        ", said()["text"])
assert said()["text"] == first != second, "the behaviour is another now"
ask("/reset")
assert said()["text"] == second
print("after /reset:           ", second)
PYTHON
grep -m1 "Ignoring unsupported fields" "$folder/log"
