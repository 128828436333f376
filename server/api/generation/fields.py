"""Lists of fields that the routes' own schemas don't have: refused by name, other names of our fields, harmless.

The lists come from the published request schemas of OpenAI, vLLM, SGLang, llama.cpp, TGI, LoRAX, mistral.rs, Ollama and
Triton with TensorRT-LLM. A field that selects an adapter or changes the answer is never dropped silently. A field on no
list is ignored, and the answer names it. `body` applies the lists.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.values.unsupported import ADAPTERS, REFUSED, Neutral

# Fields of `unsupported.REFUSED` that generating routes support.
_TAKEN = frozenset(
    (
        *("adapter_id", "lora", "lora_path"),
        "allowed_token_ids",
        "bad_words",
        "truncate_prompt_tokens",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens_as_token_ids",
    )
)
_TAKEN_IN_CHAT = _TAKEN | {"tools", "tool_choice", "continue_final_message", "chat_template_kwargs"}
REFUSED_IN_CHAT: Mapping[str, Neutral] = {
    **{name: neutral for name, neutral in REFUSED.items() if name not in _TAKEN_IN_CHAT},
    "echo": (False,),
    "prompt": ("",),
    "add_special_tokens": (False,),
}
REFUSED_IN_COMPLETIONS: Mapping[str, Neutral] = {
    **{name: neutral for name, neutral in REFUSED.items() if name not in _TAKEN},
    "messages": ([],),
    "top_logprobs": (0,),
}
REFUSED_IN_MESSAGE: Mapping[str, Neutral] = {
    "audio": (),
    "documents": ([],),
    "function_call": (),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
    "refusal": ("",),
    "task": (),
    "tool_name": (),
    "tools": ([],),
    "videos": ([],),
    "wo_eos": (False,),
}

_TO_MIX = "put an adapter's name into model, or give adapters: [{name, scale}]"
_TOP_LEVEL = "put the fields that it holds into the body itself"
_STRUCTURED = "use response_format, or structured_outputs"
_PROMPTS = "give prompt, or messages where the route takes them"
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(ADAPTERS.keys() - _TAKEN, _TO_MIX),
    **dict.fromkeys(("extra_body", "nvext", "options", "parameters", "sampling_params"), _TOP_LEVEL),
    **dict.fromkeys(("content", "input", "input_ids", "inputs", "prompt_token_ids", "text", "text_input"), _PROMPTS),
    **dict.fromkeys(("runtime_top_k",), "use top_k"),
    **dict.fromkeys(("runtime_top_p",), "use top_p"),
    **dict.fromkeys(("choice", "ebnf", "format", "grammar", "json_schema", "lark", "regex", "schema"), _STRUCTURED),
    **dict.fromkeys(("guided_json_object", "json_mode", "json_object", "structural_tag"), _STRUCTURED),
    "base_model": "put the name into model",
    "do_sample": "for greedy answers, use temperature 0",
    "end_id": "use stop_token_ids",
    "function_call": "use tool_choice in /v1/chat/completions",
    "functions": "use tools in /v1/chat/completions",
    "tool_choice": "use /v1/chat/completions",
    "tools": "use /v1/chat/completions",
    "extra_key": "use cache_salt",
    "max_length": "use max_tokens, which doesn't count the prompt",
    "messages": "use /v1/chat/completions",
    "min_length": "use min_tokens, which doesn't count the prompt",
    "model_id": "put the name into model",
    "model_name": "put the name into model",
    "models": "put one name into model",
    "n_probs": "use logprobs",
    "no_stop_trim": "use include_stop_str_in_output",
    "prompt": "use /v1/completions",
    "repeat_last_n": "repetition_penalty looks at the whole context",
    "return_full_text": "use /v1/completions with echo",
    "return_log_probs": "use logprobs",
    "return_logprob": "use logprobs",
    "stop_words": "use stop",
    "system": "use a message of the role system",
    "system_prompt": "use a message of the role system",
    "top_logprobs": "use logprobs with a number",
    "top_logprobs_num": "use logprobs",
    "top_n_tokens": "use logprobs",
}

# Other servers' names of a field, with exactly the same meaning.
ALIASES: Mapping[str, str] = {
    "ignore_eos_token": "ignore_eos",  # LoRAX
    "max_new_tokens": "max_tokens",  # TGI, LoRAX, SGLang
    "max_output_tokens": "max_tokens",  # OpenAI's Responses
    "min_new_tokens": "min_tokens",  # SGLang
    "n_cmpl": "n",  # llama.cpp
    "n_predict": "max_tokens",  # llama.cpp
    "num_predict": "max_tokens",  # Ollama
    "random_seed": "seed",  # Triton, Mistral
    "repeat_penalty": "repetition_penalty",  # llama.cpp, Ollama
    "sampling_seed": "seed",  # SGLang
    "stop_sequences": "stop",  # TGI, Triton
}
ALIASES_IN_COMPLETIONS: Mapping[str, str] = {**ALIASES, "max_completion_tokens": "max_tokens"}
ALIASES_OF_TOKENIZE: Mapping[str, str] = {"add_special": "add_special_tokens", "with_pieces": "return_token_strs"}

# For a refused field in a message: what to use instead.
INSTEAD_IN_MESSAGE: Mapping[str, str] = {
    "function_call": "use tool_calls",
    "tool_name": "give tool_call_id",
    "tools": "put tools into the body itself",
}

# Fields that change nothing about the answer here: bookkeeping, routing and speed of other servers.
HARMLESS = frozenset(
    (
        *("metadata", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store"),
        *("request_id", "rid", "priority", "session_id", "conversation_id", "custom_labels", "log_metrics"),
        "guided_decoding_backend",  # this server has only one
        *("api_token", "keep_alive", "stream_interval", "separate_reasoning", "stream_reasoning", "include_reasoning"),
        *("spaces_between_special_tokens", "background", "request_timeout"),
        "reasoning_effort",  # the LLaMA family has no such setting
        # llama.cpp: where and how it computes. A context that is too long is an error here, so it is never shifted
        *("id_slot", "slot_id", "cache_prompt", "n_cache_reuse", "n_keep", "num_keep", "n_discard", "backend_sampling"),
        *("speculative.n_max", "speculative.n_min", "speculative.p_min", "speculative.type"),
        # one prompt computed by several machines
        *("kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
        *("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank", "disaggregated_params"),
        # settings for images and sounds; those themselves are refused
        *("images_config", "max_dynamic_patch", "min_dynamic_patch", "use_audio_in_video"),
    )
)
HARMLESS_OUTSIDE_CHAT = HARMLESS | {"parallel_tool_calls"}
# In a message: fields of other models' answers, which chat templates of the LLaMA family leave out.
HARMLESS_IN_MESSAGE = frozenset(
    (
        *("name", "id", "annotations", "cache_control", "citations", "created", "provider_specific_fields", "status"),
        *("reasoning", "reasoning_content", "reasoning_details", "thinking", "type", "weight"),
    )
)
IN_MESSAGE = frozenset(("role", "content", "tool_calls", "tool_call_id", *REFUSED_IN_MESSAGE, *HARMLESS_IN_MESSAGE))
HARMLESS_IN_PART = frozenset(("type", "text", "cache_control", "annotations"))
HARMLESS_IN_STREAM_OPTIONS = frozenset(("include_obfuscation",))


@dataclass(frozen=True)
class RouteFields:
    """How one route treats each field of its body."""

    own: frozenset[str]  # the fields of its schema
    refused: Mapping[str, Neutral]  # refused field → its values that change nothing
    aliases: Mapping[str, str]  # another server's name of a field → ours
    harmless: frozenset[str] = HARMLESS
    instead: Mapping[str, str] = field(default_factory=lambda: INSTEAD)  # refused field → what to do without it
    codes: Mapping[str, ErrorCode] = field(default_factory=dict)  # refused field → a code of its own
    conversation: str = "messages"  # the field with the messages
    in_message: frozenset[str] = IN_MESSAGE  # the fields that a message may hold
    in_part: frozenset[str] = HARMLESS_IN_PART  # the fields that a part of its content may hold

    def ignored(self, names: Iterable[str]) -> list[str]:
        """The names that are on no list."""
        lists = (self.own, self.refused, self.aliases, self.harmless)
        return [name for name in names if not any(name in known for known in lists)]


def asks_for_nothing(value: object, neutral: Neutral) -> bool:
    """Whether a refused field's value changes nothing and so may pass. 1 does not count as true."""
    return value is None or any(
        value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral
    )
