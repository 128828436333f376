"""All settings of the server in one place, validated. A flag wins over a GUANACO_* variable, that over the YAML file,
and that over the default.

The only module that reads the environment. Values that are measured later (free memory, the number of KV blocks) are
not settings. Built by the command line; read when the server starts, and by the API.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from guanaco.models.errors import OperatorError
from guanaco.models.formats.small_files import read_small
from guanaco.server.service_links import is_service_link
from guanaco.server.setting_types import EMPTY_KEY, Bytes, Count, HostNames, Key, Keys, Origins, Texts
from guanaco.server.time_settings import TimeSettings
from guanaco.server.training_settings import TrainingSettings

MAX_NAMED_FILE_BYTES = 1 << 20  # largest --config file or file with keys
ENV_PREFIX = "GUANACO_"


class SettingsError(OperatorError):
    """A setting that is unknown or does not parse; the message is one line that names it."""


class ModelSettings(BaseModel):
    """The model that is served, and where downloads are kept."""

    model: str | None = Field(None, description="directory, GGUF file or hub id ORG/NAME@REVISION; none: the demo")
    served_model_name: str | None = Field(None, description="name of the base model in the API")
    chat_template: str | None = Field(
        None, description="template name (guanaco, chatml, …) or a Jinja file; none: the model's"
    )
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "none"] = Field(
        "auto",
        description="how the model writes tool calls; auto: as in the chat template's text; none: answers are not "
        "searched for calls",
    )
    literal_prompts: bool = Field(
        False, description="read control tokens in the prompts of /v1/completions and /tokenize as plain text"
    )
    cache: Path = Field(Path("~/.cache/guanaco"), description="where downloaded and quantised models are kept")
    quantized_cache: bool = Field(True, description="keep a model that is quantised at load in the cache")
    offline: bool = Field(False, description="never use the network")
    hub_token: Key | None = Field(None, description="Hugging Face token for gated or private models")


class AdapterSettings(BaseModel):
    """Adapters that are loaded at start, and the memory for all adapters."""

    adapter: Texts = Field((), description="NAME=PATH of a PEFT LoRA adapter; repeat for more (none: the demo's two)")
    adapter_profile: Texts = Field(
        (), description="NAME=PROFILE for an adapter of --adapter: guanaco, or a JSON file; repeat for more"
    )
    adapter_slots: Count = Field(8, description="most different adapters in one step")
    max_lora_rank: Count = Field(256, description="largest adapter rank that is accepted")
    strict_base: bool = Field(False, description="refuse an adapter that records another base than this one")
    adapter_host_memory: Bytes = Field(
        4 << 30, description="most memory for adapters; beyond it the least recently used are on disk only"
    )
    adapter_device_memory: Bytes = Field(
        2 << 30, description="most GPU memory for the adapters in use, by their own ranks; a CPU needs none"
    )


class AdminSettings(BaseModel):
    """Adapters that come and go while the server runs."""

    admin_key: Key | None = Field(
        None, description="key that may load and unload adapters while the server runs; none: nobody may"
    )
    admin_key_file: Path | None = Field(None, description="file with one admin key a line")
    adapter_root: Path | None = Field(
        None, description="directory that adapters may be loaded from while the server runs"
    )
    hub_adapters: bool = Field(
        False, description="also load adapters from the hub, as ORG/NAME@REVISION, while the server runs"
    )
    hub_adapters_unpinned: bool = Field(
        False, description="as --hub-adapters; ORG/NAME without a revision means the latest commit of main"
    )
    adapter_store: Path | None = Field(
        None, description="directory for copies of such adapters; none: adapters/ in the cache"
    )
    adapter_registry: Path | None = Field(
        None, description="directory that several servers share: adapters and aliases changed on one are served by all"
    )


class DeviceSettings(BaseModel):
    """The processor or GPU that computes, and the number formats."""

    provider: Literal["auto", "reference", "cpu", "triton"] = Field(
        "auto", description="kernel provider; auto: triton where there is an NVIDIA GPU, else cpu"
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="compute threads; 0: what the machine or container allows"
    )
    cpu_isa: Literal["auto", "avx512vnni", "avx512", "avx2", "portable"] = Field(
        "auto", description="instruction set of the cpu provider"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute and KV cache dtype (float16: triton only)"
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="KV cache; auto: as --dtype; 8 bits with scales take half of 16 (triton and reference only)"
    )
    cuda_graphs: bool = Field(
        True, description="triton: replay decode steps as CUDA graphs, and copy adapters on a stream of their own"
    )
    tuned_kernels: bool = Field(
        True, description="triton: use the tiles that `guanaco bench kernels --tune` timed on this card, if it did"
    )
    decoded_weights_memory: Bytes = Field(
        2 << 30, description="memory that the reference provider may spend on weights kept decoded"
    )


class BatchSettings(BaseModel):
    """The sizes of steps, contexts and the KV cache."""

    max_model_len: Count | None = Field(None, description="longest context in tokens; none: the model's own")
    max_num_seqs: Count = Field(64, description="most sequences that run at once")
    max_num_batched_tokens: Count = Field(512, description="most tokens that one step computes")
    flood_step_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="most tokens of a step for all floods together; 0: no limit; none: 32 on CPUs with adapters"
    )
    speculation: Literal["auto", "off", "lookup", "suffix"] = Field(
        "auto", description="guess tokens from the text so far; same answers; auto: lookup with provider cpu, else off"
    )
    speculation_memory: Bytes = Field(0, description="memory for past answers that suffix guesses from; 0: none kept")
    block_size: Annotated[int, Field(ge=1, le=256)] = Field(16, description="token positions per KV block")
    kv_cache_memory: Bytes | None = Field(None, description="size of the KV cache, e.g. 2GiB; none: by free memory")


class NetworkSettings(BaseModel):
    """Who may connect, and from where."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen on; 0 picks a free one")
    api_key: Keys = Field((), description="API key that clients must send; repeat for more")
    api_key_file: Path | None = Field(None, description="file with one API key a line")
    page: bool = Field(True, description="answer browsers at / with the bundled page")
    allow_unauthenticated: bool = Field(False, description="listen beyond loopback without an API key")
    allowed_host: HostNames = Field(
        (), description="host name that clients may use while there is no API key, besides localhost; repeat for more"
    )
    allow_origin: Origins = Field(
        (), description="origin whose web pages may use the API, e.g. https://chat.example; *: all, without API keys"
    )


