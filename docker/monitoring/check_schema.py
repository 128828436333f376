"""Compares the dashboard's JSON with Grafana's published types: the npm package @grafana/schema, by TypeScript.

    python docker/monitoring/check_schema.py [VERSION]     # needs npm and a network; installs into build/grafana-schema

A field that Grafana doesn't know, or a value of another kind, is an error of the compiler and exit code 1. The package
has no types of queries: `tests/monitoring/test_dashboard.py` reads those with the types of grafana-foundation-sdk.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build/grafana-schema"
VERSION = "13.2.3"
PANELS = ("timeseries", "stat")
# Enumerations may be written as their texts, and what has a default may be left out.
HEAD = """
type Loose<T> = T extends string ? `${T}` : T extends (infer U)[] ? Loose<U>[]
  : T extends object ? { [K in keyof T]?: Loose<T[K]> } : T;
"""


def program(dashboard: dict[str, Any]) -> str:
    """TypeScript that compiles if all of the dashboard is of Grafana's types."""
    types = "../node_modules/@grafana/schema/dist/types/raw/composable"
    lines = ['import type { Dashboard } from "@grafana/schema";']
    lines += [f'import type * as {kind} from "{types}/{kind}/panelcfg/x/types.gen";' for kind in PANELS]
    lines += [HEAD, f"export const all: Loose<Dashboard> = {json.dumps(dashboard)};"]
    for panel in dashboard["panels"]:
        if (kind := panel["type"]) == "row":
            continue
        number = panel["id"]
        lines.append(f"export const options{number}: Loose<{kind}.Options> = {json.dumps(panel['options'])};")
        drawing = panel["fieldConfig"]["defaults"].get("custom")
        if drawing is not None:
            lines.append(f"export const drawing{number}: Loose<{kind}.FieldConfig> = {json.dumps(drawing)};")
    return "\n".join(lines) + "\n"


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else VERSION
    (WORK / "src").mkdir(parents=True, exist_ok=True)
    (WORK / "package.json").write_text('{"name": "check", "private": true, "type": "module"}')
    packages = [f"@grafana/schema@{version}", "typescript@7"]
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", *packages], cwd=WORK, check=True)
    dashboard = json.loads((HERE / "grafana/dashboards/guanaco.json").read_text())
    (WORK / "src/check.ts").write_text(program(dashboard))
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--module", "preserve", "--moduleResolution", "bundler"]
    done = subprocess.run([WORK / "node_modules/.bin/tsc", *flags, "src/check.ts"], cwd=WORK, check=False)
    print(f"@grafana/schema {version}: {'no complaint' if done.returncode == 0 else 'see above'}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
