"""Adds the system's packages to a CycloneDX bill of materials of Python's. Standard library only.

python3 sbom.py python.cdx.json > sbom.cdx.json
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote


def system_packages() -> list[tuple[str, str, str]]:
    """(name, version, architecture) of each package that dpkg has installed."""
    form = "${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n"
    command = ["dpkg-query", "--show", f"--showformat={form}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    return [(name, version, architecture) for name, version, architecture, status in rows if status == "installed"]


def with_system(document: dict, packages: list[tuple[str, str, str]], distribution: str) -> dict:
    """The document with a component for each package. distribution: `debian` or `ubuntu`, as os-release names it."""
    components = [
        {
            "type": "library",
            "bom-ref": f"deb/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/{distribution}/{quote(name)}@{quote(version)}?arch={architecture}",
        }
        for name, version, architecture in packages
    ]
    return {**document, "components": [*document.get("components", []), *components]}


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text())
    distribution = platform.freedesktop_os_release()["ID"]
    print(json.dumps(with_system(document, system_packages(), distribution), indent=1))


if __name__ == "__main__":
    main()
