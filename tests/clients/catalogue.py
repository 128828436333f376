"""The clients that `make clients` runs: their pinned packages, and the script with the checks of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent

# Exact arithmetic: the cpu provider rounds activations to 8 bits, the reference provider computes as transformers does.
EXACT = ("--provider", "reference", "--dtype", "float32")


@dataclass(frozen=True)
class Client:
    """One client: `packages` are installed into its own environment; those of `shown` are in the table of results."""

    name: str
    title: str
    script: str
    packages: tuple[str, ...]
    shown: tuple[str, ...]
    shares_repository_packages: bool = False
    """Whether its environment also sees the repository's own packages (torch and transformers are hundreds of MB)."""
    server_flags: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    """What the script is given."""

    @property
    def language(self) -> Literal["python", "node"]:
        return "node" if self.script.endswith(".mjs") else "python"

    @property
    def path(self) -> Path:
        return HERE / self.language / self.script


CLIENTS = (
    Client("openai", "openai (Python)", "openai_client.py", ("openai==3.57.0",), ("openai",)),
    Client("anthropic", "anthropic (Python)", "anthropic_client.py", ("anthropic==2.14.0",), ("anthropic",)),
    Client(
        "langchain",
        "langchain-openai",
        "langchain_client.py",
        ("langchain-openai==1.7.4",),
        ("langchain-openai", "langchain-core", "openai"),
    ),
)
