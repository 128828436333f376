#!/usr/bin/env python3
"""An endpoint picker for Envoy. It speaks the protocol of the Kubernetes inference gateway's picker, and is for tests.

    PYTHON loadtest/replicas/picker.py --port 9002 --replica 127.0.0.1:8001 --replica 127.0.0.1:8002

PYTHON is an interpreter with envoy_data_plane and aiohttp (docs/replicas.md). Envoy streams each request to the picker
(ext_proc, full duplex). The picker reads `model` from the body, scores the replicas by their gauges, and answers with
the header `x-gateway-destination-endpoint`: the best replica, then the others for retries. It answers 503 if no replica
is ready.
"""

import argparse
import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    ExternalProcessorBase,
    HeaderMutation,
    HeadersResponse,
    HttpBody,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from grpclib.server import Server

DESTINATION = "x-gateway-destination-endpoint"
# The weights of the queue and of the KV cache are the gateway's. The adapters' weight is high enough to decide between
# replicas with the adapter and without. A tie goes to the shorter queue.
WEIGHTS = {"lora": 10.0, "queue": 2.0, "kv": 2.0}
SCRAPE_SECONDS = 0.2  # the gateway scrapes every 0.05 s; here two cores also run the replicas
_LORA = re.compile(r"^vllm:lora_requests_info\{(.*)\} (\S+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Replica:
    address: str
    ready: bool = False
    waiting: float = 0.0
    kv_used: float = 0.0
    max_lora: int = 1
    running: frozenset[str] = frozenset()
    queued: frozenset[str] = frozenset()
    picked: int = 0
    picked_resident: int = 0

    def read(self, text: str) -> None:
        """Set the gauges from the text of /metrics."""
        self.waiting, self.kv_used = _gauge(text, "num_requests_waiting"), _gauge(text, "kv_cache_usage_perc")
        newest = max(_LORA.findall(text), key=lambda found: float(found[1]), default=None)
        if newest is not None:  # several label sets may be exposed; the value is the time of the change
            labels = dict(_LABEL.findall(newest[0]))
            self.max_lora = int(labels["max_lora"])
            self.running = frozenset(filter(None, labels["running_lora_adapters"].split(",")))
            self.queued = frozenset(filter(None, labels["waiting_lora_adapters"].split(",")))

    def lora_score(self, model: str) -> float:
        """The gateway's LoRA affinity: 1.0 active, 0.8 a free slot, 0.6 waiting, 0.0 none of these."""
        if model in self.running:
            return 1.0
        if len(self.running) + len(self.queued) < self.max_lora:
            return 0.8
        return 0.6 if model in self.queued else 0.0


def _gauge(text: str, name: str) -> float:
    found = re.search(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.M)
    return 0.0 if found is None else float(found[1])


def ranked(replicas: list[Replica], model: str) -> list[Replica]:
    """The ready replicas, the best first; equal ones in random order."""
    ready = [replica for replica in replicas if replica.ready]
    most, least = (pick((r.waiting for r in ready), default=0.0) for pick in (max, min))

    def score(replica: Replica) -> float:
        queue = 1.0 if most == least else (most - replica.waiting) / (most - least)
        parts = {"lora": replica.lora_score(model), "queue": queue, "kv": 1.0 - replica.kv_used}
        return sum(WEIGHTS[part] * value for part, value in parts.items())

    random.shuffle(ready)
    return sorted(ready, key=score, reverse=True)


async def scrape(replica: Replica) -> None:
    """Read a replica's readiness and gauges every SCRAPE_SECONDS, without end."""
    timeout = aiohttp.ClientTimeout(total=2)
    async with aiohttp.ClientSession(f"http://{replica.address}", timeout=timeout) as session:
        while True:
            try:
                async with session.get("/health/ready") as health:
                    is_ready = health.status == 200
                async with session.get("/metrics") as metrics:
                    replica.read(await metrics.text())
                replica.ready = is_ready
            except (aiohttp.ClientError, TimeoutError):
                replica.ready = False
            await asyncio.sleep(SCRAPE_SECONDS)


class Picker(ExternalProcessorBase):
    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas

    async def process(self, messages: AsyncIterator[ProcessingRequest]) -> AsyncIterator[ProcessingResponse]:
        """One HTTP request: headers, then the body in pieces. The answer to the headers waits for the whole body."""
        body = bytearray()
        async for message in messages:
            if message.request_headers is not None:
                if message.request_headers.end_of_stream:  # no body: any replica will do
                    yield self._headers("")
            elif message.request_body is not None:
                body += message.request_body.body
                if message.request_body.end_of_stream:
                    yield self._headers(_model_of(bytes(body)))
                    yield _body(message.request_body, bytes(body))
            elif message.request_trailers is not None:
                yield ProcessingResponse(request_trailers=TrailersResponse())

    def _headers(self, model: str) -> ProcessingResponse:
        order = ranked(self.replicas, model)
        if not order:
            return ProcessingResponse(
                immediate_response=ImmediateResponse(
                    status=HttpStatus(code=StatusCode.ServiceUnavailable), body=b"no replica is ready"
                )
            )
        order[0].picked += 1
        order[0].picked_resident += model in order[0].running
        value = ",".join(replica.address for replica in order)
        header = HeaderValueOption(header=HeaderValue(key=DESTINATION, raw_value=value.encode()))
        mutation = HeaderMutation(set_headers=[header])
        response = CommonResponse(header_mutation=mutation, clear_route_cache=True)
        return ProcessingResponse(request_headers=HeadersResponse(response=response))


def _model_of(body: bytes) -> str:
    try:
        model = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError):
        return ""
    return model if isinstance(model, str) else ""


def _body(last: HttpBody, body: bytes) -> ProcessingResponse:
    streamed = StreamedBodyResponse(body=body, end_of_stream=last.end_of_stream)
    mutation = BodyMutation(streamed_response=streamed)
    return ProcessingResponse(request_body=BodyResponse(response=CommonResponse(body_mutation=mutation)))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replica", action="append", required=True, help="ADDRESS:PORT; repeat for more")
    args = parser.parse_args()
    replicas = [Replica(address) for address in args.replica]
    tasks = [asyncio.create_task(scrape(replica)) for replica in replicas]
    server = Server([Picker(replicas)])
    await server.start("127.0.0.1", args.port)
    while True:
        await asyncio.sleep(5)
        shown = {r.address: (r.ready, r.picked, r.picked_resident, sorted(r.running)) for r in replicas}
        print(f"{time.time():.1f} {shown}", flush=True)
        assert not any(task.done() for task in tasks)


if __name__ == "__main__":
    asyncio.run(main())
