"""The libraries of the `train` extra: checks that they are installed, and switches off their warnings and the hub.

Imports them inside functions only. Called before anything of a training is loaded.
"""

from importlib.util import find_spec

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.errors import TrainingError

LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes", "matplotlib")


def check_extra() -> None:
    """Raises TrainingError, with the command that installs the extra, if one of its libraries is missing."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise TrainingError(
            ErrorCode.EXTRA_MISSING,
            f"training needs the extra `train` ({', '.join(missing)} missing): make install EXTRAS=train, or "
            "pip install 'guanaco[train]'",
        )


def quiet_and_offline() -> None:
    """Switch off the libraries' warnings, and their requests to the hub: everything that is needed is here."""
    import logging as standard
    import warnings

    from huggingface_hub import constants
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"transformers|peft|accelerate|torch")
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)  # it looks for kernels of the hub
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
