"""Greedy answers with their logits, and how far two providers' are apart: for the tests and `gpu_check.py`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guanaco.server.engine.request import TokenOutput

Answers = dict[str, list[tuple[int, Tensor]]]  # by request: each token, and the logits that it was the largest of


def add_outputs(answers: Answers, outputs: Iterable[TokenOutput]) -> None:
    """What a step gave to requests with `return_logits`. Raises RuntimeError for a request that failed."""
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"{output.request_id}: {output.error}")
        for token in output.token_ids:
            assert output.logits is not None
            logits = torch.frombuffer(bytearray(output.logits), dtype=torch.float32)
            answers.setdefault(output.request_id, []).append((token, logits))


def tokens_of(answers: Answers) -> dict[str, list[int]]:
    return {name: [token for token, _ in steps] for name, steps in answers.items()}


@dataclass(frozen=True)
class Distance:
    """Of answers from the expected ones, over the steps until their tokens part: after that they had other inputs."""

    largest_error: float  # of a logit, over the largest logit of its step
    num_steps: int  # compared
    num_parted: int  # requests


def distance(answers: Mapping[str, list[tuple[int, Tensor]]], expected: Answers) -> Distance:
    """Two tokens that part differ by less than twice the error in the expected logits, or the error is not as told."""
    assert answers.keys() == expected.keys()
    error, compared, parted = 0.0, 0, 0
    for name, steps in expected.items():
        assert len(answers[name]) == len(steps), name
        for (token, logits), (expected_token, exact) in zip(answers[name], steps, strict=True):
            # NaN is the largest error.
            here = float((logits - exact).abs().max() / exact.abs().max())
            error, compared = max(error, here if here == here else float("inf")), compared + 1
            if token != expected_token:
                parted += 1
                break
    return Distance(error, compared, parted)
