#!/usr/bin/env python3
"""Time 4-bit inference as in 2023: for every token bitsandbytes decodes each weight to bfloat16, and torch multiplies.

    peer_dequantize.py MODEL [--threads 2]

Decoding takes almost all of the time, so one stream of three tokens is timed. Prints one JSON line for
`compare_peers.py`.
"""

import argparse
import json
import time
import warnings

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

warnings.filterwarnings("ignore")


def forward(self: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    weight = dequantize_4bit(self.weight, self.weight.quant_state).to(torch.bfloat16)
    return torch.nn.functional.linear(x.to(torch.bfloat16), weight.view(self.out_features, self.in_features))


@torch.inference_mode()
def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=quantisation, device_map="cpu"
    ).eval()
    ids = torch.randint(300, model.config.vocab_size - 1, (1, 32))
    past = model(ids, use_cache=True).past_key_values  # bitsandbytes packs its weights at the first call
    Linear4bit.forward = forward
    times = []
    for _ in range(3):
        started = time.perf_counter()
        past = model(ids[:, :1], past_key_values=past, use_cache=True).past_key_values
        times.append(time.perf_counter() - started)
    print(json.dumps({"engine": "dequantise, then multiply", "model": args.model, "tg1": 1 / min(times)}))


if __name__ == "__main__":
    main()
