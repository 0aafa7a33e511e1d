"""Pushing to the Hub, against a local server that speaks its API (tests/hub_server.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, close_session, constants

from nlpxfer.errors import PushError
from nlpxfer.hub import Backoff, check_push_request, finished_files, push_folder

# 2026-11, huggingface_hub 2.4: its LFS upload calls httpx2 in a way that httpx2 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_" + "a" * 34
READ_TOKEN = "hf_" + "b" * 34
QUICK = Backoff(attempts=4, first_seconds=0.01, longest_seconds=0.02)
CARD = "---\nlibrary_name: transformers\nbase_model: google/bert-tiny\n---\n# A model\n"
COMMIT = r"POST .*/commit/main"
SENT = ["README.md", "config.json", "labels.json", "model.safetensors", "report.json", "run.json"]
SENT += ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Against the local server only: online, by LFS, and without the token of whoever runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    users = {TOKEN: "alice", READ_TOKEN: "reader"}
    with HubServer(users, organisations={"alice": ["team"]}, roles={READ_TOKEN: "read"}) as server:
        yield server
        close_session()


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def output(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished output folder, with everything beside it that must stay at home."""
    folder = tmp_path / "out"
    shutil.copytree(tiny_checkpoint("bert", kind="classifier", layers=1), folder)
    (folder / "README.md").write_text(CARD)
    (folder / "report.json").write_text(json.dumps({"schema_version": 1, "metrics": {"test": {"accuracy": 0.9}}}))
    (folder / "run.json").write_text(json.dumps({"seed": 42}))
    (folder / "labels.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"\x80pickle" + TOKEN.encode())
    (folder / "optimizer.pt").write_bytes(b"\x80")
    for name in ("model.safetensors", "config.json"):
        target = folder / "checkpoints" / "checkpoint-4" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, target)
    (folder / "predictions").mkdir()
    for name in ("predictions/test.jsonl", "predictions/out_of_fold.jsonl", "label_errors.jsonl", "errors.json"):
        (folder / name).write_text('{"text": "a secret text"}\n')
    (folder / "errors.md").write_text("a secret text\n")
    return folder


def remote(hub: HubServer, repo_id: str = "alice/model") -> dict[str, bytes]:
    return {path: stored.content for path, stored in hub.repos[repo_id].at("main")[1].items()}


def commits(hub: HubServer, repo_id: str = "alice/model") -> list[str]:
    return [message for _, message, _ in hub.repos[repo_id].commits]


# -- a push that works


def test_exactly_the_listed_files_are_sent_and_nothing_else(hub: HubServer, api: HfApi, output: Path) -> None:
    pushed = push_folder(output, "alice/model", api=api, backoff=QUICK)
    held = remote(hub)
    assert sorted(held) == sorted([".gitattributes", *SENT])
    assert all(held[name] == (output / name).read_bytes() for name in SENT)
    assert pushed.files == tuple(sorted(SENT))
    assert pushed.commit == hub.repos["alice/model"].head
    assert pushed.url == f"{hub.url}/alice/model"
    assert hub.repos["alice/model"].private


def test_a_bare_name_goes_to_the_own_namespace_and_public_when_asked(hub, api, output) -> None:
    assert push_folder(output, "model", private=False, api=api, backoff=QUICK).repo_id == "alice/model"
    assert not hub.repos["alice/model"].private
    assert push_folder(output, "team/model", api=api, backoff=QUICK).repo_id == "team/model"


def test_the_pushed_model_loads_back_bit_equal_with_its_labels(hub, api, output, tmp_path) -> None:
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "load = AutoModelForSequenceClassification.from_pretrained\n"
        "here, there = load(sys.argv[1]), load('alice/model')\n"
        "ours, theirs = here.state_dict(), there.state_dict()\n"
        "assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)\n"
        "words = AutoTokenizer.from_pretrained('alice/model')('bread and music')['input_ids']\n"
        "assert words == AutoTokenizer.from_pretrained(sys.argv[1])('bread and music')['input_ids']\n"
        "print(sorted(there.config.id2label.items()))\n"
    )
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(output)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "[(0, 'food'), (1, 'music'), (2, 'sport'), (3, 'travel')]"


