"""Small tokenizers with the chat templates of two model families, as the tests need them."""

from __future__ import annotations

from typing import Any

# In the manner of Llama 3: a beginning-of-text token, headers, a date, an end-of-turn token.
LLAMA = (
    "{{ bos_token }}<|start|>system<|end|>\n\n"
    "Today: {% if date_string is defined %}{{ date_string }}"
    "{% elif strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}<|eot|>"
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# ChatML, as Qwen's: no token before the text.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_tokenizer(template: str | None = LLAMA) -> Any:
    """Bytes as tokens; `tokenizer(text)` begins with the beginning-of-text token."""
    return _bytes(
        ["<|begin|>", "<|start|>", "<|end|>", "<|eot|>", "<|pad|>"],
        template,
        bos="<|begin|>",
        eos="<|eot|>",
    )


def qwen_tokenizer(template: str | None = CHATML) -> Any:
    """Bytes as tokens, and nothing added."""
    return _bytes(["<|im_start|>", "<|im_end|>", "<|pad|>"], template, bos=None, eos="<|im_end|>")


def _bytes(special: list[str], template: str | None, bos: str | None, eos: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=eos,
        pad_token="<|pad|>",
        chat_template=template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
