"""Choosing a provider by name."""

import pytest
import torch

from guanaco.kernels import PROVIDERS, Ops, load_ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_says_what_it_is(name: str) -> None:
    ops: Ops = load_ops(name, device=CPU, dtype=torch.bfloat16, decoded_weights_bytes=0)
    assert (ops.name, ops.device, ops.dtype) == (name, CPU, torch.bfloat16)


def test_an_unknown_provider_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel provider 'cuda'.*reference"):
        load_ops("cuda", device=CPU, dtype=torch.float32, decoded_weights_bytes=0)
