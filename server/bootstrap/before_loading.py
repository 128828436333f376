"""Checks that need no loaded model: a typing error must not cost the minutes of loading.

Reads names, settings and small files only; the loaders check everything again, with the tensors. Called by `runtime`
and by training.
"""

import os
import re
from pathlib import Path

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.adapters.peft.weights import WEIGHTS_NAME, check_weights_exist
from guanaco.adapters.versions.names import parse_adapter_option, parse_name_option
from guanaco.adapters.versions.profile import Profile, named_profile, read_profile
from guanaco.models.architectures.config_json import read_config
from guanaco.models.loading.demo import DEMO_NAME, demo_adapters
from guanaco.models.text.chat_template import TEMPLATE_NAMES, ChatTemplate, load_template
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError

_HUB_FOLDER = re.compile(r"models--(?P<id>[A-Za-z0-9][\w.-]*)")


def adapter_options(settings: Settings) -> list[tuple[str, Path]]:
    """Name and path of each --adapter. Without any, the demo model has its own two. Raises AdapterError for a bad
    option."""
    options = [parse_adapter_option(text) for text in settings.adapter]
    return list(demo_adapters().items()) if settings.model is None and not options else options


def adapter_profiles(settings: Settings) -> dict[str, Profile]:
    """Adapter's name → the profile of --adapter-profile. Raises AdapterError or CommandError for a bad option."""
    texts = dict(parse_name_option(text, "PROFILE") for text in settings.adapter_profile)
    if unknown := sorted(texts.keys() - {name for name, _ in adapter_options(settings)}):
        raise CommandError(f"--adapter-profile {unknown[0]}: no --adapter has this name")
    return {name: named_profile(text, TEMPLATE_NAMES) for name, text in texts.items()}


def chosen_template(settings: Settings) -> ChatTemplate | None:
    """The template of --chat-template; None: the model's own. Raises TemplateError if it can't be used."""
    return None if settings.chat_template is None else load_template(settings.chat_template)


def base_name(settings: Settings) -> str:
    """The base's name in the API."""
    return settings.served_model_name or base_root(settings)


def base_root(settings: Settings) -> str:
    """The source of the base as clients may see it. A local model is named by the last part of its path: clients must
    not learn where the operator keeps files."""
    if settings.model is None:
        return DEMO_NAME
    path = Path(os.path.expanduser(settings.model))
    return _local_name(Path(os.path.abspath(path))) if path.exists() else settings.model


def _local_name(path: Path) -> str:
    """The name of a local model. A snapshot in a hub cache gets its repository's name, since its own is a commit."""
    match = _HUB_FOLDER.fullmatch(path.parent.parent.name)
    if path.parent.name == "snapshots" and match is not None:
        return "/".join(match["id"].split("--", 1))
    return path.name


def check_before_loading(settings: Settings, wanted: str | None = None) -> None:
    """Raise the error that loading would raise later: AdapterError, CommandError, ModelError or TemplateError.

    wanted: a name that must belong to the base or to an adapter.
    """
    _check_sizes(settings)
    chosen_template(settings)
    options, profiles = adapter_options(settings), adapter_profiles(settings)
    names = [base_name(settings), *(name for name, _ in options)]
    for number, name in enumerate(names):
        if name in names[:number]:
            problem = "the base model's name too" if number and name == names[0] else "the name of two adapters"
            raise CommandError(f"--adapter {name}: this is {problem}; choose another name")
    if wanted is not None and wanted not in names:
        raise CommandError(f"--name {wanted}: nothing is called {wanted!r} here; there are: {', '.join(names)}")
    for name, path in options:
        try:
            _check_adapter(name, path, has_profile=name in profiles)
        except AdapterError as error:
            raise CommandError(f"--adapter {name}: {error}") from None
    if settings.train_key and not settings.has_admin:
        raise CommandError("--train-key: training over the API needs an admin key; set --admin-key or --admin-key-file")
    root, shared = settings.adapter_root, settings.adapter_registry
    if root is not None and not Path(os.path.expanduser(root)).is_dir():
        raise CommandError(f"--adapter-root {root}: there is no such directory")
    if shared is not None and not Path(os.path.expanduser(shared)).is_dir():
        raise CommandError(f"--adapter-registry {shared}: there is no such directory; create it, or mount it")


def _check_adapter(name: str, path: Path, *, has_profile: bool) -> None:
    files = AdapterFiles.find(path, name, CONFIG_NAME)
    parse_config(files.read(CONFIG_NAME, MAX_CONFIG_BYTES))
    check_weights_exist(files)
    files.open(WEIGHTS_NAME).close()
    if not has_profile:
        read_profile(path, name, TEMPLATE_NAMES)


def _check_sizes(settings: Settings) -> None:
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise CommandError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} must be at least "
            f"--max-num-seqs {settings.max_num_seqs}: each running sequence gets a token in every step"
        )
    if settings.speculation_memory > 0 and settings.speculation != "suffix":
        raise CommandError(
            f"--speculation-memory: --speculation {settings.speculation} keeps no past answers, only suffix does"
        )
    model = None if settings.model is None else Path(os.path.expanduser(settings.model))
    if model is None or not model.is_dir():
        return
    config = read_config(model)
    config.check_window(str(model / "config.json"), settings.max_model_len)
    positions = config.max_position_embeddings
    if (settings.max_model_len or 0) > positions:
        raise CommandError(
            f"--max-model-len {settings.max_model_len} is more than the {positions} positions that the model knows"
        )