def test_without_a_client_the_environment_says_where_and_who(hub, output, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check_push_request("model") == "alice/model"
    assert push_folder(output, "model", backoff=QUICK).url == f"{hub.url}/alice/model"


def test_an_unchanged_folder_makes_no_second_commit(hub, api, output) -> None:
    first = push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert push_folder(output, "alice/model", api=api, backoff=QUICK) == first
    assert len(hub.asked(COMMIT)) == len(hub.asked(r"POST .*/preupload/")) == 1


def test_old_shards_go_and_files_of_others_stay(hub, api, output) -> None:
    weights = (output / "model.safetensors").rename(output / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": weights.name}}
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert {weights.name, "model.safetensors.index.json"} < remote(hub).keys()
    api.upload_file(path_or_fileobj=b"MIT", path_in_repo="LICENSE", repo_id="alice/model")
    weights.rename(output / "model.safetensors")
    (output / "model.safetensors.index.json").unlink()
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert sorted(remote(hub)) == sorted([".gitattributes", "LICENSE", *SENT])


# -- refused before anything is sent


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", '{\n"token": "' + TOKEN + '"}', "run.json line 2: an access token"),
        ("README.md", CARD + "Trained in /home/alice/runs.\n", "README.md line 6: the path /home/alice"),
        (
            "report.json",
            '{"metrics": {"a": 1}, "file": "C:\\\\Users\\\\bob\\\\x.csv"}',
            "report.json line 1: the path C:",
        ),
        ("labels.json", '["file:///root/data"]', "labels.json line 1: the path /root/data"),
    ],
)
def test_secrets_and_home_paths_are_refused(hub, api, output, name, text, words) -> None:
    (output / name).write_text(text)
    with pytest.raises(PushError, match="nothing was sent") as refused:
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert words in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert hub.requests == []


def test_the_path_of_the_folder_itself_is_refused_and_web_addresses_are_not(output) -> None:
    (output / "README.md").write_text(CARD + "See https://example.org/home/alice and ~/.cache.\n")
    assert sorted(finished_files(output)) == sorted(SENT)
    (output / "run.json").write_text(json.dumps({"output_dir": str(output.resolve())}))
    with pytest.raises(PushError, match=r"run\.json line 1: the path"):
        finished_files(output)


def test_an_unfinished_folder_is_refused_with_all_its_faults(hub, api, output) -> None:
    for name in ("report.json", "README.md", "tokenizer.json"):
        (output / name).unlink()
    (output / "config.json").write_text("{")
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(PushError) as refused:
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    for words in (
        "report.json is missing",
        "README.md is missing",
        "the tokenizer is missing",
        "config.json is not JSON",
        "model.safetensors is cut off or damaged",
    ):
        assert words in str(refused.value)
    assert hub.requests == []


def test_no_folder_and_no_weights(output, tmp_path) -> None:
    with pytest.raises(PushError, match="There is no folder"):
        finished_files(tmp_path / "nowhere")
    (output / "model.safetensors").unlink()
    with pytest.raises(PushError, match=r"model\.safetensors is missing"):
        finished_files(output)


