"""The tree is the diagram: which room may import which, how large files and folders may be, what no file may do."""

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "models", "adapters", "server")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "demo" not in p.parent.name)
MAX_FILES = 16  # in one folder, `__init__.py` and `conftest.py` not counted
MAX_NATIVE_FILES = 34  # C++: one translation unit for each instruction set
MAX_LINES = 400
MAX_FUNCTION_LINES = 70

# The ground floor: the base exception, the error codes, the adapters' refusals. They import nothing else of ours.
_ERRORS = {"models.errors", "models.error_codes"}
_ENGINE = {"server.engine", "kernels", "models", "adapters", "server.config"}
_HTTP = {"server.api.http", "server.engine", "server.metrics", "server.config", "server.errors", *_ERRORS}
_GENERATION = {
    *_HTTP, "server.api.tools", "server.api.values", "server.api.generation", "server.adapters", "server.grammars",
    "adapters.versions", "models.text",
}  # fmt: skip
# Room (or file) -> what of ours it may import, as prefixes of guanaco.*. The most specific entry of a file counts.
ALLOWED = {
    "kernels": {"kernels.nf4", "kernels.ops", "kernels.lora_batch", "kernels.layer_cache"},
    "kernels/__init__.py": {"kernels.ops", "kernels.reference", "kernels.cpu", "kernels.triton"},
    "kernels/cpu": {"kernels.cpu", "kernels.nf4", "kernels.ops", "kernels.lora_batch", "kernels.layer_cache"},
    "kernels/triton": {"kernels.triton", "kernels.nf4", "kernels.ops", "kernels.lora_batch", "kernels.layer_cache"},
    "kernels/triton/products": {
        "kernels.triton.products", "kernels.triton.configs", "kernels.triton.pinned", "kernels.nf4", "kernels.ops",
        "kernels.lora_batch",
    },
    "kernels/triton/attention": {
        "kernels.triton.attention", "kernels.triton.configs", "kernels.triton.rope", "kernels.layer_cache",
    },
    "kernels/analysis": {"kernels"},
    "models": {"models.error_codes"},
    "models/formats": {"models.formats", "kernels.memory", *_ERRORS},
    "models/architectures": {"models.architectures", "models.formats", "kernels", *_ERRORS},
    "models/text": {"models.text", "models.formats", "models.architectures.config", *_ERRORS},
    "models/loading": {"models", "kernels"},
    "adapters": _ERRORS,
    "adapters/peft": {"adapters.peft", "adapters.errors", "models.formats", "kernels", *_ERRORS},
    "adapters/convert": {"adapters.convert", "adapters.peft", "adapters.errors", "models.formats", *_ERRORS},
    "adapters/versions": {"adapters.versions", "adapters.peft", "adapters.errors", "models.formats", *_ERRORS},
    "adapters/residency": {"adapters.residency", "adapters.peft", "adapters.errors", "kernels", *_ERRORS},
    "server/time_settings.py": {"server.setting_types"},
    "server/training_settings.py": {"server.setting_types"},
    "server/config.py": {
        "server.service_links", "server.setting_types", "server.time_settings", "server.training_settings",
        "models.errors", "models.formats.small_files",
    },
    "server/service_links.py": set(),
    "server/setting_types.py": set(),
    "server/errors.py": {"models.errors"},
    "server/metrics": {"server.metrics", "server.engine.request", "server.engine.speculation", "models.error_codes"},
    "server/engine": _ENGINE,
    "server/engine/speculation": {
        "server.engine.speculation", "server.engine.request", "server.engine.block_manager", "server.engine.step_share",
        "server.engine.constraints",
        *_ERRORS,
    },
    "server/grammars": {"server.grammars", "models.formats.restricted_process", *_ERRORS},
    "server/adapters": {
        "server.adapters", "server.engine", "server.config", "adapters", "models.loading", "models.formats",
        *_ERRORS,
    },
    "server/bootstrap": {"server.bootstrap", "server.errors", *_ENGINE},
    "server/bootstrap/training.py": {
        "server.config", "server.errors", "server.training.jobs", "server.training.recipes",
    },
    "server/bootstrap/machine.py": set(),
    "server/api/http": _HTTP,
    "server/api/document": {"server.api.document", "server.api.http"},
    "server/api/generation": {*_GENERATION, "server.training.jobs"},
    "server/api/messages": {*_GENERATION, "server.api.messages"},
    "server/api/values": {"server.api.values"},
    "server/api/responses": {*_GENERATION, "server.api.responses"},
    "server/api/tools": {"server.api.tools", "server.api.http.errors", "server.grammars", "models.text", *_ERRORS},
    "server/api/routes": {*_GENERATION, "server.api.routes", "adapters.errors"},
    "server/api": {*_GENERATION, "server.api", "server.page", "server.training.jobs"},
    "server/api/training": {*_GENERATION, "server.api.training", "server.training.jobs"},
    "server/commands": {"server", "kernels", "models", "adapters"},
    "server/commands/bench/serving": {
        "server.commands.bench.serving", "server.commands.common", "server.judging.prompts", "server.reports",
        "server.errors", "server.config",
    },
    # Rooms to come. Only training may import the `train` extra's libraries, in its job's own process.
    "server/training": {"server.training", "server.bootstrap", "server.errors", *_ENGINE},
    "server/training/data": {"server.training.data", "models.text", "models.formats", *_ERRORS},
    "server/training/checkpoints.py": set(),
    "server/training/jobs": {
        "server.training.jobs",
        "server.training.checkpoints",
        "server.training.extra",
        "server.training.recipes",
        "adapters.errors",
        *_ERRORS,
    },
    "server/training/jobs/check.py": {"server.training.data"},
    "server/training/jobs/publisher.py": {"server.training.jobs", "server.adapters", "adapters.errors", *_ERRORS},
    "server/judging": {"server.judging", "server.reports", "server.errors", "server.config"},
    "server/reports": {"server.reports"},
    "server/page": {"server.page"},
    "server": set(),
}  # fmt: skip
_NO_TRAINING = {"transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets"}
_NO_WEB = {"fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client"}
# Room (or file) -> outside packages that it must not import. The most specific entry of a file counts.
BANNED = {
    "kernels": {*_NO_TRAINING, *_NO_WEB, "tokenizers"},
    "models": {*_NO_TRAINING, *_NO_WEB},
    "adapters": {*_NO_TRAINING, *_NO_WEB},
    "adapters/residency/host_table.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "adapters/residency/ledger.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "adapters/residency/messages.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "adapters/residency/moves.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "adapters/residency/slot_table.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "server/engine": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "server/engine/cuda_graphs.py": {*_NO_TRAINING, *_NO_WEB},
    "server/engine/model_runner.py": {*_NO_TRAINING, *_NO_WEB},
    "server/engine/sampler.py": {*_NO_TRAINING, *_NO_WEB},
    "server/api": {*_NO_TRAINING, "torch", "safetensors"},
    "server/metrics": {*_NO_TRAINING, "torch"},
    "server/config.py": {*_NO_TRAINING, "torch"},
    "server/grammars": {*_NO_TRAINING, *_NO_WEB, "torch", "tokenizers"},
    "server/training": _NO_WEB,
    "server/training/data": {*_NO_TRAINING, *_NO_WEB, "torch"},  # a server checks uploaded files with it
    "server/training/jobs": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "server/training/checkpoints.py": {*_NO_TRAINING, *_NO_WEB, "torch"},
    "server": _NO_TRAINING,
}
# Development tools that a running server never imports, and the one command that does.
ANALYSIS, MAY_ANALYSE = "kernels.analysis", ("kernels/analysis/", "server/commands/bench/kernels")


