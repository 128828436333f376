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
    Client(
        "openai-node",
        "openai (node)",
        "openai_client.mjs",
        ("openai@6.49.0", "zod@4.6.7"),  # the last major version for node 20
        ("openai", "zod"),
    ),
    Client("anthropic", "anthropic (Python)", "anthropic_client.py", ("anthropic==2.14.0",), ("anthropic",)),
    Client(
        "langchain",
        "langchain-openai",
        "langchain_client.py",
        ("langchain-openai==1.7.4",),
        ("langchain-openai", "langchain-core", "openai"),
    ),
    Client(
        "llama-index",
        "LlamaIndex OpenAILike",
        "llama_index_client.py",
        ("llama-index-llms-openai-like==0.8.1",),
        ("llama-index-llms-openai-like", "llama-index-core", "openai"),
    ),
    Client("litellm", "LiteLLM", "litellm_client.py", ("litellm==1.110.2",), ("litellm", "openai")),
    Client("llm", "llm", "llm_client.py", ("llm==0.36",), ("llm", "openai")),
    Client("instructor", "instructor", "instructor_client.py", ("instructor==1.17.0",), ("instructor", "openai")),
    Client(
        "pydantic-ai",
        "Pydantic AI",
        "pydantic_ai_client.py",
        ("pydantic-ai-slim[openai]==2.68.0",),
        ("pydantic-ai-slim", "openai"),
    ),
    Client(
        "openai-agents",
        "OpenAI Agents SDK",
        "openai_agents_client.py",
        ("openai-agents==0.24.0",),
        ("openai-agents", "openai"),
    ),
    Client(
        "ai-sdk",
        "AI SDK, @ai-sdk/openai-compatible",
        "ai_sdk_client.mjs",
        ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),  # the last major versions for node 20
        ("ai", "@ai-sdk/openai-compatible"),
    ),
    Client(
        "lm-eval",
        "lm-evaluation-harness",
        "lm_eval_client.py",
        ("lm-eval[api]==0.4.13",),
        ("lm-eval", "transformers"),
        shares_repository_packages=True,
        arguments=("--tolerance", "0.1"),
    ),
    Client(
        "lm-eval-exact",
        "lm-evaluation-harness, `--provider reference --dtype float32`",
        "lm_eval_client.py",
        ("lm-eval[api]==0.4.13",),
        ("lm-eval", "transformers"),
        shares_repository_packages=True,
        server_flags=EXACT,
        arguments=("--tolerance", "0.001"),
    ),
    Client(
        "guidellm",
        "guidellm",
        "guidellm_client.py",
        ("guidellm==0.8.1",),
        ("guidellm", "transformers"),
        shares_repository_packages=True,
    ),
)
