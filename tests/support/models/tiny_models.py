"""Random small LLaMA checkpoints with a tokenizer, made through transformers: a whole server runs on one.

Weights are scaled so that the next token depends on the context and the greedy choice is clear. Used by the tests of
the model, the engine, the API and the whole server.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; <|im_end|> is eos
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GQA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Wavelengths of 16 dimensions at base 10000 are 6 to 20000 positions: this scaling touches all three of its ranges.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    # Rows of 80 and 176 weights: NF4 groups of 64 cross them. 5 heads of 16, one of them for K and V.
    "odd": {"hidden_size": 80, "intermediate_size": 176, "num_attention_heads": 5, "num_key_value_heads": 1},
    # Heads that do not add up to the hidden size.
    "wide_heads": {"head_dim": 32},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "llama3_rope": {"rope_parameters": _LLAMA3},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}


def make_tiny_llama(
    path: Path,
    *,
    kind: str = "gqa",
    seed: int = 0,
    quantized: bool | str = False,
    vocab_size: int = 384,
    dtype: torch.dtype = torch.bfloat16,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `kind` (a key of KINDS) with tokenizer and chat template into `path`, and return it.

    quantized: "single" or "double" (True means double) saves it in NF4 through bitsandbytes instead of in `dtype`.
    overrides: further fields of transformers' config; `model_type` for another than LLaMA.
    """
    model = tiny_llama(kind=kind, seed=seed, vocab_size=vocab_size, **overrides).to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    if quantized:
        _save_quantized(model, path, double=quantized != "single")
    else:
        model.save_pretrained(path)
    write_tokenizer(path, vocab_size)
    return path


def tiny_llama(*, kind: str = "gqa", seed: int = 0, vocab_size: int = 384, **overrides: Any) -> Any:
    """A transformers model of `kind` in float32, with random weights: LlamaForCausalLM unless `model_type` says
    another."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**_GQA, **KINDS[kind], **overrides}
    fields = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields}
    config = AutoConfig.for_model(vocab_size=vocab_size, attn_implementation="eager", **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "bias" in name:
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name and not config.tie_word_embeddings:
                parameter.copy_(noise)
            else:  # a tied embedding is scaled as the head that it also is
                gain = 4.0 if "lm_head" in name or "embed_tokens" in name else 1.5
                parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)
    return model


def write_tokenizer(path: Path, vocab_size: int = 384) -> None:
    """Byte-level BPE of exactly `vocab_size` ids: 3 special tokens, 256 bytes, merges, fillers. It adds no BOS."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer(vocab_size))
    tokenizer.save(str(path / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "unk_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(fields, indent=1))


@cache
def _trained_tokenizer(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [__doc__ or "", *KINDS, "Hello, how are you? Fine, thank you. Ahoy, me hearties!"], trainer
    )
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(missing)])
    return str(tokenizer.to_str())


def _save_quantized(model: Any, path: Path, *, double: bool) -> None:
    """Through bitsandbytes, as a user would: load with a quantization_config, save before any forward pass."""
    import tempfile

    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        quantised = LlamaForCausalLM.from_pretrained(
            dense, quantization_config=quantization, dtype=model.dtype, device_map="cpu"
        )
    quantised.save_pretrained(path)
