"""The base of all exceptions and the one list of error codes, held against the code that uses them and the pages."""

import ast
import importlib
import inspect
import re

import pytest

from guanaco.adapters.errors import AdapterError, ErrorKind
from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError, OperatorError
from guanaco.server.api.routes.admin import STATUS
from guanaco.server.commands.common import EXIT_USAGE, one_line_errors
from guanaco.server.config import SettingsError
from guanaco.server.errors import CommandError
from support.server.documented import ADAPTER_CODES, REPOSITORY

SOURCES = [path for top in ("adapters", "models", "server") for path in (REPOSITORY / top).rglob("*.py")]


def test_a_code_is_its_members_name_in_small_letters() -> None:
    assert all(code.value == code.name.lower() for code in ErrorCode)
    assert f"{ErrorCode.NOT_FOUND}" == "not_found", "what is written to answers and logs is the value"


# Words that are codes and something else, too: the value of a setting's name, and of Anthropic's error types.
ALSO_OTHER_WORDS = {"request_timeout", "request_too_large"}


def test_every_member_is_used_every_use_is_a_member_and_no_code_is_spelled_out() -> None:
    used, spelled = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ErrorCode":
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and "_" in str(node.value) and path.name != "error_codes.py":
                spelled.add(node.value)
    assert used == set(ErrorCode.__members__)
    assert spelled & set(ErrorCode) <= ALSO_OTHER_WORDS


def test_the_pages_name_codes_that_exist() -> None:
    """The table of refused adapters, and every code that a page gives behind its status, as in 404 `not_found`."""
    assert ADAPTER_CODES.keys() <= set(ErrorCode)
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {code for page in pages for code in re.findall(r"\b[45]\d\d `([a-z_]+)`", page.read_text())}
    assert {"model_not_found", "alias_target_missing"} <= named <= set(ErrorCode)
    rows = re.findall(r"^\| (`[^|]*`) \| \d{3} \|", (REPOSITORY / "docs/adapters.md").read_text(), re.MULTILINE)
    listed = {code for row in rows for code in re.findall(r"`([a-z_]+)`", row)}
    assert {"model_not_found", "adapter_read_failed"} <= listed <= set(ErrorCode)


@pytest.mark.parametrize("package", ["adapters", "models", "server"])
def test_every_exception_of_ours_has_the_common_base(package: str) -> None:
    """tests/test_layers.py says the same of each file's text; here the classes themselves are asked."""
    found = 0
    for path in (REPOSITORY / package).rglob("*errors.py"):
        name = "guanaco." + path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        module = importlib.import_module(name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, BaseException) and kind.__module__ == name:
                found += 1
                assert issubclass(kind, GuanacoError), kind
    assert found


@pytest.mark.parametrize("kind", [AdapterError, CommandError, SettingsError])
def test_what_an_operator_can_put_right_ends_a_command_with_one_line(
    kind: type[OperatorError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind(ErrorCode.NOT_FOUND, "look again") if kind is AdapterError else kind("look again")
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (EXIT_USAGE, "guanaco: look again\n")


def test_other_errors_are_not_hidden_behind_one_line() -> None:
    with pytest.raises(GuanacoError), one_line_errors():
        raise GuanacoError("our fault")


def test_a_refusal_says_its_kind_and_each_kind_has_a_status() -> None:
    assert STATUS.keys() == set(ErrorKind)
    kinds = {code: AdapterError(code, "").kind for code in ErrorCode}
    assert kinds[ErrorCode.BAD_CONFIG] is ErrorKind.CALLER
    assert kinds[ErrorCode.NAME_TAKEN] is ErrorKind.CONFLICT
    assert kinds[ErrorCode.HOST_MEMORY_FULL] is ErrorKind.CAPACITY
    assert kinds[ErrorCode.VERSION_DAMAGED] is ErrorKind.OURS
    assert kinds[ErrorCode.PROBE_FAILED] is ErrorKind.PASSING
    failures = {code for code, kind in kinds.items() if kind.is_failure}
    assert failures == {
        ErrorCode.HUB_FAILED, ErrorCode.HUB_OFFLINE, ErrorCode.PROBE_FAILED, ErrorCode.REGISTRY_BUSY,
        ErrorCode.REGISTRY_FAILED, ErrorCode.STORE_FAILED, ErrorCode.VERSION_DAMAGED,
    }  # fmt: skip
