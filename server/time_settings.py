"""The settings of time limits. A part of `server/config.py`, the only module that reads their values."""

from typing import Annotated

from pydantic import BaseModel, Field

from guanaco.server.setting_types import Seconds


class TimeSettings(BaseModel):
    """Time limits in seconds: of requests, connections, a stuck engine and the shutdown."""

    queue_timeout: Seconds = Field(60.0, description="seconds a request may wait before it is refused with 503")
    adapter_timeout: Seconds = Field(
        20.0, description="seconds a request may wait for its adapter to be read before it is refused with 503"
    )
    request_timeout: Seconds = Field(600.0, description="seconds a request may take altogether")
    step_timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="seconds without progress of a busy engine after which it counts as stuck"
    )
    grammar_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        2.0, description="seconds that a request's JSON schema, regex or grammar may take to compile; more gets 400"
    )
    header_timeout: Seconds = Field(10.0, description="seconds a client may take to send its request head")
    body_timeout: Seconds = Field(30.0, description="seconds a client may take to send its request body")
    response_ttl: Seconds = Field(
        3600.0, description="seconds for which answers of /v1/responses are kept; 0: none is kept"
    )
    keep_alive_timeout: Seconds = Field(30.0, description="seconds an idle connection is kept")
    drain_delay: Seconds = Field(0.0, description="seconds after SIGTERM in which new requests are still accepted")
    drain_timeout: Seconds = Field(30.0, description="seconds that running requests get to finish after SIGTERM")
