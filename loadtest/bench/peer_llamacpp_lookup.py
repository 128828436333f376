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


def rate(llm: "llama_cpp.Llama", items: list[dict[str, list[int]]]) -> float:
    """Tokens/s from the first token of each answer on."""
    tokens, seconds = 0, 0.0
    for item in items:
        prompt, answer = item["prompt"], item["answer"]

        def only(
            input_ids: np.ndarray, scores: np.ndarray, start: int = len(prompt), answer: list[int] = answer
        ) -> np.ndarray:
            place = len(input_ids) - start
            if 0 <= place < len(answer):
                kept = scores[answer[place]]
                scores[:] = -np.inf
                scores[answer[place]] = kept if np.isfinite(kept) else 0.0
            return scores

        llm.reset()
        started, count = 0.0, 0
        for token in llm.generate(prompt, temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([only])):
            assert token == answer[count], (token, answer[count])
            count += 1
            started = started or time.perf_counter()
            if count == len(answer):
                break
        tokens, seconds = tokens + count - 1, seconds + time.perf_counter() - started
    return tokens / seconds


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
