"""flag > GUANACO_* > YAML > default, for every setting; and one line for whatever is unknown or does not parse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.profile import named_profile
from guanaco.models.text.chat_template import TEMPLATE_NAMES, TemplateError, load_template
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.config import ENV_PREFIX, SECTIONS, Settings, SettingsError, load_settings

OTHER_VALUE = {  # a text for each setting that is valid and not its default
    "provider": "reference",
    "page": "false",
    "cpu_isa": "portable",
    "dtype": "bfloat16",
    "kv_cache_dtype": "int8",
    "tool_format": "llama3",
    "log_level": "debug",
    "cache": "elsewhere",
    "allowed_host": "other.example",
    "api_key_file": "keys.txt",
    "admin_key_file": "keys.txt",
    "adapter": "a=b",
    "api_key": "secret",
    "allow_unauthenticated": "true",
    "offline": "true",
    "quantized_cache": "false",
    "literal_prompts": "true",
    "strict_base": "true",
    "hub_adapters": "true",
    "metrics_compat": "true",
    "hub_adapters_unpinned": "true",
    "allow_origin": "https://chat.example",
    "cuda_graphs": "false",
    "speculation": "lookup",
    "tuned_kernels": "false",
}
NAMES = sorted(Settings.model_fields)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else repr(value)


def _value(name: str, variant: int = 0) -> str:
    return OTHER_VALUE.get(name, str(11 + variant))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_variable_and_a_key(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = getattr(load_settings({}), name)
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({name: _value(name)}))
    from_file = getattr(load_settings({}, config), name)
    assert from_file != default or name in ("provider",)
    monkeypatch.setenv(ENV_PREFIX + name.upper(), _value(name))
    assert getattr(load_settings({}), name) == from_file
    assert Settings.model_fields[name].description


def test_every_setting_is_in_one_section() -> None:
    assert sorted(name for section in SECTIONS.values() for name in section.model_fields) == NAMES
    assert list(Settings.model_fields) == [name for section in SECTIONS.values() for name in section.model_fields]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHER_VALUE])
def test_the_stronger_source_wins(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({name: _value(name, 1)}))
    only_file = getattr(load_settings({}, config), name)
    monkeypatch.setenv(ENV_PREFIX + name.upper(), _value(name, 2))
    with_variable = getattr(load_settings({}, config), name)
    with_flag = getattr(load_settings({name: _value(name, 3)}, config), name)
    assert len({_plain(only_file), _plain(with_variable), _plain(with_flag)}) == 3
    assert with_variable == getattr(load_settings({}), name)
    assert with_flag == getattr(load_settings({name: _value(name, 3)}), name)


@pytest.mark.parametrize(
    ("flags", "variables", "yaml_text", "expected"),
    [
        ({"port": "x"}, {}, "", "--port: "),
        ({"max_num_seqs": "0"}, {}, "", "--max-num-seqs: "),
        ({"kv_cache_memory": "3 stone"}, {}, "", "--kv-cache-memory: '3 stone' is not a size"),
        ({"provider": "warp"}, {}, "", "--provider: "),
        ({"queue_timeout": "nan"}, {}, "", "--queue-timeout: "),
        ({}, {"GUANACO_PORT": "x"}, "", "GUANACO_PORT: "),
        ({}, {"GUANACO_PROT": "1"}, "", "unknown environment variable GUANACO_PROT"),
        ({}, {}, "port: x", "port in "),
        ({}, {}, "prot: 1", "unknown key 'prot'"),
        ({}, {}, "port: [", "not valid YAML"),
        ({}, {}, "- port", "expected `key: value` lines"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    flags: dict[str, str],
    variables: dict[str, str],
    yaml_text: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "c.yaml"
    config.write_text(yaml_text)
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, config)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# What a pod is given where services are called `guanaco`, `guanaco-gpu` and `guanaco-model`, and by `docker --link`.
SERVICE_LINKS = {
    "GUANACO_SERVICE_HOST": "10.96.3.7",
    "GUANACO_SERVICE_PORT": "80",
    "GUANACO_SERVICE_PORT_HTTP": "80",
    "GUANACO_SERVICE_PORT_METRICS_V2": "9090",
    "GUANACO_PORT": "tcp://10.96.3.7:80",
    "GUANACO_PORT_80_TCP": "tcp://10.96.3.7:80",
    "GUANACO_PORT_80_TCP_PROTO": "tcp",
    "GUANACO_PORT_80_TCP_PORT": "80",
    "GUANACO_PORT_80_TCP_ADDR": "10.96.3.7",
    "GUANACO_PORT_53_UDP_ADDR": "fd00::7",
    "GUANACO_GPU_SERVICE_HOST": "10.96.3.8",
    "GUANACO_GPU_SERVICE_PORT": "8000",
    "GUANACO_GPU_PORT": "tcp://[fd00::8]:8000",
    "GUANACO_GPU_PORT_8000_SCTP": "sctp://10.96.3.8:8000",
    "GUANACO_MODEL_SERVICE_HOST": "10.96.3.9",
    "GUANACO_MODEL_PORT": "tcp://10.96.3.9:8000",
    "GUANACO_NAME": "/web/guanaco",
    "GUANACO_ENV_PATH": "/usr/bin",
}


def test_service_links_are_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("port: 1234")
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert load_settings({}) == Settings.model_construct(**{n: f.default for n, f in Settings.model_fields.items()})
    assert load_settings({}, config).port == 1234, "a link does not hide the file's value"
    assert load_settings({"port": "99"}, config).port == 99
    monkeypatch.setenv("GUANACO_PORT", "4321")
    assert load_settings({}, config).port == 4321


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GUANACO_PORT", "http://10.0.0.1"),
        ("GUANACO_PORT", "tcp//10.0.0.1:80"),
        ("GUANACO_PORTS", "8000"),
        ("GUANACO_SERVICE_HOTS", "10.0.0.1"),
        ("GUANACO_SERVICE", "x"),
        ("GUANACO_PORT_HTTP", "80"),
        ("GUANACO_PORT_80", "80"),
        ("GUANACO_NAME", "smol"),
        ("GUANACO_MAX_PORT", "80"),
    ],
)
def test_a_typing_error_is_no_service_link(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings({})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.yaml: No such file"):
        load_settings({}, tmp_path / "absent.yaml")


def _no_regular_files(directory: Path) -> list[tuple[Path, str]]:
    pipe, large = directory / "pipe", directory / "large"
    os.mkfifo(pipe)
    with large.open("wb") as sparse:
        sparse.truncate((1 << 20) + 1)
    return [
        (pipe, "it is no regular file"),
        (Path("/dev/zero"), "it is no regular file"),
        (directory, "Is a directory"),
        (large, "larger than 1 MiB"),
    ]


def test_what_is_no_small_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    """Each file that the command line names and that is read whole: a pipe would block, a device has no end."""
    for path, problem in _no_regular_files(tmp_path):
        with pytest.raises(SettingsError, match=f"--config {path}: .*{problem}"):
            load_settings({}, path)
        with pytest.raises(SettingsError, match=f"--api-key-file {path}: .*{problem}"):
            KeyRing.from_settings(Settings(api_key_file=path))
        with pytest.raises(SettingsError, match=f"--admin-key-file {path}: .*{problem}"):
            KeyRing.admin(Settings(admin_key_file=path))
        with pytest.raises(AdapterError, match=problem.replace("1 MiB", "64 KiB")):
            named_profile(str(path), TEMPLATE_NAMES)
        with pytest.raises(TemplateError):
            load_template(str(path))


@pytest.mark.parametrize(
    ("text", "size"),
    [("7", 7), ("1KiB", 1024), ("1.5 GiB", 3 << 29), ("2mb", 2_000_000), ("0", 0), ("3 b", 3)],
)
def test_sizes(text: str, size: int) -> None:
    assert load_settings({"kv_cache_memory": text}).kv_cache_memory == size


def test_settings_never_change_and_hide_secrets() -> None:
    settings = load_settings({"api_key": ("k-canary",), "hub_token": "t-canary"})
    with pytest.raises(Exception, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "canary" not in repr(settings) + json.dumps(settings.public())
    assert settings.api_key[0].get_secret_value() == "k-canary"


def _guanaco(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "guanaco"
    return subprocess.run(
        [command, *arguments], cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_line_prints_the_settings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("port: 1\nblock_size: 32\nmax_num_seqs: 5\n")
    done = _guanaco(
        "serve", "--config", "c.yaml", "--print-config", "--port", "3", "--adapter", "a=x", "--adapter", "b=y",
        "--offline", "--no-quantized-cache", "--api-key", "canary",
        cwd=tmp_path, GUANACO_PORT="2", GUANACO_BLOCK_SIZE="64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["port"], shown["block_size"], shown["max_num_seqs"]) == (3, 64, 5)
    assert (shown["adapter"], shown["offline"], shown["quantized_cache"]) == (["a=x", "b=y"], True, False)
    assert "canary" not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--port", "x"), ("--config", "absent.yaml"), ("--model", "./absent"), ("--adapter", "no-equals-sign")],
)
def test_a_bad_start_is_one_line_and_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = _guanaco("serve", *arguments, cwd=tmp_path, GUANACO_CACHE=str(tmp_path / "cache"), GUANACO_OFFLINE="1")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_key_stops_the_program(name: str, empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flag = (empty,) if name == "api_key" else empty
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}: the key is empty"):
        load_settings({name: flag})
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({name: empty}))
    with pytest.raises(SettingsError, match=f"{name} in .*: the key is empty"):
        load_settings({}, config)
    monkeypatch.setenv(ENV_PREFIX + name.upper(), empty)
    with pytest.raises(SettingsError, match=f"{ENV_PREFIX}{name.upper()}: the key is empty"):
        load_settings({})
    assert load_settings({name: ("whole",) if name == "api_key" else "whole"}), "a flag stands before the variable"


def test_an_empty_key_among_others_stops_the_program(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"api_key": ["whole", " "]}))
    for flags, file in (({"api_key": ("whole", "")}, None), ({}, config)):
        with pytest.raises(SettingsError, match="the key is empty"):
            load_settings(flags, file)


@pytest.mark.parametrize("name", ["api_key_file", "admin_key_file"])
def test_an_empty_name_of_a_key_file_stops_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + name.upper(), "")
    with pytest.raises(SettingsError, match=ENV_PREFIX + name.upper()):
        load_settings({})


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({}, "/home/a/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"}, "/home/a/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/new"}, "/home/a/new"),
        ({"HF_HOME": "", "HF_HUB_CACHE": ""}, "/home/a/.cache/huggingface/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_library_has_it(
    variables: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/a", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(load_settings({}).shared_hub_cache) == path


@pytest.mark.parametrize(
    "text",
    ["admin_key: SeCrEt: x: y", "admin_key: @SeCrEt", "admin_key: *SeCrEt", "admin_key: !SeCrEt x",
     'api_key: ["SeCrEt', "SeCrEt: 1", "api_key:\n- a\n\t- SeCrEt"],
)  # fmt: skip
def test_a_mistake_in_the_yaml_file_shows_no_key(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings({}, tmp_path / "c.yaml")
    assert "SeCrEt" not in str(refused.value)
    assert "c.yaml" in str(refused.value)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenShift runs containers under a user id that no file knows."""

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(SettingsError, match="--cache"):
        _ = load_settings({}).cache_dir
    assert load_settings({"cache": "/data"}).cache_dir == Path("/data")
