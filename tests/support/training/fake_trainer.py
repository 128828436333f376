"""A trainer without a model that keeps the contract of `guanaco train`: files, signals, exit codes, the last line.

Its behaviour comes from the environment, which the server hands it: FAKE_STEPS, FAKE_SECONDS (of a step), FAKE_ADAPTER
(a folder to copy), FAKE_ERROR (a message), FAKE_KILL (kills itself at that step, once), FAKE_EARLY (exits at once),
FAKE_GATE (waits at step 2 until that file is there).
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

stopped = False


def stop(*_: object) -> None:
    global stopped
    stopped = True


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("data", "validation-data", "name", "out", "work", "model", "seed", "epochs", "batch-size"):
        parser.add_argument(f"--{name}")
    for name in ("learning-rate", "threads"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    work, out = Path(asked.work), Path(asked.out)
    work.mkdir(parents=True, exist_ok=True)
    with (work.parent / "starts.jsonl").open("a") as file:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "nice": nice, "pid": os.getpid()}) + "\n")
    if message := os.environ.get("FAKE_ERROR"):
        print(json.dumps({"error": {"code": "out_of_memory", "message": message, "param": None}}))
        return 1
    if "FAKE_EARLY" in os.environ:
        return int(os.environ["FAKE_EARLY"])
    steps = int(os.environ.get("FAKE_STEPS", "4"))
    done = max((int(path.name[11:]) for path in work.glob("checkpoint-*")), default=0) if asked.resume else 0
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
        gate = os.environ.get("FAKE_GATE")
        while step == 2 and gate and not Path(gate).exists() and not stopped:
            time.sleep(0.005)
        line = {"step": step, "steps": steps, "loss": 4.0 / step, "eval_loss": 5.0 / step, "learning_rate": 1e-4}
        with (work / "train.jsonl").open("a") as file:
            file.write(json.dumps({**line, "tokens": 10 * step, "tokens_per_second": 50.0, "time": time.time()}) + "\n")
        checkpoint = work / f"checkpoint-{step}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "complete").touch()
        if stopped:
            return 130
        if os.environ.get("FAKE_KILL") == str(step) and not asked.resume:
            os.kill(os.getpid(), signal.SIGKILL)
    if adapter := os.environ.get("FAKE_ADAPTER"):
        shutil.copytree(adapter, work / "adapter", dirs_exist_ok=True)
    else:
        (work / "adapter").mkdir(exist_ok=True)
    (work / "adapter").replace(out)
    answer = {"adapter": str(out), "train_loss": 1.0, "eval_loss": 1.2, "tokens_per_second": 50.0, "seconds": 0.1}
    print(json.dumps({**answer, "steps": steps, "trained_tokens": 10 * steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
