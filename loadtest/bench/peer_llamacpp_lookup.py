#!/usr/bin/env python3
"""Time llama.cpp on given answers, without and with its prompt lookup. Prints one JSON line for `speculation.py`.

    PEERS/bin/python loadtest/bench/peer_llamacpp_lookup.py MODEL.gguf --threads 2 < ITEMS.json

A logits processor allows only the answer's next token, as the constraint does in this server's run.
"""

import argparse
import json
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def answer_seconds(llm: "llama_cpp.Llama", prompt: list[int], answer: list[int]) -> float:
    """The time from the first token of the answer to its last one."""
    count = 0

    def only(_: np.ndarray, scores: np.ndarray) -> np.ndarray:
        # Called once for each token that is taken. The input ids tell no place, since drafts stand in them, too.
        if count < len(answer):
            kept = scores[answer[count]]
            scores[:] = -np.inf
            scores[answer[count]] = kept if np.isfinite(kept) else 0.0
        return scores

    llm.reset()
    started = 0.0
    for token in llm.generate(prompt, temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([only])):
        assert token == answer[count], (count, token, answer[count])
        count += 1
        started = started or time.perf_counter()
        if count == len(answer):
            break
    return time.perf_counter() - started


def rate(llm: "llama_cpp.Llama", items: list[dict[str, list[int]]]) -> float:
    """Tokens/s from the first token of each answer on."""
    seconds = sum(answer_seconds(llm, item["prompt"], item["answer"]) for item in items)
    return sum(len(item["answer"]) - 1 for item in items) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    items = json.load(sys.stdin)
    common = {"n_ctx": 2048, "n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False}
    plain = llama_cpp.Llama(args.model, **common)
    result = {"plain": round(rate(plain, items), 2)}
    plain.close()
    for count in (2, 5, 10):
        drafts = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=count)
        llm = llama_cpp.Llama(args.model, draft_model=drafts, logits_all=True, **common)
        result[f"lookup of {count}"] = round(rate(llm, items), 2)
        llm.close()
    result["best ratio"] = round(max(v for k, v in result.items() if k != "plain") / result["plain"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