class LimitSettings(BaseModel):
    """The most requests, tokens and bytes that are accepted at once."""

    max_queued_requests: Count = Field(256, description="requests that may wait; more are refused with 503")
    max_queued_tokens: Count = Field(131072, description="prompt tokens that may wait; more are refused with 503")
    max_connections: Count = Field(1024, description="most connections at once; more are refused with 503")
    max_body_bytes: Bytes = Field(4 << 20, description="largest request body")
    max_body_memory: Bytes = Field(
        256 << 20, description="most memory for all request bodies at once (two always fit); more get 503 or 429"
    )
    max_token_requests: Count = Field(
        32, description="most requests to /tokenize and /detokenize at once; more are refused with 429"
    )
    max_answer_tokens: Count = Field(1 << 18, description="most tokens of one answer, all its choices together")
    max_answer_logprobs: Count = Field(
        1 << 18, description="most log-probabilities in one answer, those of alternatives and of the prompt included"
    )
    max_grammar_bytes: Bytes = Field(256 << 10, description="largest JSON schema, regex or grammar of a request")
    max_queued_grammars: Count = Field(64, description="grammars of a key that may wait to be compiled; more get 429")
    max_responses: Count = Field(4096, description="most answers of /v1/responses that are kept; the oldest go first")
    max_responses_per_key: Count = Field(1024, description="most kept answers of one API key; without keys, of all")
    max_response_memory: Bytes = Field(256 << 20, description="most memory for the answers that are kept")
    max_response_memory_per_key: Bytes = Field(
        64 << 20, description="most of that memory for one API key; an answer that is larger is not kept"
    )


class LogSettings(BaseModel):
    """Logs and metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level")
    metrics_adapters: Count = Field(
        64, description="adapters with metrics of their own; all others are counted as (other)"
    )
    metrics_compat: bool = Field(
        False, description="also give the KV and prefix cache's metrics vLLM's old names, for older routers"
    )


# The panels of `guanaco serve --help`, in their order. A new setting goes into the class of its panel.
SECTIONS: dict[str, type[BaseModel]] = {
    "Model": ModelSettings,
    "Adapters": AdapterSettings,
    "Adapters while the server runs": AdminSettings,
    "Training over the API": TrainingSettings,
    "CPU and GPU": DeviceSettings,
    "Batches and context": BatchSettings,
    "Network and security": NetworkSettings,
    "Limits": LimitSettings,
    "Time limits": TimeSettings,
    "Logging and metrics": LogSettings,
}


# The base classes are in reverse order, because pydantic takes the fields of the last one first.
class Settings(
    LogSettings,
    TimeSettings,
    LimitSettings,
    NetworkSettings,
    BatchSettings,
    DeviceSettings,
    TrainingSettings,
    AdminSettings,
    AdapterSettings,
    ModelSettings,
    BaseSettings,
):
    """All settings, validated when they are made and never changed. Each field is a flag (`--port`), a variable
    (`GUANACO_PORT`) and a YAML key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        links = {name for name in env_settings.env_vars if _is_link(name, env_settings.env_vars[name] or "")}
        env_settings.env_vars = {k: v for k, v in env_settings.env_vars.items() if k not in links}
        # no .env file and no secrets directory: only sources that the operator named are read
        return init_settings, env_settings

    @property
    def cache_dir(self) -> Path:
        """The cache directory as an absolute path. Raises SettingsError if it is below the home directory of a user
        without one."""
        return _below_home(self.cache, "cache")

    @property
    def adapter_store_dir(self) -> Path:
        """The directory for copies of adapter versions, for all base models. Raises SettingsError as `cache_dir`
        does."""
        if self.adapter_store is None:
            return self.cache_dir / "adapters"
        return _below_home(self.adapter_store, "adapter_store")

    @property
    def shared_hub_cache(self) -> Path:
        """The directory in which other tools keep downloads from the hub, found as the hub's library does."""
        for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            if path := os.environ.get(variable):
                return _expanded(path)
        home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        return _expanded(os.path.join(home, "hub"))

    @property
    def has_admin(self) -> bool:
        """Whether adapters can be changed while the server runs."""
        return self.admin_key is not None or self.admin_key_file is not None

    @property
    def adapters_change(self) -> bool:
        """Whether adapters may come and go while the server runs, by its admin routes or by a shared registry."""
        return self.has_admin or self.adapter_registry is not None

    def public(self) -> dict[str, Any]:
        """The settings as plain data with secrets masked, for --print-config."""
        return self.model_dump(mode="json")


