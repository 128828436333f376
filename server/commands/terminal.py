"""`guanaco generate`: one answer of the offline engine in this process, written to the terminal as it comes."""

import sys
from typing import Any

from rich.console import Console

from guanaco.server.bootstrap.early import undisturbed_imports
from guanaco.server.config import Settings
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.errors import CommandError


def write_text(text: str) -> None:
    """Write to standard output at once, without markup or added line breaks."""
    sys.stdout.write(text)
    sys.stdout.flush()


def generate_once(
    settings: Settings,
    prompt: str,
    *,
    name: str | None,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    raw: bool,
) -> None:
    """Answer `prompt` with the offline engine, and write the text to standard output as it comes.

    The adapter's profile applies, as in the server. name: an adapter; None: the base. temperature: None: the profile's,
    or 0. raw: continue the prompt without a chat template. Raises CommandError if the prompt fills the context, holds a
    token that the model lacks, or the engine ends the request.
    """
    with undisturbed_imports():
        from guanaco.adapters.versions.profile import Profile
        from guanaco.models.text.chat_template import load_template
        from guanaco.server.bootstrap.runtime import build_runtime
        from guanaco.server.engine.detokenizer import Detokenizer
        from guanaco.server.engine.request import FinishReason, LoraRef, Request, SamplingParams, Submit
        from guanaco.server.engine.stops import Stops

    runtime = build_runtime(settings, Console(stderr=True), name)
    adapter = runtime.adapter(name)
    profile = (adapter.profile if adapter is not None else None) or Profile()
    tokenizer, room, template = runtime.base.tokenizer, runtime.plan.max_model_len, runtime.base.template
    if profile.chat_template is not None:
        template = load_template(profile.chat_template)
    stops, ids = profile.stop, tokenizer.encode(prompt)
    if not raw:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}], template=template)
        used = template or tokenizer.chat_template
        stops = (*stops, *(used.stop_strings if used is not None else ()))
    if len(ids) >= room:
        raise CommandError(f"the prompt has {len(ids)} tokens and the context {room}: nothing is left to write")
    sampling: dict[str, Any] = {"temperature": 0.0, **profile.sampling}
    if temperature is not None:
        sampling["temperature"] = temperature
    found = Stops.of(stops, tokenizer)
    params = SamplingParams(
        max_tokens=min(max_tokens, room - len(ids)),
        seed=seed,
        stop_token_ids=found.token_ids,
        stop_strings=found.strings,
        stops_see_control=found.see_control,
        **sampling,
    )
    detokenizer = Detokenizer(tokenizer, params, ids)
    loras = () if adapter is None else (LoraRef(adapter.version),)
    try:
        request = Request("generate", tuple(ids), params, loras, arrival_seconds=awake_seconds())
        runtime.engine.handle(Submit(request))
    except ValueError as error:  # the prompt has a token without an embedding row in the model
        raise CommandError(str(error)) from None
    while runtime.engine.has_work and detokenizer.stop_reason is None:
        for output in runtime.engine.step().outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise CommandError(f"the engine ended the request: {output.error}")
            shown = output.token_ids[:-1] if output.finish_reason is FinishReason.STOP else output.token_ids
            write_text(detokenizer.append(shown, finished=output.finish_reason is not None))
            if detokenizer.stop_reason is not None:
                break  # a step with a draft gives several tokens: those after a stop string are left out
    write_text("\n")
