"""The demo model, as it is served, against transformers over the same weights: greedy decoding."""

from collections.abc import Callable
from pathlib import Path

from guanaco.models.loading.loader import load_model
from guanaco.models.text.tokenizer import Tokenizer
from support.models.oracles import follow_greedy, reference_ops, transformers_oracle

QUESTIONS = (
    "How do I boil an egg?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "What is 17 times 3? Show your work, please.",
    "Explain gravity to a child in two sentences.",
    "def fibonacci(n):",
    "Translate 'good morning' into French, German and Spanish.",
    "List the planets of the solar system, in order, and say one thing about each of them.",
)
TOLERANCE = 1e-4  # relative, in fp32 compute


def test_greedy_decoding_is_the_oracles(demo_model_dir: Path, proof_count: Callable[[int, int], int]) -> None:
    """Eight chat prompts in one paged batch, in pieces; `make accept` decodes 64 tokens of each."""
    tokenizer = Tokenizer.from_directory(demo_model_dir)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    model = load_model(demo_model_dir, reference_ops(decoded_weights_bytes=2 << 30)).model
    num_tokens = proof_count(16, 64)
    report = follow_greedy(model, transformers_oracle(demo_model_dir), prompts, num_tokens, chunk=24)
    assert report.num_tokens == len(QUESTIONS) * num_tokens
    assert report.largest_error < TOLERANCE
    assert report.largest_gap < TOLERANCE
    assert report.num_mismatches <= 2
