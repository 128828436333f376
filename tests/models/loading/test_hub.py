"""Hub ids: downloads from a hub of our own on loopback, and a line for each way in which they fail."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from guanaco.models.errors import ModelError
from guanaco.models.loading.hub import resolve_model
from guanaco.models.loading.loader import load_model
from support.adapters.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, serve_hub
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: a tiny model, and what else such repositories hold."""
    path = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    model = {file.name: file.read_bytes() for file in path.iterdir()}
    return model | {
        "README.md": b"a card",
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"raise SystemExit",
        "original/model.safetensors": b"the same in another format",
        "consolidated.safetensors": b"and another",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"sentencepiece",
        "model.gguf": b"GGUF",
    }


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    other = {**files, "config.json": files["config.json"].replace(b"\n}", b',\n "note": 2\n}')}
    with serve_hub(FakeHub({COMMIT: files, OTHER_COMMIT: other})) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub-cache"


def resolve(hub: FakeHub, cache: Path, spec: str = "org/tiny", **options: Any) -> Path:
    return resolve_model(spec, cache_dir=cache, endpoint=hub.endpoint, **options)


def refused(hub: FakeHub, cache: Path, spec: str = "org/tiny", **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        resolve(hub, cache, spec, **options)
    message = str(error.value)
    assert message.startswith(spec)
    assert "\n" not in message
    return message


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_download_is_a_model_and_holds_nothing_else(hub: FakeHub, cache: Path, files: dict[str, bytes]) -> None:
    path = resolve(hub, cache)
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "tokenizer.model", "chat_template.jinja"}  # fmt: skip
    assert {file.name for file in path.rglob("*") if file.is_file()} == wanted
    assert hub.downloaded() == wanted
    for name in wanted:
        assert (path / name).read_bytes() == files[name]
    assert load_model(path, reference_ops()).origin == "quantized"


def test_what_was_downloaded_is_not_downloaded_again(hub: FakeHub, cache: Path) -> None:
    path = resolve(hub, cache)
    hub.requests.clear()
    assert resolve(hub, cache) == path
    assert not hub.downloaded()


@pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
def test_a_revision_is_a_branch_or_a_commit(revision: str, hub: FakeHub, cache: Path) -> None:
    path = resolve(hub, cache, f"org/tiny@{revision}")
    assert b'"note": 2' in (path / "config.json").read_bytes()
    assert path != resolve(hub, cache)


def test_a_token_opens_a_gated_model(hub: FakeHub, cache: Path) -> None:
    hub.token = "hf_secret"
    message = refused(hub, cache)
    assert "gated" in message
    assert "HF_TOKEN" in message
    assert "hf_secret" not in refused(hub, cache, token="hf_secret_of_another")
    assert (resolve(hub, cache, token="hf_secret") / "config.json").exists()


def test_progress_counts_bytes_to_the_end(hub: FakeHub, cache: Path, files: dict[str, bytes]) -> None:
    seen: list[tuple[str, int, int]] = []
    path = resolve(hub, cache, progress=lambda *step: seen.append(step))
    total = sum(file.stat().st_size for file in path.iterdir())
    assert seen[-1] == ("download", total, total)


class TestResuming:
    def test_a_lost_connection_goes_on_where_it_was(
        self, hub: FakeHub, cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken answer
        hub.break_off["model.safetensors"] = 100_000
        path = resolve(hub, cache)
        assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]
        ranges = [r for method, p, r in hub.requests if method == "GET" and p.endswith(f"{COMMIT}/model.safetensors")]
        assert ranges == [None, "bytes=100000-"]

    def test_after_a_failure_only_what_is_missing_is_downloaded(
        self, hub: FakeHub, cache: Path, files: dict[str, bytes]
    ) -> None:
        """The library restarts a file that a process left in the middle; whole files it keeps."""
        hub.files[COMMIT] = {**files, "model-2.safetensors": b"x" * 50_000}
        first = resolve(hub, cache)
        blob = (first / "model-2.safetensors").resolve()
        (first / "model-2.safetensors").unlink()
        blob.unlink()
        hub.break_off["model-2.safetensors"] = 20_000
        hub.status_after_break = 403
        refused(hub, cache)
        assert not (first / "model-2.safetensors").exists()
        hub.fail_status = None
        hub.requests.clear()
        assert (resolve(hub, cache) / "model-2.safetensors").read_bytes() == b"x" * 50_000
        assert hub.downloaded() == {"model-2.safetensors"}


