"""Notes about files in an adapter's directory that the server doesn't read although they could change answers.

Reads file names and one small field. `weights` and the store call it, while the directory is still available.
"""

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.models.formats.strict_json import JsonError, parse_object

_OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_CONFIG_BYTES = 1 << 20


def notes_beside(files: AdapterFiles) -> tuple[str, ...]:
    """Notes about other weight files and about a chat template of the adapter's own. Never raises: they are only
    notes."""
    notes = []
    if others := [name for name in _OTHER_WEIGHTS if files.exists(name)]:
        notes.append(f"{others[0]} in its directory is not read: adapter_model.safetensors beside it is used")
    if files.exists("chat_template.jinja") or _config_has_template(files):
        notes.append(
            "the chat template in its directory is not used: chats get the base's, or the one that its profile names"
        )
    return tuple(notes)


def _config_has_template(files: AdapterFiles) -> bool:
    if not files.exists(_TOKENIZER_CONFIG):
        return False
    try:
        return bool(parse_object(files.read(_TOKENIZER_CONFIG, _MAX_CONFIG_BYTES)).get("chat_template"))
    except (AdapterError, JsonError):
        return False