def _below_home(path: Path, name: str) -> Path:
    """An absolute path with `~` expanded. Raises SettingsError if the user has no home directory (no HOME, and a user
    id without an account, as on OpenShift); otherwise a directory called `~` would be made."""
    text = os.path.expanduser(path)
    if text.startswith("~"):
        flag, variable = "--" + name.replace("_", "-"), ENV_PREFIX + name.upper()
        raise SettingsError(f"{path}: this user has no home directory: name one with {flag} ({variable}), or set HOME")
    return Path(os.path.abspath(text))


def _expanded(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(path))))


# An empty variable counts as unset, except for keys: those were meant to keep others out, so an empty one is an error.
_KEYS = frozenset({"api_key", "api_key_file", "admin_key", "admin_key_file"})


# The environment variables that a trainer's process gets: none is a key, a token or a setting.
_HARMLESS = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


def harmless_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _HARMLESS if name in os.environ}


def chat_history_file() -> Path | None:
    """The file in which `guanaco chat` keeps typed messages (below XDG_STATE_HOME); None without a home directory."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(state).expanduser() / "guanaco" / "chat_history"
    except RuntimeError:  # no home directory
        return None


def variable_of_user(name: str) -> str | None:
    """The value of an environment variable that the user named on the command line, such as one that holds a key; None
    if it is not set."""
    return os.environ.get(name)


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """Settings from flags (only those given), the environment and a YAML file.

    Raises SettingsError with one line that names the flag, variable or key at fault.
    """
    variables = {name for name, text in os.environ.items() if name.startswith(ENV_PREFIX) and not _is_link(name, text)}
    known = {ENV_PREFIX + name.upper(): name for name in Settings.model_fields}
    hint = "there is no such setting (guanaco serve --help lists them)"
    set_here = {known[name] for name in variables & known.keys() if os.environ[name]}
    for variable in sorted(variables - known.keys()):
        raise SettingsError(f"unknown environment variable {variable}: {hint}")
    for name in _KEYS - flags.keys():
        if os.environ.get(ENV_PREFIX + name.upper()) == "":
            raise SettingsError(f"{ENV_PREFIX}{name.upper()}: {EMPTY_KEY}")
    values = _read_yaml(config_file) if config_file else {}
    for key in values:
        if key not in Settings.model_fields:
            shown = repr(key) if re.fullmatch("[a-z_]{1,40}", key) else "(not shown: it is no name of a setting)"
            raise SettingsError(f"unknown key {shown} in {config_file}: {hint}")
    from_file = {key: value for key, value in values.items() if key not in set_here}
    try:
        return Settings(**{**from_file, **flags})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{_where(name, flags, from_file, config_file)}: {message}") from None


def _is_link(variable: str, value: str) -> bool:
    is_ours = variable.upper().startswith(ENV_PREFIX)
    return is_ours and is_service_link(variable[len(ENV_PREFIX) :], value)


def _where(name: str, flags: Mapping[str, Any], from_file: Mapping[str, Any], config_file: Path | None) -> str:
    if name in flags:
        return "--" + name.replace("_", "-")
    return f"{name} in {config_file}" if name in from_file else ENV_PREFIX + name.upper()


def read_named_file(flag: str, path: Path) -> bytes:
    """The content of a file that `flag` names. Raises SettingsError if it can't be read, is a pipe, a device or a
    directory, or is larger than MAX_NAMED_FILE_BYTES."""
    try:
        return read_small(path, MAX_NAMED_FILE_BYTES)
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {error.strerror}: name a file of at most 1 MiB that can be read") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    data = read_named_file("--config", path)
    try:
        loaded = yaml.safe_load(data.decode("utf-8"))
    except RecursionError:
        raise SettingsError(f"--config {path}: lists or objects are nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # The library's own message quotes the line, which may hold a key.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise SettingsError(
            f"--config {path}: not valid YAML{where}: write `name: value` lines, and quote odd values"
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"--config {path}: expected `key: value` lines")
    return {str(key): value for key, value in loaded.items()}
