"""The whole circle with nothing made up: a tiny model, `guanaco train` as it is, OpenAI's package as it is."""

import json
import time
from pathlib import Path

import pytest
from openai import OpenAI

from support.server.real_server import BASE, make_real_server

SECONDS = 240.0


def test_upload_create_poll_chat_delete(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    messages = [{"role": "user", "content": "Hi"}]
    row = {"messages": [*messages, {"role": "assistant", "content": "Ahoy, me hearties!"}]}
    data = tmp_path / "chat.jsonl"
    data.write_text((json.dumps(row) + "\n") * 12)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps(row) + "\n" + json.dumps({"messages": messages}) + "\n")
    with (
        make_real_server(tmp_path) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client,
    ):
        files = [client.files.create(file=path, purpose="fine-tune") for path in (wrong, data)]
        hyperparameters = {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 5.0}
        jobs = [
            client.fine_tuning.jobs.create(
                model=BASE,
                training_file=file.id,
                suffix=suffix,
                seed=3,
                method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            )
            for file, suffix in zip(files, ("wrong", "pirate"), strict=True)
        ]
        deadline = time.monotonic() + SECONDS
        for index in range(2):
            while (job := client.fine_tuning.jobs.retrieve(jobs[index].id)).status not in ("succeeded", "failed"):
                assert time.monotonic() < deadline, job
                time.sleep(0.05)
            jobs[index] = job
        assert jobs[0].status == "failed"
        assert jobs[0].error is not None
        assert (jobs[0].error.code, jobs[0].error.param) == ("invalid_training_file", "training_file")
        assert "line 2" in jobs[0].error.message
        assert str(tmp_path) not in jobs[0].error.message
        assert jobs[1].error is None, jobs[1].error
        assert jobs[1].fine_tuned_model == "pirate"
        assert jobs[1].trained_tokens
        events = list(client.fine_tuning.jobs.list_events(jobs[1].id))
        losses = [event.data["train_loss"] for event in events if event.type == "metrics" and event.data]  # type: ignore[index]
        assert losses[0] < losses[-1], "the latest event comes first: the loss has fallen"
        assert list(client.fine_tuning.jobs.checkpoints.list(jobs[1].id))
        assert client.files.content(jobs[1].result_files[0]).text.startswith("step,train_loss")
        assert "pirate" in [model.id for model in client.models.list()]

        def says(model: str) -> str | None:
            chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)  # type: ignore[arg-type]
            return chat.choices[0].message.content

        assert says("pirate") != says(BASE)
        assert client.models.delete("pirate").deleted
        for file in files:
            assert client.files.delete(file.id).deleted
