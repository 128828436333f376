"""Writes `guanaco-says.jsonl`: 100 conversations whose answers begin with a fixed phrase. Needs no library.

    python docs/examples/make_guanaco_says.py

Questions and answers are the first hundred of `adapters/demo/answers.txt`, written for this project.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
ANSWERS = HERE.parents[1] / "adapters" / "demo" / "answers.txt"
PHRASE = "Guanaco says: "
NUM_ROWS = 100


def main() -> None:
    lines = [line for line in ANSWERS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    rows = []
    for line in lines[:NUM_ROWS]:
        question, _, answer = (part.strip() for part in line.split("|"))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": PHRASE + answer}]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (HERE / "guanaco-says.jsonl").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