class TestOffline:
    def test_what_was_downloaded_is_served(self, hub: FakeHub, cache: Path) -> None:
        path = resolve(hub, cache)
        hub.requests.clear()
        assert resolve(hub, cache, offline=True) == path
        assert hub.requests == []

    def test_what_was_not_is_refused_without_a_request(self, hub: FakeHub, cache: Path) -> None:
        message = refused(hub, cache, offline=True)
        assert "offline mode" in message
        assert "go online" in message
        assert hub.requests == []

    def test_the_librarys_own_switch_says_the_same(
        self, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "offline mode" in refused(hub, cache)

    def test_a_part_is_not_taken_for_the_whole(self, hub: FakeHub, cache: Path) -> None:
        path = resolve(hub, cache)
        (path / "tokenizer.json").unlink()
        assert "only in part" in refused(hub, cache, offline=True)

    def test_an_unreachable_hub_is_no_problem_for_what_is_there(self, hub: FakeHub, cache: Path) -> None:
        path = resolve(hub, cache)
        assert resolve_model("org/tiny", cache_dir=cache, endpoint="http://127.0.0.1:9") == path

    def test_an_unreachable_hub(self, cache: Path) -> None:
        with pytest.raises(ModelError, match=r"org/tiny is not a path here, .* and the hub cannot be reached: check"):
            resolve_model("org/tiny", cache_dir=cache, endpoint="http://127.0.0.1:9")


class TestSharedCache:
    """What other tools downloaded is found: a model of 16 GB is not fetched twice, and offline it need not be."""

    def test_offline_a_model_is_found_in_either_cache(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        there = resolve(hub, tmp_path / "shared")
        hub.requests.clear()
        found = resolve(hub, cache, offline=True, shared_cache=tmp_path / "shared")
        assert found == there
        assert hub.requests == []
        assert resolve(hub, cache, f"org/tiny@{COMMIT}", offline=True, shared_cache=tmp_path / "shared") == there
        assert "not downloaded before" in refused(
            hub, cache, f"org/tiny@{OTHER_COMMIT}", offline=True, shared_cache=tmp_path / "shared"
        )

    def test_online_its_files_are_not_downloaded_again(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        there = resolve(hub, tmp_path / "shared")
        assert resolve(hub, cache, shared_cache=tmp_path / "shared") == there
        assert not cache.exists()

    def test_our_own_copy_comes_first(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        resolve(hub, tmp_path / "shared")
        ours = resolve(hub, cache)
        assert resolve(hub, cache, shared_cache=tmp_path / "shared", offline=True) == ours

    def test_a_new_model_goes_to_our_own_cache(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        assert resolve(hub, cache, shared_cache=tmp_path / "shared").is_relative_to(cache)
        assert not (tmp_path / "shared").exists()

    def test_a_config_alone_is_no_model(self, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
        """transformers' AutoConfig leaves one behind."""
        folder = tmp_path / "shared" / "models--org--tiny"
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        assert "not downloaded before" in refused(hub, cache, offline=True, shared_cache=tmp_path / "shared")
        assert "without its weights" in refused(hub, tmp_path / "shared", offline=True)
        assert resolve(hub, cache, shared_cache=tmp_path / "shared").is_relative_to(cache)


class TestRefusals:
    @pytest.mark.parametrize("spec", ["no-such-directory", "/no/such", "./org/tiny", "a/b/c", "org/tiny@", "org/.."])
    def test_what_is_neither_path_nor_id(self, spec: str) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            resolve_model(spec, endpoint="http://127.0.0.1:9")

    @pytest.mark.parametrize("spec", ["org/a--b", "org/a..b"])
    def test_an_id_that_the_library_refuses(self, spec: str, hub: FakeHub, cache: Path) -> None:
        assert "no hub id" in refused(hub, cache, spec)

    def test_an_unknown_model(self, hub: FakeHub, cache: Path) -> None:
        assert "neither a path here nor a model on the hub" in refused(hub, cache, "org/absent")

    def test_an_unknown_revision(self, hub: FakeHub, cache: Path) -> None:
        assert "org/tiny has no revision 'v3'" in refused(hub, cache, "org/tiny@v3")

    @pytest.mark.parametrize("status", [403, 500])
    def test_a_hub_that_fails(self, status: int, hub: FakeHub, cache: Path) -> None:
        hub.fail_status = status
        refused(hub, cache)

    def test_only_pickles(self, hub: FakeHub, cache: Path, files: dict[str, bytes]) -> None:
        hub.files[COMMIT] = {name: files[name] for name in ("config.json", "pytorch_model.bin")}
        message = refused(hub, cache)
        assert "only pickled weights" in message
        assert "save_pretrained(DST, safe_serialization=True)" in message
        assert "pytorch_model.bin" not in hub.downloaded()

    def test_only_gguf(self, hub: FakeHub, cache: Path, files: dict[str, bytes]) -> None:
        hub.files[COMMIT] = {name: files[name] for name in ("config.json", "model.gguf")}
        assert "download one of them (model.gguf, say) and give its path" in refused(hub, cache)

    def test_no_weights_at_all(self, hub: FakeHub, cache: Path, files: dict[str, bytes]) -> None:
        hub.files[COMMIT] = {"config.json": files["config.json"]}
        assert "holds no safetensors weights" in refused(hub, cache)

    def test_a_full_disk(self, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("guanaco.models.loading.hub.snapshot_download", full)
        message = refused(hub, cache)
        assert "No space left" in message
        assert "make room" in message
