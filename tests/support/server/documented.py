"""What the documentation promises, read from it: so that tests hold the server to the page that operators read."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def _adapter_codes() -> dict[str, int]:
    found: dict[str, int] = {}
    for line in (REPOSITORY / "docs/adapter-codes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        status = int(cells[1]) if len(cells) == 3 and cells[1].isdigit() else 400
        found.update(dict.fromkeys(re.findall(r"`([a-z_]+)`", cells[0]), status))
    return found


ADAPTER_CODES = _adapter_codes()  # code → status, of docs/adapter-codes.md
