"""The options of `guanaco bench serve`, as typer reads them. Used by `main`; heavy imports happen inside the verb.

Names and defaults are those of `vllm bench serve` where it has the option.
"""

from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option
_BaseUrl = Annotated[str, Option("--base-url", "--url", help="the server, with or without /v1")]
_Backend = Annotated[str, Option(help="openai-chat (/v1/chat/completions) or openai (/v1/completions)")]
_Endpoint = Annotated[str | None, Option(metavar="PATH", help="another path (none: the backend's)")]
_Key = Annotated[str | None, Option(envvar="OPENAI_API_KEY", help="the server's API key; it is in no result")]
_Header = Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="a header of each request; repeatable")]
_Insecure = Annotated[bool, Option("--insecure", help="do not check the server's certificate")]
_Model = Annotated[str | None, Option(metavar="NAME", help="the model or adapter (none: the server's first)")]
_Models = Annotated[
    str | None, Option("--models", "--lora-modules", metavar="A,B,…", help="several, or all: what the server lists")
]
_Zipf = Annotated[float, Option(min=0.0, max=20.0, help="exponent of their popularity, in their order; 0: all alike")]
_Assignment = Annotated[str, Option(help="of --models to requests: random or round-robin")]
_Dataset = Annotated[str | None, Option(help="random, custom (JSONL or a log), openassistant or vicuna")]
_DatasetPath = Annotated[Path | None, Option(metavar="FILE", help="its file; alone it means custom")]
_NumPrompts = Annotated[int | None, Option(min=1, help="requests of each run (none: 1000, or --duration's)")]
_Duration = Annotated[float | None, Option(min=0.1, help="seconds of arrivals in each run, instead of --num-prompts")]
_InputLen = Annotated[
    int, Option("--random-input-len", "--input-len", min=1, max=1_000_000, help="tokens of a made-up prompt, about")
]
_RangeRatio = Annotated[float, Option(min=0.0, max=1.0, help="their lengths spread by this share, both ways")]
_OutputLen = Annotated[
    int | None, Option("--output-len", "--random-output-len", min=1, help="most tokens (none: the data's, or 128)")
]
_IgnoreEos = Annotated[bool, Option("--ignore-eos", help="answers have exactly that many tokens (vLLM, guanaco)")]
_Shared = Annotated[bool, Option("--shared-prompts", help="send a repeated prompt as it is, so that caches help")]
_Temperature = Annotated[float | None, Option(min=0.0, help="of the answers (none: the server's)")]
_ExtraBody = Annotated[str | None, Option(metavar="JSON", help="further fields of each request's body")]
_Rate = Annotated[str, Option(metavar="N[,N…]", help="requests/s; inf: all at once; several: one run each")]
_Burstiness = Annotated[float, Option(help="1: Poisson arrivals; below 1: bursts (CV 1/√B); inf: even gaps")]
_RampUp = Annotated[str | None, Option(help="linear or exponential: the rate grows during the run")]
_RampStart = Annotated[float | None, Option(help="requests/s at its start")]
_RampEnd = Annotated[float | None, Option(help="requests/s at its end")]
_SelfTimed = Annotated[bool, Option("--self-timed", help="requests come at the times in the data, not at a rate")]
_Concurrency = Annotated[int | None, Option(min=1, help="most requests on the way; others wait here, and it counts")]
_CancelRate = Annotated[float, Option(min=0.0, max=100.0, help="percent of requests that we leave before their end")]
_CancelDelay = Annotated[float, Option(min=0.0, help="seconds after which we leave those")]
_Timeout = Annotated[float, Option(min=0.1, help="seconds that one request may take")]
_Warmups = Annotated[int, Option(min=0, help="requests before the first run that do not count")]
_Ready = Annotated[float, Option(min=0.0, help="seconds to wait until the server answers")]
_Metrics = Annotated[str, Option(help="latencies in the table: ttft, tpot, itl, e2el")]
_Percentiles = Annotated[str, Option(help="their percentiles, comma-separated")]
_Goodput = Annotated[
    list[str] | None, Option(metavar="NAME:MS", help="goal of each request, such as ttft:1000; repeatable")
]
_Save = Annotated[bool, Option("--save-result", help="write JSON for each run and one HTML report")]
_Detailed = Annotated[bool, Option("--save-detailed", help="each request's times and texts in the JSON too")]
_Dir = Annotated[Path, Option(metavar="DIR", help="where results go")]
_Filename = Annotated[str | None, Option(metavar="NAME", help="the JSON's name (none: rate, model and date)")]
_Report = Annotated[Path | None, Option(metavar="FILE", help="write the HTML report there")]
_Label = Annotated[str, Option(help="first part of the results' names")]
_Metadata = Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="an entry of the JSON; repeatable")]


def bench_serve(
    base_url: _BaseUrl = "http://127.0.0.1:8000",
    backend: _Backend = "openai-chat",
    endpoint: _Endpoint = None,
    api_key: _Key = None,
    header: _Header = None,
    insecure: _Insecure = False,
    model: _Model = None,
    models: _Models = None,
    zipf: _Zipf = 0.0,
    lora_assignment: _Assignment = "random",
    dataset_name: _Dataset = None,
    dataset_path: _DatasetPath = None,
    num_prompts: _NumPrompts = None,
    duration: _Duration = None,
    random_input_len: _InputLen = 1024,
    random_range_ratio: _RangeRatio = 0.0,
    output_len: _OutputLen = None,
    ignore_eos: _IgnoreEos = False,
    shared_prompts: _Shared = False,
    temperature: _Temperature = None,
    extra_body: _ExtraBody = None,
    request_rate: _Rate = "inf",
    burstiness: _Burstiness = 1.0,
    ramp_up_strategy: _RampUp = None,
    ramp_up_start_rps: _RampStart = None,
    ramp_up_end_rps: _RampEnd = None,
    self_timed: _SelfTimed = False,
    max_concurrency: _Concurrency = None,
    request_cancellation_rate: _CancelRate = 0.0,
    request_cancellation_delay: _CancelDelay = 0.5,
    timeout: _Timeout = 600.0,
    num_warmups: _Warmups = 0,
    ready_check_timeout_sec: _Ready = 0.0,
    percentile_metrics: _Metrics = "ttft,tpot,itl,e2el",
    metric_percentiles: _Percentiles = "50,90,99",
    goodput: _Goodput = None,
    save_result: _Save = False,
    save_detailed: _Detailed = False,
    result_dir: _Dir = Path(),
    result_filename: _Filename = None,
    report: _Report = None,
    label: _Label = "guanaco",
    metadata: _Metadata = None,
    seed: Annotated[int, Option(min=0, help="of arrivals, models and made-up prompts")] = 0,
    as_json: Annotated[bool, Option("--json", help="one JSON line for each run instead of tables")] = False,
) -> None:
    """Load a running server at a fixed rate, and report throughput and latencies. Any OpenAI-compatible server will do.

    Requests start when they are due and latencies count from then, so a server that stands still is seen. Answers that
    break off are counted apart. Several rates make a sweep, and the report shows its knee.
    """
    from guanaco.server.commands.bench.serving.plan import Options
    from guanaco.server.commands.bench.serving.run import run_serve

    raise SystemExit(run_serve(Options(**{n: v for n, v in locals().items() if n in Options.__dataclass_fields__})))
