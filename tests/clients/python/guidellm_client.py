"""guidellm: `guidellm run` of its guide, on synthetic prompts, through each of its request formats that the server has.

Nothing is measured here: every request must succeed, and the tokens that the tool counts must be those that it asked
for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from checks import MODEL, URL, check, run_checks

from guanaco.models.loading.demo import demo_path
from guanaco.server.config import Settings

SCRATCH = Path(os.environ["GUANACO_SCRATCH"])
GUIDELLM = Path(sys.executable).parent / "guidellm"
REQUESTS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 2, 24, 16
OFFLINE = {
    "HF_HOME": str(SCRATCH),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(request_format: str) -> str:
    report = SCRATCH / "guidellm.json"
    report.unlink(missing_ok=True)
    tokenizer = demo_path(Settings().cache_dir)
    options = {
        "--backend": f"kind=openai_http,target={URL},model={MODEL},request_format={request_format}",
        "--tokenizer": f"kind=huggingface_auto,model={tokenizer}",
        "--data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--profile": f"kind=concurrent,streams={STREAMS}",
        "--constraint": f"kind=max_requests,count={REQUESTS}",
        "--output": f"kind=json,path={report}",
    }
    command = [str(GUIDELLM), "run", *(text for pair in options.items() for text in pair), "--disable-console"]
    done = subprocess.run(command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, " / ".join(done.stderr.strip().splitlines()[-3:])
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]
    assert len(requests["successful"]) == REQUESTS, len(requests["successful"])
    counted = {made["output_metrics"]["text_tokens"] for made in requests["successful"]}
    assert counted == {OUTPUT_TOKENS}, counted
    return f"{REQUESTS} requests in {STREAMS} streams, {OUTPUT_TOKENS} tokens each"


@check("guidellm run, chat completions")
def chat() -> str:
    return run("/v1/chat/completions")


@check("guidellm run, completions")
def completions() -> str:
    return run("/v1/completions")


@check("guidellm run, responses")
def responses() -> str:
    return run("/v1/responses")


run_checks()
