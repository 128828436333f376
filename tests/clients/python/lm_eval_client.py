"""lm-evaluation-harness: its docs/API_guide.md, with a task of local JSON, against transformers on the same weights.

The reference computes the demo model's NF4 weights, decoded to float32, with transformers. `--tolerance` is how far a
log-likelihood of a continuation may be from it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from checks import MODEL, URL, check, run_checks

os.environ |= {
    "HF_HOME": os.environ["GUANACO_SCRATCH"],
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENAI_API_KEY": "none",
}

import bitsandbytes as bnb
import lm_eval
import torch
from bitsandbytes.functional import dequantize_4bit
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from guanaco.models.loading.demo import demo_path
from guanaco.server.config import Settings

DEMO = demo_path(Settings().cache_dir)
FACTS = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(Path(__file__).parent / "lm_eval_data/facts.jsonl")}},
    "test_split": "test",
    "doc_to_text": "{{context}}",
}
CHOICE = {
    **FACTS,
    "task": "facts_choice",
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
CONTINUATION = {
    **FACTS,
    "task": "facts_continuation",
    "output_type": "loglikelihood",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATION = {
    **FACTS,
    "task": "facts_generation",
    "output_type": "generate_until",
    "doc_to_text": "Q: {{context}}\nA:",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n", "Q:"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match"}],
}


def samples(model: Any, task: dict[str, Any], **options: Any) -> list[Any]:
    """What the model answered to each document, in order."""
    found = lm_eval.simple_evaluate(model=model, tasks=[dict(task)], log_samples=True, bootstrap_iters=0, **options)
    ordered = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [response for sample in ordered for responses in sample["resps"] for response in responses]


def through_server(task: dict[str, Any], **options: Any) -> list[Any]:
    arguments = {
        "model": MODEL,
        "base_url": f"{URL}/v1/completions",
        "tokenizer": str(DEMO),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": 2048,
    }
    return samples("local-completions", task, model_args=arguments, batch_size=4, **options)


def reference() -> HFLM:
    """transformers, with every NF4 layer replaced by its weights in float32."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, device_map="cpu")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                state = child.weight.quant_state
                state.dtype = torch.float32  # else the decoded weights would be rounded to 16 bits
                weight = dequantize_4bit(child.weight.data, state).view(*state.shape)
                layer = torch.nn.Linear(*reversed(state.shape), bias=False)
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, layer)
    torch.nn.Module.float(model)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, max_length=2048, batch_size=1)


def compare(ours: list[Any], theirs: list[Any], tolerance: float) -> str:
    """The largest difference of two lists of (log-likelihood, whether greedy)."""
    assert len(ours) == len(theirs) > 0
    apart = [abs(float(one[0]) - float(other[0])) for one, other in zip(ours, theirs, strict=True)]
    worst, mean = max(apart), sum(apart) / len(apart)
    greedy = sum(bool(one[1]) != bool(other[1]) for one, other in zip(ours, theirs, strict=True))
    text = (
        f"{len(ours)} log-likelihoods, differences: mean {mean:.5f}, largest {worst:.5f}; {greedy} greedy flags differ"
    )
    assert worst <= tolerance, text
    assert greedy == 0, text
    return text


def register(tolerance: float) -> None:
    oracle = reference()

    @check("local-completions, multiple_choice")
    def choice() -> str:
        return compare(through_server(CHOICE), samples(oracle, CHOICE), tolerance)

    @check("local-completions, loglikelihood")
    def continuation() -> str:
        return compare(through_server(CONTINUATION), samples(oracle, CONTINUATION), tolerance)

    @check("local-completions, generate_until")
    def generation() -> str:
        ours, theirs = through_server(GENERATION), samples(oracle, GENERATION)
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        text = f"{same} of {len(theirs)} texts equal"
        assert all(ours), text
        assert same == len(theirs) or tolerance > 0.001, text
        return text

    @check("local-chat-completions, generate_until")
    def chat() -> str:
        arguments = {"model": MODEL, "base_url": f"{URL}/v1/chat/completions", "num_concurrent": 2}
        texts = samples("local-chat-completions", GENERATION, model_args=arguments, apply_chat_template=True)
        assert len(texts) == 8
        assert all(isinstance(text, str) for text in texts)
        return texts[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tolerance", type=float, required=True)
    register(parser.parse_args().tolerance)
    run_checks()
