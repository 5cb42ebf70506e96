"""`python -m data_tools.download` against a hub on 127.0.0.1, whole and with faults."""

import ast
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from modelscope_hub import _download as modelscope_download

import infer
from data_tools import download, extract_vision, hub_clients
from data_tools.hubs import next_commands, read_table
from nanovlm.errors import NanoVLMError
from nanovlm.hub import shapes
from nanovlm.hub.config_json import explain_folder
from nanovlm.hub.models import load_model, load_vision_encoder
from nanovlm.training.building import build_model
from nanovlm.training.presets import FIELDS, PRESETS, load_settings, read_tables
from tests.data_tools.hub_server import HubServer, running_hub
from tests.data_tools.test_extract_vision import qwen_vl
from tests.reference import hub_folders
from tests.reference.published import smolvlm_folder

REPOSITORY = Path(__file__).parents[2]
SMOLVLM = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
FOLDER = Path("weights/smolvlm2-256m")
FILES = {"config.json": b'{"model_type": "smolvlm"}', "merges.txt": b"#version: 0.2\n",
         "model.safetensors": bytes(range(256)) * 4000, "tokenizer.json": b"{}"}  # fmt: skip
UNWANTED = ("README.md", ".gitattributes", "onnx/config.json", "onnx/model.onnx", "modeling.py")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[HubServer]:
    """A hub with a SmolVLM2 of a few files, reached from an empty current folder without a wait."""
    with running_hub() as server:
        folder = tmp_path / "published"
        for name in (*FILES, *UNWANTED):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(FILES.get(name, b"not needed"))
        server.repositories[SMOLVLM] = folder
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, server.url)
        for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.setenv(name, "hf_secret")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(shapes, "WEIGHTS", Path("weights"))
        monkeypatch.setenv("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "0")
        monkeypatch.setattr(hub_clients, "CHUNK", 50_000)
        monkeypatch.setattr(hub_clients, "MIRROR", server.url)
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setattr(modelscope_download, "DOWNLOAD_RETRY_TIMES", 0)
        monkeypatch.setattr(modelscope_download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
        monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        yield server


@pytest.fixture
def run(call) -> Run:
    """Run the command with these arguments, in this process, and let its threads end."""

    def completed(*arguments) -> subprocess.CompletedProcess[str]:
        done = call(download.main, *arguments)
        for thread in threading.enumerate():
            if thread.name == "fetch":
                thread.join(20)
        return done

    return completed


def fails(done: subprocess.CompletedProcess[str], *messages: str) -> str:
    """The command ended with a one-line error that holds `messages`; its text."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and done.stderr.endswith(errors[0] + "\n")
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in errors[0]
    return errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for the record."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".download.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("source", ["hf", "hf-mirror", "modelscope"])
def test_what_is_needed_is_fetched_once(hub, run, source: str):
    done = run("smolvlm2-256m", "--from", source)
    assert done.returncode == 0 and contents(FOLDER) == FILES
    assert f"{FOLDER}: is complete (1.02 MB in 4 files)\nnext:  python infer.py" in done.stderr
    assert f"--model {FOLDER}\n" in done.stderr
    assert all(SMOLVLM in r.path or r.on_storage for r in hub.requests)  # and nobody else is asked
    hub.requests.clear()
    again = run("smolvlm2-256m", "--from", source)
    assert (
        again.returncode == 0 and "is complete, nothing to do (1.02 MB in 4 files)" in again.stderr
    )
    assert not hub.requests
    (FOLDER / "tokenizer.json").unlink()  # of all others nothing is fetched again
    assert run("smolvlm2-256m", "--from", source).returncode == 0 and contents(FOLDER) == FILES
    assert len(hub.ranges("resolve|FilePath")) == 1


def test_the_token_stays_with_the_hub(hub, run):
    """Also where the hub redirects to another host."""
    assert run("smolvlm2-256m").returncode == 0
    stored = [request for request in hub.requests if request.on_storage]
    assert stored and not any(request.token for request in stored)
    assert any(r.token == "Bearer hf_secret" for r in hub.requests if not r.on_storage)


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_dry_run_writes_nothing(hub, run, source: str):
    done = run("smolvlm2-256m", "--dry-run", "--from", source)
    assert done.returncode == 0 and not list(Path().iterdir())
    lines = done.stdout.splitlines()
    assert f"{hub.url} ({SMOLVLM}), licence: apache-2.0".lower() in lines[0].lower()
    assert "   1.02 MB  weights/smolvlm2-256m/model.safetensors" in lines
    assert lines[-1] == "   1.02 MB  to fetch; nothing was written"
    assert not hub.ranges("resolve|FilePath")


def test_a_cut_connection_goes_on_within_a_run(hub, run):
    hub.fail("model.safetensors/", cut_after=120_000, times=2)
    assert run("smolvlm2-256m").returncode == 0 and contents(FOLDER) == FILES
    assert hub.ranges("model.safetensors/") == ["", "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_cut_connection_goes_on_in_the_next_run(hub, run, source: str):
    pattern = "model.safetensors/" if source == "hf" else "FilePath=model.safetensors"
    hub.fail(pattern, cut_after=120_000, times=1)
    hub.fail(pattern, cut_after=0, times=20)
    done = run("smolvlm2-256m", "--from", source)
    fails(done, "the connection was cut; the same command goes on from there; or try --from ")
    assert "model.safetensors" not in contents(FOLDER)
    assert "interrupted download; download it again" in explain_folder(FOLDER, "no weights")
    hub.faults.clear()
    hub.requests.clear()
    assert run("smolvlm2-256m", "--from", source).returncode == 0 and contents(FOLDER) == FILES
    asked = hub.ranges(pattern)[-1]
    assert asked and 0 < int(asked[6:-1]) <= 120_000
    assert len(hub.ranges("tokenizer.json")) == 0


@pytest.mark.parametrize("source", ["hf", "modelscope"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_wrong_digest_is_never_kept(hub, run, source: str, name: str):
    hub.fail(name, damage=True)  # on the server that has it
    done = run("smolvlm2-256m", "--from", source)
    fails(done, "and was removed; the same command")
    assert name not in contents(FOLDER)
    assert FILES[name][1:] not in {data[1:] for data in contents(FOLDER).values()}
    hub.faults.clear()
    assert run("smolvlm2-256m", "--from", source).returncode == 0 and contents(FOLDER) == FILES


@pytest.mark.parametrize("source", ["hf", "modelscope"])
@pytest.mark.parametrize("where", ["api/", "config.json"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}), "without a valid token (or has no such repository); make one at https://"),
        ((403, {"X-Error-Code": "GatedRepo"}), "open only to those who accept its terms: do so at"),
        ((404, {"X-Error-Code": "EntryNotFound"}), "has no such repository or file (any more)"),
        ((429, {"Retry-After": "7"}), "too many requests from here; wait 7 s, or use a token"),
        ((503, {}), "answers with an error of its own (HTTP 503); try again later"),
    ],
)
def test_a_refusal_is_one_line(hub, run, source: str, where: str, answer: tuple, message: str):
    status, headers = answer
    hub.fail(where, status=status, headers=headers)
    line = fails(run("smolvlm2-256m", "--from", source), message, f"{hub.url} ({SMOLVLM})")
    assert ("--from hf-mirror or --from modelscope" if source == "hf" else "--from hf or") in line
    assert "hf_secret" not in line
    if source == "modelscope" and "token" in message:
        assert "MODELSCOPE_API_TOKEN" in line or status == 429


def test_a_file_that_the_hub_no_longer_has_is_named(hub, run):
    (hub.repositories[SMOLVLM] / "model.safetensors").unlink()
    done = run("smolvlm2-256m")
    assert f"smolvlm2-256m: {hub.url} ({SMOLVLM}) has no model.safetensors (any more)" in (
        done.stderr
    )
    assert "model.safetensors" not in contents(FOLDER)


def test_the_next_commands_are_those_whose_parts_are_there(tmp_path, monkeypatch):
    """A language model that several presets share does not lead to one that lacks its encoder."""
    monkeypatch.chdir(tmp_path)
    stage1 = "python train_stage1.py --preset"
    names = ["siglip-so400m-384", "qwen2.5-0.5b", "llava-cc3m-595k"]
    for name in names[:2]:
        (Path("weights") / name).mkdir(parents=True, exist_ok=True)
    folder = Path("data/llava-cc3m-595k")
    convert = f"python -m data_tools.convert {folder} --out {folder}-records"
    assert next_commands(names, Path()) == [[f"{stage1} mary --data FILE"], [convert]]
    assert next_commands(names[1:2], Path()) == [[f"{stage1} dinov2-qwen2.5 --data FILE"]]
    Path("weights/dinov2-small").mkdir()
    both = [[f"{stage1} {preset} --data FILE"] for preset in ("dinov2-qwen2.5", "mary")]
    assert next_commands(["dinov2-small", *reversed(names[:2])], Path()) == both


def test_what_is_not_on_a_hub_is_said(hub, run):
    fails(
        run("svlm-data", "--from", "modelscope"), "is not on modelscope; take --from hf or --from"
    )
    fails(run("smolvlm"), "'smolvlm': is no name of the table; did you mean smolvlm2-256m?")
    fails(run(SMOLVLM), "did you mean smolvlm2-256m?")
    fails(run("the-cauldron"), "is fetched by subset, such as the-cauldron/aokvqa")
    fails(run("qwen3-0.6b/x"), "has no such subset; take qwen3-0.6b")
    fails(run("coco-train2017"), "is on no hub; fetch it from its own host", "curl -C -")
    fails(run("ai-challenger"), "is on no hub; ", "data_tools.convert data/ai-challenger")
    fails(run(), "no name is given; --list shows the names")
    assert not hub.requests and not list(Path().iterdir())


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_page_in_place_of_an_answer(hub, run, source: str):
    hub.fail("api/", page=True)
    fails(run("smolvlm2-256m", "--from", source), "perhaps the login page of a network")
    hub.faults.clear()
    hub.fail("model.safetensors", page=True)
    fails(run("smolvlm2-256m", "--from", source), "another size than the hub lists")
    hub.faults.clear()
    assert run("smolvlm2-256m", "--from", source).returncode == 0 and contents(FOLDER) == FILES


@pytest.mark.parametrize("source", ["hf", "modelscope"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9", "cannot be reached; is there a network?"),
        ("http://hub.invalid", "no such host is found; is there a network, and does its DNS"),
        ("https://{hub}", "its TLS certificate is not accepted; is the clock right?"),
    ],
)
def test_without_a_way_to_the_hub(hub, run, monkeypatch, source, address, message):
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, address.format(hub=hub.url.partition("//")[2]))
    fails(run("smolvlm2-256m", "--from", source), message, "or try --from hf")


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_proxy_that_is_gone(hub, run, monkeypatch, source: str):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert "proxy" in fails(run("smolvlm2-256m", "--from", source))


def test_a_disk_without_room_is_refused_before_anything_is_written(hub, run, monkeypatch):
    usage = SimpleNamespace(free=100.5e6)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    fails(run("smolvlm2-256m"), "1.02 MB are needed, and 100.50 MB are free; free some room, or n")
    assert not list(Path().iterdir())
    usage.free = 102e6
    assert run("smolvlm2-256m").returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_runs_full_on_the_way(hub, run):
    """/dev/full, which has no room for a single byte, stands in for the file that is written."""
    name, data = "model.safetensors", FILES["model.safetensors"]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    partial = FOLDER / ".incomplete" / hashlib.sha256(f"{name} {digest}".encode()).hexdigest()
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    fails(run("smolvlm2-256m"), "the disk is full; free some room and run the same command")
    assert name not in contents(FOLDER)
    partial.unlink()
    assert run("smolvlm2-256m").returncode == 0 and contents(FOLDER) == FILES


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_what_is_there_and_not_ours_stays(hub, run, source: str):
    FOLDER.mkdir(parents=True)
    (FOLDER / "merges.txt").write_bytes(FILES["merges.txt"])  # the same content is kept
    (FOLDER / "config.json").write_text("mine")
    (FOLDER / "notes.txt").write_text("mine, too")
    fails(run("smolvlm2-256m", "--from", source), "config.json: is there already with another cont")
    assert (FOLDER / "config.json").read_text() == "mine" and len(list(FOLDER.iterdir())) == 3
    (FOLDER / "config.json").unlink()
    assert run("smolvlm2-256m", "--from", source).returncode == 0
    assert contents(FOLDER) == FILES | {"notes.txt": b"mine, too"}
    assert not hub.ranges("merges.txt$")


@pytest.mark.parametrize("source", ["hf", "modelscope"])
@pytest.mark.parametrize(
    "path", ["../evil.json", "/tmp/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json",
             ".incomplete", ".download.json", "evil\n.json"]
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(hub, run, monkeypatch, source, path):
    monkeypatch.setattr(download.Entry, "wants", lambda *_: True)
    hub.listed[SMOLVLM] = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}]
    fails(run("smolvlm2-256m", "--from", source), SMOLVLM, "which is not fetched")
    assert not list(Path().iterdir())


def test_only_the_shards_with_the_vision_encoder(hub, run, call, tmp_path):
    """Which the extraction then opens, though the shard with the text is absent."""
    folder = tmp_path / "qwen-vl"
    folder.mkdir()
    qwen_vl(folder)
    (folder / "pytorch_model-00001-of-00003.bin").write_bytes(b"text")
    (folder / "modeling_qwen.py").write_text("")
    hub.repositories["Qwen/Qwen-VL"] = folder
    dry = run("qwen-vl", "--dry-run")
    assert dry.returncode == 0 and "00002" in dry.stdout and "00001" not in dry.stdout
    assert not list(Path().iterdir())
    done = run("qwen-vl")
    command = "data_tools/extract_vision.py weights/qwen-vl-published --out weights/qwen-vl"
    assert done.returncode == 0 and f"next:  python {command}\n" in done.stderr
    names = {path.name for path in Path("weights/qwen-vl-published").glob("[!.]*")}
    assert names == {
        "config.json",
        "pytorch_model.bin.index.json",
        "pytorch_model-00002-of-00003.bin",
        "pytorch_model-00003-of-00003.bin",
    }
    assert call(extract_vision.main, *command.split()[1:]).returncode == 0
    assert load_vision_encoder("weights/qwen-vl").config.num_hidden_layers == 3


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_data_set_by_subset(hub, run, tmp_path, source: str):
    folder = tmp_path / "cauldron"
    for name in ("ai2d/train-0.parquet", "aokvqa/train-0.parquet", "aokvqa/train-1.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    repository = "HuggingFaceM4/the_cauldron" if source == "hf" else "AI-ModelScope/the_cauldron"
    hub.repositories[repository] = folder
    done = run("the-cauldron/aokvqa", "--from", source, "--to", "a disk")
    there = Path("a disk/data/the-cauldron")
    assert done.returncode == 0 and sorted(p.name for p in (there / "aokvqa").iterdir()) == [
        "train-0.parquet",
        "train-1.parquet",
    ]
    command = f'data_tools.convert "{there}/aokvqa" --out "{there}/aokvqa-records"\n'
    assert command in done.stderr
    assert not (there / "ai2d").exists()
    assert run("the-cauldron/ai2d", "--from", source, "--to", "a disk").returncode == 0
    assert (there / "ai2d/train-0.parquet").read_bytes() == b"ai2d/train-0.parquet"
    fails(run("the-cauldron/nothing", "--from", source), "nothing")
    fails(run("the-cauldron/../x"), "has no such subset")


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(hub, run, command):
    hub.fail("model.safetensors/", seconds_a_byte=0.0005)
    running = command("-m", "data_tools.download", "smolvlm2-256m", cwd=Path.cwd())
    deadline = time.monotonic() + 60
    while not hub.ranges("model.safetensors/"):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 130
    assert errors.decode().splitlines()[-1] == (
        "interrupted; what has arrived is kept, and the same command goes on from there"
    )
    hub.faults.clear()
    assert run("smolvlm2-256m").returncode == 0 and contents(FOLDER) == FILES


def test_without_the_libraries(hub, run, monkeypatch):
    for source, name in (("hf", "huggingface_hub"), ("modelscope", "modelscope_hub")):
        monkeypatch.setitem(sys.modules, name, None)
        command = "`python -m pip install -r requirements-hub.txt`"
        fails(run("smolvlm2-256m", "--from", source), f"{name} is not installed; {command}")


def test_a_damaged_record_is_named(hub, run):
    FOLDER.mkdir(parents=True)
    (FOLDER / ".download.json").write_text('{"complete": true, "files": {"a": 1}}')
    fails(run("smolvlm2-256m"), ".download.json: is damaged; delete it")


# ---------------------------------------------------------------------- names


def test_the_list_shows_every_name(run):
    done = run("--list")
    names = [line.split()[0].removesuffix("/SUBSET") for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0 and names == list(read_table())


@pytest.mark.parametrize("page", ["docs/en/data.md", "docs/zh/data.md"])
def test_the_documentation_shows_the_table(page: str):
    rows = []
    for entry in read_table().values():
        name = f"{entry.name}/SUBSET" if entry.has_subsets else entry.name
        cells = (f"`{name}`", entry.hf, entry.modelscope, f"{entry.gb:g}" if entry.gb else "")
        rows.append(f"| {' | '.join(cell or '—' for cell in cells)} |")
    assert "\n".join(rows) in (REPOSITORY / page).read_text(encoding="utf-8")


def test_every_published_part_is_in_the_table():
    table = read_table()
    published = {name: model.hub for name, model in shapes.VISION_ENCODERS.items()}
    published |= {name: model.hub for name, model in shapes.LANGUAGE_MODELS.items() if model.hub}
    published |= shapes.TOKENIZERS
    for name, repository in published.items():
        assert table[name].hf == repository.split(" (")[0], name
    assert set(shapes.MODELS.values()) < set(table)
    for path in PRESETS.glob("*.toml"):
        for stage in read_tables(path).values():
            for part in ("vision_encoder", "language_model"):
                name = stage.get(part, "") if isinstance(stage, dict) else ""
                assert not name or "/" in name or name in table, f"{path}: {name}"
    assert {"vision_encoder", "language_model"} < set(FIELDS)


def test_the_table_fetches_no_pickles_but_those_that_are_extracted():
    for entry in read_table().values():
        assert entry.kind in ("weights", "data") and entry.licence
        assert bool(entry.by_hand) == (not entry.hubs) == (not entry.files) == (not entry.next)
        assert len(entry.next) <= 2
        extracted = any("extract_vision.py {folder}" in command for command in entry.next)
        assert entry.wants("pytorch_model.bin") <= extracted
        assert not any(entry.wants(f"model{end}") for end in (".pt", ".pkl", ".ckpt", ".onnx"))
        assert not entry.wants("modeling.py")


def test_the_next_commands_name_what_there_is():
    table = read_table()
    for command in (command for entry in table.values() for command in entry.next):
        program, *words = shlex.split(command.split("  (")[0])[:3]
        if program != "python":
            assert program == "tar"
            continue
        path = words[1].replace(".", "/") if words[0] == "-m" else words[0]
        places = (REPOSITORY / path, REPOSITORY / f"{path}.py")
        assert any(place.exists() for place in places), command
        if "data_tools.download" in words:
            assert shlex.split(command)[3] in table
        if preset := re.search(r"--preset (\S+)", command):
            assert (PRESETS / f"{preset[1]}.toml").exists()


def test_the_package_imports_nothing_of_the_data_tools():
    for path in (REPOSITORY / "nanovlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module or ""]
                assert not any(name.startswith("data_tools") for name in modules), path


# ---------------------------------------------------------------------- what is fetched is used


def test_a_preset_uses_what_was_fetched_without_flags(hub, run, tmp_path):
    vision, language = tmp_path / "vision", tmp_path / "language"
    hub_folders.write_smolvlm(vision)
    hub_folders.write_qwen3(language)
    hub.repositories |= {SMOLVLM: vision, "Qwen/Qwen3-0.6B": language}
    arguments = ["--preset", "smolvlm-qwen3", "--scale", "2", "--data", "x.jsonl"]
    with pytest.raises(NanoVLMError) as missing:
        build_model(load_settings("stage1", arguments))
    words = str(missing.value).split("`")[1].split()
    assert words[:3] == ["python", "-m", "data_tools.download"]
    assert run(*words[3:]).returncode == 0
    settings = load_settings("stage1", arguments)
    assert settings.vision_encoder == str(FOLDER)
    assert settings.language_model == str(Path("weights/qwen3-0.6b"))
    model = build_model(settings)
    assert model.config.vision_encoder.hidden_size == 24 and model.config.image.fit == "tiles"


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("SmolVLM2-256M-Instruct", "data_tools.download smolvlm2-256m`, then give weights/smolv"),
        (SMOLVLM, "fetch it with `python -m data_tools.download smolvlm2-256m`, then give "),
        ("llava-hf/llava-1.5-7b-hf", "data_tools.download llava-1.5-7b`, then give weights/llava"),
        ("runs/nothing/model", "check the path; `python -m data_tools.download --list` shows what"),
    ],
)
def test_a_model_by_name_says_how_to_fetch_it(tmp_path, monkeypatch, given: str, advice: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "WEIGHTS", Path("weights"))
    with pytest.raises(NanoVLMError) as caught:
        load_model(given)
    assert str(caught.value).startswith(f"{given}: there is no such folder; ")
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def test_a_fetched_model_is_asked(hub, run, call, tmp_path):
    """By its folder or its name."""
    smolvlm_folder(tmp_path / "smolvlm")
    hub.repositories[SMOLVLM] = tmp_path / "smolvlm"
    assert run("smolvlm2-256m").returncode == 0
    image = REPOSITORY / "nanovlm/assets/scene.png"
    asked = [image, "What is in the image?", "--max-new-tokens", 2, "--device", "cpu", "--model"]
    by_folder, by_name = (call(infer.main, *asked, model) for model in (FOLDER, FOLDER.name))
    assert by_folder.returncode == by_name.returncode == 0
    assert by_folder.stdout == by_name.stdout and by_name.stdout.strip()
