#!/usr/bin/env python3
"""Make a random checkpoint with Qwen2-0.5B's shape, and the same model as GGUF, for the timings of `compare_peers.py`.

    PEERS/bin/python loadtest/bench/make_qwen2.py QWEN05 QWEN05.gguf

PEERS is an environment with torch, transformers, gguf and llama-cpp-python. The GGUF file is in IQ4_NL; its embedding,
which is also the head, has 16 bits as in the other engines.
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"vocab_size": 512}
ROPE_THETA = 1e6
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def make_model(out: Path, shape: dict[str, Any]) -> Any:
    """Write N(0, 0.02) weights in bfloat16 with biases of q, k and v, and a byte-level tokenizer. Returns the state."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(out)
    path = out / "config.json"
    # Field names that older readers know.
    fields = json.loads(path.read_text()) | {"rope_theta": ROPE_THETA, "torch_dtype": "bfloat16"}
    fields.pop("rope_parameters", None)
    path.write_text(json.dumps(fields, indent=1))
    write_tokenizer(out, shape["vocab_size"])
    return model.state_dict()


def write_tokenizer(out: Path, vocab_size: int) -> None:
    """Write a tokenizer that every engine can load. The vocabulary is filled up with tokens that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<extra_{i}>" for i in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(out / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(fields, indent=1))


def write_gguf(state: Any, shape: dict[str, Any], out: Path) -> None:
    """Write the state as a 16-bit GGUF file for llama.cpp's qwen2. Its vocabulary is made up: benchmarks feed ids."""
    import gguf
    import numpy as np

    w = gguf.GGUFWriter(str(out), "qwen2")
    w.add_block_count(shape["num_hidden_layers"])
    w.add_context_length(shape["max_position_embeddings"])
    w.add_embedding_length(shape["hidden_size"])
    w.add_feed_forward_length(shape["intermediate_size"])
    w.add_head_count(shape["num_attention_heads"])
    w.add_head_count_kv(shape["num_key_value_heads"])
    w.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    w.add_rope_freq_base(ROPE_THETA)
    w.add_vocab_size(shape["vocab_size"])
    w.add_file_type(1)
    w.add_tokenizer_model("llama")
    names = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    w.add_token_list(names + [f"t{i}".encode() for i in range(len(names), shape["vocab_size"])])
    w.add_token_scores([0.0] * shape["vocab_size"])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (shape["vocab_size"] - len(names)))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for key, tensor in state.items():
        if key == "lm_head.weight":  # the embedding again
            continue
        values = tensor.float().numpy()
        name = TOP.get(key)
        if name is None:
            _, _, layer, *module, kind = key.split(".")
            name = f"blk.{layer}.{LAYER['.'.join(module)]}.{kind}"
        w.add_tensor(name, values if values.ndim == 1 else values.astype(np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def quantize(source: Path, out: Path) -> None:
    """Quantise a GGUF file to IQ4_NL with llama.cpp; embedding and head keep 16 bits."""
    import gguf
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL
    options.nthread = 2
    options.output_tensor_type = options.token_embedding_type = gguf.GGMLQuantizationType.F16.value
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) != 0:
        sys.exit("llama.cpp could not quantise the model")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="directory to write")
    p.add_argument("gguf", type=Path, nargs="?", help="GGUF file to write; without it there is none")
    p.add_argument("--tiny", action="store_true", help="a model of two narrow layers, to try the command")
    args = p.parse_args()
    shape = TINY if args.tiny else SHAPE
    state = make_model(args.model, shape)
    if args.gguf is not None:
        whole = args.gguf.with_suffix(".f16.gguf")
        write_gguf(state, shape, whole)
        quantize(whole, args.gguf)
        whole.unlink()


if __name__ == "__main__":
    main()
