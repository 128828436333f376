"""Nothing in our packages can be talked into running what a file or a request says: a walk over every syntax tree."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
# What is installed; adapters/demo/train.py, for one, runs on a developer's machine and does use peft.
SOURCES = sorted(path for name in PACKAGES for path in ROOT.joinpath(*name.split(".")[1:]).glob("*.py"))

FORBIDDEN_MODULES = {
    *(
        "pickle",
        "_pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "jsonpickle",
        "code",
        "codeop",
        "runpy",
    ),
    *("transformers", "peft", "bitsandbytes", "multipart", "xmlrpc", "telnetlib", "imp"),
}
# `server/training` alone may import these, in the process of a training.
FOR_TRAINING = {"transformers", "peft", "bitsandbytes"}
TRAINING = ROOT / "server" / "training"
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
# The last two parts of a dotted call.
FORBIDDEN_CALLS = {
    *("torch.load", "jit.load", "hub.load", "package.PackageImporter", "serialization.load", "export.load"),
    *("numpy.load", "np.load", "numpy.fromfile", "pandas.read_pickle", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "pty.spawn", "commands.getoutput"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "importlib.reload"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "jinja2.Environment", "jinja2.Template"),
    *("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModel.from_pretrained"),
}
FORBIDDEN_KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def problems(source, allowed=frozenset()):
    """What of the lists above a module's text uses. allowed: modules that it may import all the same."""
    tree = ast.parse(source)
    aliases = {}  # local name → dotted origin
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                if name.name.split(".")[0] in FORBIDDEN_MODULES - allowed:
                    yield f"import {name.name}"
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES - allowed:
                yield f"from {node.module}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            first, _, rest = dotted(node).partition(".")
            origin = aliases.get(first, first) + (f".{rest}" if rest else "")
            if ".".join(origin.split(".")[-2:]) in FORBIDDEN_CALLS:
                yield origin
            if origin in FORBIDDEN_NAMES and not isinstance(getattr(node, "ctx", None), ast.Store):
                yield origin
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                    yield f"{keyword.arg}={value}"
            if dotted(node.func) in ("importlib.import_module", "import_module") and not (
                node.args and isinstance(node.args[0], ast.Constant)
            ):
                yield "import_module of a computed name"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_module_is_clean(path):
    allowed = FOR_TRAINING if path.is_relative_to(TRAINING) else frozenset()
    assert list(problems(path.read_text(), allowed)) == []


def test_there_is_something_to_check():
    assert len(SOURCES) >= 20
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {"adapters", "kernels", "models", "server"}


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "from torch import load as read\nread('x')",
        "import torch.serialization\ntorch.serialization.load('x')",
        "import torch\nload = torch.load",
        "import torch\ntorch.jit.load('x')",
        "from torch import hub\nhub.load('x')",
        "import numpy as np\nnp.load('x')",
        "def f():\n    from joblib import load",
        "import multiprocessing\nx = eval('1')",
        "exec('1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(f'{x}')",
        "import yaml\nyaml.load(x)",
        "from yaml import load\nload(x)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import os\nos.system('x')",
        "from os import popen\npopen('x')",
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Template\nTemplate(x)",
        "from transformers import AutoTokenizer",
        "hf(x, trust_remote_code=True)",
    ],
)
def test_the_walk_sees(snippet):
    assert list(problems(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import torch\ntorch.compile(x)",
        "import json\njson.load(f)",
        "import yaml\nyaml.safe_load(x)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()",
        "import importlib\nimportlib.import_module('guanaco.kernels')",
        "message = 'convert with torch.load(..., weights_only=True)'",
        "def load(self):\n    self.load()",
    ],
)
def test_the_walk_leaves_alone(snippet):
    assert list(problems(snippet)) == []


def test_only_the_restricted_process_takes_pickles_apart():
    users = [
        path.name
        for path in SOURCES
        if path.name != "torch_pickle.py" and "torch_pickle" in path.read_text(encoding="utf-8")
    ]
    assert users == ["worker.py"]
    importers = [path.name for path in SOURCES if "convert import worker" in path.read_text(encoding="utf-8")]
    assert importers == []
