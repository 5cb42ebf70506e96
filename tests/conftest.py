"""Tiny models with random weights in the published layouts, a few scenes, and running commands."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from data_tools.make_scenes import make_scenes
from nanovlm.hub import shapes
from nanovlm.hub.image_configs import parse_image_config
from nanovlm.hub.language_configs import parse_language_model_config
from nanovlm.hub.models import join_parts, save_model
from nanovlm.hub.names import DINOV2, QWEN, invert, translate
from nanovlm.hub.safetensors import save_file
from nanovlm.hub.vision_configs import parse_vision_encoder_config
from nanovlm.model.language_model import LanguageModel
from nanovlm.model.projector import ProjectorConfig
from nanovlm.model.vision_encoder import VisionEncoder
from nanovlm.tokenizer import SentencePieceTokenizer
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from nanovlm.utils.console import run_command

torch.set_num_threads(1)  # the tests' tensors are too small to share
# A shell lets what it starts in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).parents[1]
SPECIAL = ["<image>", "<system>", "<user>", "<assistant>"]
VISION_CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
IMAGE_CONFIG = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
LANGUAGE_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class TinyWorld:
    """Folders that the tests read and never write to. All weights are random."""

    vision_encoder: Path  # DINOv2's layout
    language_model: Path  # Qwen3's layout, with a SentencePiece tokenizer
    model: Path  # both joined by a projector: a model folder
    data: Path  # a dozen scenes: train.jsonl, val.jsonl and novel.jsonl

    def settings(self, out: Path, **changes) -> Settings:
        """Settings of a short run on the CPU: four steps of the projector, four records each."""
        settings: dict[str, Any] = {
            "data": str(self.data / "train.jsonl"),
            "val": str(self.data / "val.jsonl"),
            "val_samples": 4,
            "out": str(out),
            "batch_size": 4,
            "max_steps": 4,
            "log_every": 1,
            "device": "cpu",
            "dtype": "float32",
        }
        if "init" not in changes:
            settings["vision_encoder"] = str(self.vision_encoder)
            settings["language_model"] = str(self.language_model)
        return Settings(**settings | changes)

    def train(self, out: Path, **changes) -> Path:
        """Run a stage to its end and return the run folder."""
        run_stage(self.settings(out, **changes))
        return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyWorld:
    folder = tmp_path_factory.mktemp("tiny")
    data = make_scenes(folder / "scenes", scenes=12, eval_scenes=4, workers=1)
    tokenizer = _tokenizer((data / "train.jsonl").read_text().splitlines())
    vision_folder, language_folder = folder / "vision_encoder", folder / "language_model"
    torch.manual_seed(0)
    vision_encoder = VisionEncoder(parse_vision_encoder_config(VISION_CONFIG))
    _save_hub(vision_encoder, vision_folder, DINOV2, VISION_CONFIG)
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_CONFIG))
    language_config = {**LANGUAGE_CONFIG, "vocab_size": tokenizer.vocab_size}
    language_model = LanguageModel(parse_language_model_config(language_config))
    _save_hub(language_model, language_folder, QWEN, language_config)
    tokenizer.save(language_folder)
    image = parse_image_config(IMAGE_CONFIG)
    model = join_parts(vision_folder, language_folder, ProjectorConfig("mlp"), image)
    save_model(model, folder / "model")
    return TinyWorld(vision_folder, language_folder, folder / "model", data)


@pytest.fixture(autouse=True, scope="session")
def no_fetched_weights():
    """Presets take no weights that `data_tools.download` has left in this clone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "WEIGHTS", REPOSITORY / "weights-of-no-test")
        yield


@pytest.fixture
def any_algorithms(monkeypatch):
    """Undoes, after a test, what `--deterministic` sets."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command's `main` in this process, which is faster: `call(main, *arguments)`."""

    def completed(
        main: Callable[[], int | None], *arguments, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command(main)
        return subprocess.CompletedProcess(sys.argv, caught.value.code, *capsys.readouterr())

    return completed


@pytest.fixture
def command():
    """Start a command in a process of its own: `command("infer.py", …)` or `("-m", …)`."""

    def start(script: str, *arguments, cwd: Path = REPOSITORY, **options) -> subprocess.Popen:
        script = script if script == "-m" else str(REPOSITORY / script)
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            **pipes | options,
        )

    return start


def _save_hub(model: torch.nn.Module, folder: Path, names: dict, config: dict) -> None:
    """Save a model as the hub publishes it; `names` is its table of tensor names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    published = translate(invert(names))
    tensors = {published(name): tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def _tokenizer(lines: list[str]) -> SentencePieceTokenizer:
    texts = (message["content"] for line in lines for message in json.loads(line)["messages"])
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        num_threads=1,
        control_symbols=SPECIAL,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return SentencePieceTokenizer(model.getvalue())