def test_an_index_that_leaves_the_folder_is_refused(output) -> None:
    (output / "model.safetensors").rename(output.parent / "model.safetensors")
    (output / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(PushError, match=r"no shard of this folder"):
        finished_files(output)


def test_a_link_that_leaves_the_folder_is_refused(output) -> None:
    (output / "run.json").rename(output.parent / "elsewhere.json")
    (output / "run.json").symlink_to(output.parent / "elsewhere.json")
    with pytest.raises(PushError, match=r"run\.json links to a place outside"):
        finished_files(output)


def test_a_local_base_model_in_the_card_is_refused(output) -> None:
    (output / "README.md").write_text("---\nbase_model: ../checkpoints/teacher\n---\n")
    with pytest.raises(PushError, match="as base_model, which is not an id"):
        finished_files(output)


# -- the question before a long run


@pytest.mark.parametrize(
    "repo_id", ["a/b/c", "https://huggingface.co/alice/model", "alice/", "alice/mo del", "a--b", ""]
)
def test_a_malformed_name_is_refused_without_a_request(hub, api, repo_id) -> None:
    with pytest.raises(PushError, match="cannot be the name of a repository"):
        check_push_request(repo_id, api=api)
    assert hub.requests == []


def test_the_check_gives_the_full_id_and_writes_nothing(hub, api) -> None:
    assert check_push_request("model", api=api) == "alice/model"
    assert check_push_request("team/model", api=api) == "team/model"
    assert {method for method, _, _ in hub.requests} == {"GET"}
    assert hub.repos == {}


def test_no_token(hub) -> None:
    with pytest.raises(PushError, match="no access token"):
        check_push_request("alice/model", api=HfApi(endpoint=hub.url))
    assert hub.requests == []


def test_the_token_of_the_environment_is_used(hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check_push_request("model", api=HfApi(endpoint=hub.url)) == "alice/model"


def test_401_a_wrong_token(hub, output) -> None:
    with pytest.raises(PushError, match="does not accept the access token") as refused:
        push_folder(output, "alice/model", api=HfApi(endpoint=hub.url, token="hf_" + "x" * 34), backoff=QUICK)
    assert "hf auth login" in str(refused.value)
    assert len(hub.requests) == 1


def test_a_token_that_may_only_read(hub) -> None:
    with pytest.raises(PushError, match="may only read"):
        check_push_request("reader/model", api=HfApi(endpoint=hub.url, token=READ_TOKEN))


def test_a_foreign_namespace_is_seen_before_the_run(hub, api) -> None:
    with pytest.raises(PushError, match=r"alice may not write to bob/model") as refused:
        check_push_request("bob/model", api=api)
    assert "Available: alice, team" in str(refused.value)
    assert "--hub_model_id alice/model" in str(refused.value)


def test_403_from_the_hub(hub, output) -> None:
    """A fine-grained token does not tell its rights beforehand."""
    hub.roles = {TOKEN: "fineGrained"}
    with pytest.raises(PushError, match="may not write to bob/model") as refused:
        push_folder(output, "bob/model", api=HfApi(endpoint=hub.url, token=TOKEN), backoff=QUICK)
    assert "rights to create a model under the namespace" in str(refused.value)
    assert len(hub.asked("POST /api/repos/create")) == 1


def test_404_a_repository_that_vanishes(hub, api, output) -> None:
    hub.fail(r"POST .*/preupload/", status=404, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(PushError, match="knows no such repository"):
        push_folder(output, "alice/model", api=api, backoff=QUICK)


def test_a_private_push_never_goes_to_a_public_repository(hub, api, output) -> None:
    push_folder(output, "alice/model", private=False, api=api, backoff=QUICK)
    with pytest.raises(PushError, match="is public, and a private push was asked for(.|\n)*nlpxfer push --public"):
        check_push_request("alice/model", api=api)


def test_an_adapter_repository_is_not_mixed_with_a_model(hub, api, output) -> None:
    api.create_repo("alice/model", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="alice/model")
    with pytest.raises(PushError, match="holds an adapter"):
        push_folder(output, "alice/model", api=api, backoff=QUICK)


def test_a_run_without_a_model_sends_its_adapter_and_no_model_is_mixed_with_it(hub, api, output, tmp_path) -> None:
    bundle = tmp_path / "run" / "adapter"
    shutil.copytree(output, bundle, ignore=shutil.ignore_patterns("config.json", "checkpoints"))
    (bundle / "model.safetensors").rename(bundle / "adapter_model.safetensors")
    (bundle / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (bundle / "base.json").write_text(json.dumps({"weights": "0" * 64}))
    shutil.copy(bundle / "README.md", tmp_path / "run" / "README.md")
    push_folder(tmp_path / "run", "alice/adapter", api=api, backoff=QUICK)
    sent = set(SENT) - {"config.json", "model.safetensors"}
    sent |= {"adapter_config.json", "adapter_model.safetensors", "base.json", ".gitattributes"}
    assert set(remote(hub, "alice/adapter")) == sent
    assert push_folder(bundle, "alice/adapter", api=api, backoff=QUICK).commit == hub.repos["alice/adapter"].head
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    with pytest.raises(PushError, match="alice/model holds a whole model"):
        push_folder(tmp_path / "run", "alice/model", api=api, backoff=QUICK)


def test_offline_mode_is_named(monkeypatch, api) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="unset HF_HUB_OFFLINE"):
        check_push_request("alice/model", api=api)


# -- a Hub that is busy, and connections that drop


def test_429_waits_as_long_as_the_hub_asks(hub, api, output) -> None:
    hub.fail("POST /api/repos/create", status=429, headers={"Retry-After": "0.3"})
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    first, second = hub.asked("POST /api/repos/create")
    assert 0.3 <= second - first < 3.0


def test_429_with_the_rate_limit_headers_of_the_hub(hub, api, output) -> None:
    hub.fail("POST /api/repos/create", status=429, headers={"RateLimit": '"api";r=0;t=1'})
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    first, second = hub.asked("POST /api/repos/create")
    assert 1.0 <= second - first < 4.0


def test_a_pause_beyond_patience_gives_up_at_once(hub, api, output) -> None:
    hub.fail("POST /api/repos/create", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(PushError, match="after 1 try"):
        push_folder(output, "alice/model", api=api, backoff=QUICK)


@pytest.mark.parametrize(
    ("request_line", "asked"),
    [
        ("GET /api/whoami-v2", 2),
        ("POST /api/repos/create", 2),
        ("POST /api/validate-yaml", 3),  # by LFS a try that succeeds validates the card twice
        (COMMIT, 2),
    ],
)
def test_503_once_on_requests_that_the_client_does_not_retry(hub, api, output, request_line, asked) -> None:
    hub.fail(request_line, status=503)
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert len(hub.asked(request_line)) == asked
    assert commits(hub) == ["initial commit", "Upload model with nlpxfer"]


def test_a_gateway_page_instead_of_an_answer(hub, api, output) -> None:
    hub.fail("POST /api/validate-yaml", status=502, body=b"<html>Bad gateway</html>")
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert len(hub.asked("POST /api/validate-yaml")) == 3
    assert commits(hub) == ["initial commit", "Upload model with nlpxfer"]


def test_a_hub_that_stays_busy_ends_in_an_error(hub, api, output) -> None:
    hub.fail(COMMIT, status=503, times=99)
    with pytest.raises(PushError, match="after 4 tries"):
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert len(hub.asked(COMMIT)) == 4
    assert commits(hub) == ["initial commit"]


@pytest.mark.parametrize("request_line", ["POST /api/repos/create", COMMIT])
@pytest.mark.parametrize("drop", ["before", "after"])
def test_a_dropped_connection_makes_one_commit(hub, api, output, request_line, drop) -> None:
    """After: the Hub did the work and only its answer was lost."""
    hub.fail(request_line, drop=drop)
    pushed = push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert commits(hub) == ["initial commit", "Upload model with nlpxfer"]
    assert pushed.commit == hub.repos["alice/model"].head
    assert len(hub.asked(COMMIT)) == (2 if (request_line, drop) == (COMMIT, "before") else 1)


def test_a_commit_of_somebody_else_in_between(hub, api, output, monkeypatch) -> None:
    api.create_repo("alice/model", private=True)
    upload = api.upload_folder
    others = iter([b"theirs"])

    def upload_after_another(**arguments):
        for content in others:
            api.upload_file(path_or_fileobj=content, path_in_repo="NOTES.md", repo_id="alice/model")
        return upload(**arguments)

    monkeypatch.setattr(api, "upload_folder", upload_after_another)
    push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert remote(hub)["NOTES.md"] == b"theirs"
    assert sorted(remote(hub)) == sorted([".gitattributes", "NOTES.md", *SENT])
    assert len(commits(hub)) == 3


def test_a_card_that_the_hub_refuses(hub, api, output) -> None:
    body = b'{"errors": [{"message": "license must be one of ..."}], "warnings": []}'
    hub.fail("POST /api/validate-yaml", status=400, body=body)
    with pytest.raises(PushError, match="license must be one of"):
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert len(hub.asked("POST /api/validate-yaml")) == 1


def test_an_answer_that_repeats_the_token_is_blacked_out(hub, api, output, caplog) -> None:
    hub.fail("POST /api/repos/create", times=99, status=503, body=json.dumps({"error": f"odd {TOKEN}"}).encode())
    with pytest.raises(PushError, match=r"odd hf_\*\*\*") as refused:
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    assert TOKEN not in str(refused.value)
    assert "odd hf_***" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_found_by_reading_back(hub, api, output, name) -> None:
    hub.damage(name)
    with pytest.raises(PushError, match="does not hold what was sent") as refused:
        push_folder(output, "alice/model", api=api, backoff=QUICK)
    kind = "sha256" if name == "model.safetensors" else "git id"
    assert f"{name} has {kind}" in str(refused.value)
    hub.damaged.clear()
    assert push_folder(output, "alice/model", api=api, backoff=QUICK).commit == hub.repos["alice/model"].head
    assert remote(hub)[name] == (output / name).read_bytes()


# -- by Xet, which is what the client uses where hf_xet is installed


@pytest.mark.parametrize("drop", ["", "after"])
def test_xet(monkeypatch, output, tmp_path, drop) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    store = tmp_path / "chunks"
    store.mkdir()
    with HubServer({TOKEN: "alice"}, chunk_store=store) as hub:
        if drop:
            hub.fail(COMMIT, drop=drop)
        pushed = push_folder(output, "alice/model", api=HfApi(endpoint=hub.url, token=TOKEN), backoff=QUICK)
        assert commits(hub) == ["initial commit", "Upload model with nlpxfer"]
        assert pushed.commit == hub.repos["alice/model"].head
        assert "model.safetensors" in pushed.files
        assert sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) > 1000
        close_session()
