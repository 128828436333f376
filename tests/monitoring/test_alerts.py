"""Every alert fires in a test of its own, as Prometheus' own tool computes it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker/monitoring"
UNPACKED = ROOT / "build/prometheus/usr/bin"
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
CASES = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool", path=os.pathsep.join((os.environ.get("PATH", ""), str(UNPACKED))))
    if found is None:
        pytest.skip("promtool is not here: apt install prometheus, or python loadtest/watch_server.py fetch")
    return found


def test_each_alert_fires_in_one_case_and_is_silent_in_another() -> None:
    expected = [
        (check["alertname"], bool(check["exp_alerts"])) for c in CASES for check in c.get("alert_rule_test", ())
    ]
    names = {rule["alert"] for rule in RULES}
    assert {name for name, fires in expected if fires} == names
    assert all(name in names for name, _ in expected)
    assert any(check["expr"] == "ALERTS" and not check["exp_samples"] for check in CASES[0]["promql_expr_test"])


def test_the_page_lists_the_alerts() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `Guanaco")]
    assert rows == [rule["alert"] for rule in RULES]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool(promtool: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_sees_an_alert_that_never_fires(promtool: str, tmp_path: Path) -> None:
    """The cases can fail: with a bound that no server reaches they do."""
    rules = (FOLDER / "alerts.yml").read_text()
    (tmp_path / "alerts_test.yml").write_text((FOLDER / "alerts_test.yml").read_text())
    for bound, beyond in (
        ("> 20", "> 2000"),
        ("< 0.05", "< 0.0005"),
        ("0.8 *", "8 *"),
        ('"5xx"', '"6xx"'),
        ("== 0\n", "> 7\n"),
    ):
        assert bound in rules
        (tmp_path / "alerts.yml").write_text(rules.replace(bound, beyond, 1))
        command = [promtool, "test", "rules", "alerts_test.yml"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60).returncode != 0, (
            bound
        )
