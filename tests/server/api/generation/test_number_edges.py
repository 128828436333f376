"""Numbers at float32's edges in a request: each gets tokens or a 400 that names its field, never a 500."""

from collections.abc import Iterator
from itertools import product

import pytest

from support.server.real_server import BASE, RealServer, make_real_server

COMPLETIONS = "/v1/completions"
EDGES = (
    "0", "0.0", "-0.0", "5e-324", "7e-46", "1.4e-45", "1e-40", "1.1754944e-38", "1e-400", "0.9999999999999999", "1",
    "1.0000000000000002", "-5e-324", "3.4028234663852886e38", "3.5e38", "1.7976931348623157e308", "1e400", "-1e400",
    "2147483648", "9223372036854775808", "1" + "0" * 400, "1" + "0" * 5000, "-1",
)  # fmt: skip
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "min_tokens", "max_tokens", "n", "best_of",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with make_real_server(tmp_path_factory.mktemp("edges")) as live:
        yield live
        live.assert_quiet()


def post(server: RealServer, fields: str) -> None:
    """A completion with `fields`, which are JSON as a client wrote it: no client library would let all of it pass."""
    body = f'{{"model": "{BASE}", "prompt": "edges", {fields}}}'
    with server.client() as client:
        answer = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), (fields[:80], answer.text)
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("field", FIELDS)
def test_each_number_is_answered_or_refused(server: RealServer, field: str) -> None:
    for edge in EDGES:
        others = "" if field in ("max_tokens", "min_tokens") else ', "max_tokens": 2'
        post(server, f'"{field}": {edge}{others}, "stop": ["a"]')


def test_each_number_inside_a_field_is_answered_or_refused(server: RealServer) -> None:
    for edge in EDGES:
        post(server, f'"logit_bias": {{"7": {edge}}}, "max_tokens": 2')


def test_combinations_of_what_is_accepted_give_tokens(server: RealServer) -> None:
    combinations = product(
        (-0.0, 5e-324, 1.4e-45, 2.0),
        (5e-324, 7e-46, 1 - 2**-53, 1.0),
        (-0.0, 5e-324, 1.0),
        (5e-324, 1.0, 2.0),
    )
    for temperature, top_p, min_p, penalty in list(combinations)[::5]:  # each value of a field meets all of another
        fields = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
        body = {"model": BASE, "prompt": "edges", "max_tokens": 3, "ignore_eos": True, "top_k": 1000, **fields}
        with server.client() as client:
            answer = client.post(COMPLETIONS, json={**body, "logit_bias": {"7": -100}, "logprobs": 1})
        assert answer.status_code == 200, (fields, answer.text)
        assert answer.json()["usage"]["completion_tokens"] == 3, fields
