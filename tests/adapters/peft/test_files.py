"""What the operator's directory may contain, and that nothing in it leads out or makes us wait."""

import contextlib
import os
import socket
import threading

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.files import AdapterFiles

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / CONFIG).write_bytes(b"config")
    (directory / WEIGHTS).write_bytes(b"weights")
    (tmp_path / "secret").write_bytes(b"secret")
    return directory


def refusal(path, name="pirate", file=WEIGHTS, max_bytes=100):
    with pytest.raises(AdapterError) as error:
        AdapterFiles.find(path, name, CONFIG).read(file, max_bytes)
    return error.value.code


def test_reads_whole_files_up_to_the_limit(adapter):
    files = AdapterFiles.find(adapter, "pirate", CONFIG)
    assert files.read(WEIGHTS, 7) == b"weights"
    assert files.read(WEIGHTS, 100) == b"weights"
    assert refusal(adapter, max_bytes=6) == "file_too_large"


def test_sub_folder_of_the_adapters_name(tmp_path, adapter):
    """PEFT saves an adapter that is not called "default" in a folder of its own."""
    inner = adapter / "pirate"
    inner.mkdir()
    (inner / CONFIG).write_bytes(b"inner")
    assert AdapterFiles.find(adapter, "pirate", CONFIG).read(CONFIG, 100) == b"config"  # the top one comes first
    (adapter / CONFIG).unlink()
    assert AdapterFiles.find(adapter, "pirate", CONFIG).read(CONFIG, 100) == b"inner"
    with pytest.raises(AdapterError, match="pirate") as error:
        AdapterFiles.find(adapter, "terse", CONFIG)
    assert error.value.code == "config_missing"


def test_the_operators_own_path_may_be_a_link(tmp_path, adapter):
    link = tmp_path / "link"
    link.symlink_to(adapter)
    assert AdapterFiles.find(link, "pirate", CONFIG).read(WEIGHTS, 100) == b"weights"
    assert AdapterFiles.find(link / ".." / "adapter", "pirate", CONFIG).read(WEIGHTS, 100) == b"weights"


def test_links_inside_are_followed_and_links_out_are_not(tmp_path, adapter):
    (adapter / "data").mkdir()
    (adapter / WEIGHTS).rename(adapter / "data" / "real")
    (adapter / WEIGHTS).symlink_to("data/real")
    assert AdapterFiles.find(adapter, "pirate", CONFIG).read(WEIGHTS, 100) == b"weights"
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to(tmp_path / "secret")
    assert refusal(adapter) == "outside_root"
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("../secret")
    assert refusal(adapter) == "outside_root"
    (adapter / "data" / "out").symlink_to(tmp_path)
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("data/out/secret")
    assert refusal(adapter) == "outside_root"


def test_sub_folder_that_leads_out(tmp_path, adapter):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / CONFIG).write_bytes(b"outside")
    (adapter / CONFIG).unlink()
    (adapter / "pirate").symlink_to(outside)
    assert refusal(adapter, file=CONFIG) == "outside_root"


def test_hub_cache_links_to_its_blobs(tmp_path, adapter):
    """huggingface_hub keeps snapshots/<revision>/file → ../../blobs/<digest>."""
    repository = tmp_path / "models--org--pirate"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        (adapter / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert AdapterFiles.find(snapshot, "pirate", CONFIG).read(WEIGHTS, 100) == b"weights"
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../secret")
    assert refusal(snapshot) == "outside_root"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "dangling", "loop", "device"])
def test_things_that_are_no_files(adapter, name, kind):
    path = adapter / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(adapter):
            server.bind(name)  # a socket's path may have 107 bytes
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(name)
    else:
        path.symlink_to("/dev/zero")
    done = []
    reader = threading.Thread(target=lambda: done.append(refusal(adapter, file=name)), daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert done, "reading waits on something that is no file"
    expected = {"dangling": "not_found", "device": "outside_root"}
    assert done == [expected.get(kind, "not_a_file")]


def test_directories_that_are_not_there(tmp_path, adapter):
    assert refusal(tmp_path / "nowhere") == "not_found"
    assert refusal(adapter / WEIGHTS) == "not_a_directory"
    assert refusal(adapter, file="other") == "not_found"
    (adapter / CONFIG).unlink()
    assert refusal(adapter) == "config_missing"
    assert refusal(adapter, name="../adapter") == "config_missing"


def test_name_that_climbs_does_not_leave_the_root(tmp_path, adapter):
    """The registry refuses such names; this is the second line."""
    (adapter / "empty").mkdir()
    assert refusal(adapter / "empty", name="..", file=CONFIG) == "outside_root"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(adapter):
    (adapter / WEIGHTS).chmod(0)
    assert refusal(adapter) == "unreadable"


@pytest.mark.parametrize("call", ["realpath", "stat"])
@pytest.mark.parametrize("swapped", ["folder", "file", "fifo"])
def test_swap_in_the_worst_moment(tmp_path, adapter, monkeypatch, call, swapped):
    """Right after a path was resolved or looked at, its folder or file becomes a link that leads out, or a pipe."""
    (adapter / "data").mkdir()
    (adapter / "data" / "real").write_bytes(b"weights")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "real").write_bytes(b"secret")
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("data/real")
    files = AdapterFiles.find(adapter, "pirate", CONFIG)
    victim = adapter / "data" if swapped == "folder" else adapter / "data" / "real"

    def swap(result):
        if aside:
            return result
        aside.append(victim.rename(adapter / "aside"))
        if swapped == "fifo":
            os.mkfifo(victim)
        else:
            victim.symlink_to(evil if swapped == "folder" else evil / "real")
        return result

    aside = []
    module, real = (os.path, os.path.realpath) if call == "realpath" else (os, os.stat)
    result = []

    def read():
        try:
            result.append(files.read(WEIGHTS, 100))
        except AdapterError as error:
            result.append(error.code)

    reader = threading.Thread(target=read, daemon=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, call, lambda *a, **k: swap(real(*a, **k)))
        reader.start()
        reader.join(timeout=20)
    assert result, "reading waits on a pipe"
    assert result[0] in (b"weights", "unreadable", "not_a_file")
    assert result[0] == b"weights" or (call, swapped) != ("stat", "folder"), "the folder had been opened by then"


@pytest.mark.parametrize("swapped", ["folder", "file", "fifo"])
def test_link_swapped_in_between_is_never_followed(tmp_path, adapter, proof_count, swapped):
    """A thread exchanges a folder or file for something evil, as fast as it can: we get the file, or an error."""
    (adapter / "data").mkdir()
    (adapter / "data" / "real").write_bytes(b"weights")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "real").write_bytes(b"secret")
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("data/real")
    victim = adapter / "data" if swapped == "folder" else adapter / "data" / "real"
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            victim.rename(adapter / "aside")
            if swapped == "fifo":
                os.mkfifo(victim)
            else:
                victim.symlink_to(evil if swapped == "folder" else evil / "real")
            victim.unlink()
            (adapter / "aside").rename(victim)

    swapper = threading.Thread(target=swap, daemon=True)
    swapper.start()
    seen = set()

    def read():
        files = AdapterFiles.find(adapter, "pirate", CONFIG)
        for _ in range(proof_count(1500, 10_000)):
            try:
                seen.add(files.read(WEIGHTS, 100))
            except AdapterError as error:
                seen.add(error.code)
        seen.add("done")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=120)
    stop.set()
    swapper.join(timeout=20)
    assert seen <= {b"weights", "outside_root", "unreadable", "not_found", "not_a_file", "done"}
    assert "done" in seen, "reading waits on a pipe"