def _rule(path: Path, rules: dict[str, set[str]]) -> set[str]:
    name = path.relative_to(ROOT).as_posix()
    keys = [key for key in rules if name == key or name.startswith(key + "/")]
    return rules[max(keys, key=len)]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_imports_point_down(path: Path) -> None:
    allowed, banned = _rule(path, ALLOWED), _rule(path, BANNED)
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in PACKAGES, f"{name}: import our packages as guanaco.{name}"
        assert top not in banned, f"{name} is not for this room"
        if top == "guanaco":
            ours = name.removeprefix("guanaco.")
            exported = _exports(ours)  # `from guanaco.kernels import Ops`: a name of the package itself
            assert exported or any(_under(ours, a) for a in allowed), f"{name} is not below this room"
            assert not _under(ours, ANALYSIS) or _id(path).startswith(MAY_ANALYSE), f"{name}: the server runs without"


def _exports(name: str) -> bool:
    """Whether `name` is one of the names that `kernels/__init__.py` exports: the contract, open to all above it."""
    package, _, member = name.rpartition(".")
    return package == "kernels" and not (ROOT / "kernels" / member).exists() and not _is_module(member)


def _is_module(member: str) -> bool:
    return (ROOT / "kernels" / f"{member}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_only_config_reads_the_environment_and_types_live_below(path: Path) -> None:
    source = path.read_text()
    assert "TYPE_CHECKING" not in source
    if _id(path) != "server/config.py":
        for node in ast.walk(ast.parse(source)):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("environ", "getenv"), f"line {node.lineno}: settings come from server/config.py"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


_TAKE_A_CODE = {
    "AdapterError": 0,
    "HubError": 0,
    "GenerationFailed": 0,
    "ApiError": 1,
    "TemplateError": 1,
    "bad_request": 2,
}
_PYTHONS_OWN = {"BaseException", *(name for name, value in vars(builtins).items() if _is_exception(value))}


def _faults(source: str) -> Iterator[str]:
    """What a file does with errors that it should not do."""
    caught = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.name:
            caught.add(node.name)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (position := _TAKE_A_CODE.get(getattr(node.func, "id", ""))) is not None:
            named = [word.value for word in node.keywords if word.arg == "code"]
            for code in (*node.args[position : position + 1], *named):
                if isinstance(code, ast.Constant):
                    yield f"line {node.lineno}: write {code.value!r} as a member of ErrorCode (models/error_codes.py)"
        elif isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases and bases <= _PYTHONS_OWN and node.name != "GuanacoError":
                yield f"line {node.lineno}: {node.name} must derive from GuanacoError (models/errors.py) as well"
        elif isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if getattr(node.left, "attr", "") == "code" and isinstance(getattr(side, "value", None), str):
                    yield f"line {node.lineno}: compare the code with a member of ErrorCode (models/error_codes.py)"
                is_text = isinstance(side, ast.Call) and getattr(side.func, "id", "") in ("str", "repr")
                if is_text and getattr(side.args[0], "id", "") in caught:
                    yield f"line {node.lineno}: compare the error's type or its code, never its text"


@pytest.mark.parametrize("path", [p for p in FILES if not _id(p).startswith("kernels/")], ids=_id)
def test_errors_have_our_base_and_a_code_that_exists(path: Path) -> None:
    assert list(_faults(path.read_text())) == []


def test_folders_stay_small() -> None:
    sources = [p for top in (*PACKAGES, "tests", "loadtest") for p in (ROOT / top).rglob("*") if p.is_file()]
    counted = Counter(
        p.parent for p in sources if p.suffix in (".py", ".cpp", ".h") and p.name not in ("__init__.py", "conftest.py")
    )
    for folder, count in counted.items():
        limit = MAX_NATIVE_FILES if folder.name == "native" else MAX_FILES
        assert count <= limit, f"{_id(folder)} holds {count} files: {limit} at most"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


def test_the_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions count, too: `kernels/__init__.py` alone, which loads a backend by name, is left out."""
    modules = {_id(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in FILES}
    imports = {name: {i.removeprefix("guanaco.") for i in _imports(path)} for name, path in modules.items()}
    graph = {
        name: {other for other in modules for i in wanted if _under(i, other)} - {name}
        for name, wanted in imports.items()
        if name != "kernels"
    }
    graph = {name: {t for t in targets if not _under(name, t)} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                if (ROOT / (target.replace(".", "/") + ".py")).exists():  # a package's own file imports nothing
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_rules_catch_what_they_should(tmp_path: Path) -> None:
    """The checks above can fail: a file that breaks each rule is found."""
    bad = tmp_path / "bad.py"
    bad.write_text("from guanaco.server.engine import engine\nimport torch\n")
    assert "guanaco.server.engine.engine" in set(_imports(bad))
    assert _rule(ROOT / "server/engine/scheduler.py", BANNED) >= {"torch"}
    assert "torch" not in _rule(ROOT / "server/engine/sampler.py", BANNED)
    assert "server.engine" not in _rule(ROOT / "models/architectures/llama.py", ALLOWED)
    assert not any(_under("models.loading.hub", a) for a in _rule(ROOT / "adapters/peft/weights.py", ALLOWED))
    assert "peft" in _rule(ROOT / "server/api/app.py", BANNED)
    assert "peft" not in _rule(ROOT / "server/training/job.py", BANNED)
    wrong = "class E(ValueError): ...\ntry: ...\nexcept E as error:\n    'full' in str(error)\n    error.code == 'x'\n"
    assert len(list(_faults(wrong))) == 3
    assert len(list(_faults("ApiError(400, 'nonsense')\nbad_request('text', code='nonsense')"))) == 2
    right = "class E(GuanacoError, ValueError): ...\nraise ApiError(400, ErrorCode.NOT_FOUND)\n"
    assert list(_faults(right)) == []
