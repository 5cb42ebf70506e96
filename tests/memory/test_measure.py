"""The command: another process needs the predicted memory; the advice is right and in order."""

import json
import re
import sys
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.toy import ASSETS
from nanovlm.memory.__main__ import main
from nanovlm.training.presets import load_settings
from nanovlm.training.settings import to_toml

TINY = ("--preset", "tiny", "--stage", "2")
SLOW = pytest.mark.slow


def answer(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["memory", *flags])
    main()
    return capsys.readouterr().out


# Other kinds than the assets: the language model of `svlm` with its projector, the vision encoder
# of SmolVLM with tiles, and that of Qwen-VL with its resampler before the first Qwen.
SCRATCH = {
    "model_type": "nanovlm_language_model",
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "norm": "layer",
    "mlp": "gelu",
    "mlp_bias": True,
    "output_bias": True,
    "positions": "learned",
    "max_position_embeddings": 1024,
    "dropout": 0.1,
    "num_experts": 4,
    "experts_per_token": 2,
    "num_shared_experts": 1,
    "balance_loss": 0.01,
    "embedding_size": 1024,
    "reducer_size": 128,
    "tie_word_embeddings": False,
}
TILED = {
    "model_type": "smolvlm_vision",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "patch_size": 16,
    "image_size": 256,
}
TILER = {
    "image_processor_type": "SmolVLMImageProcessor",
    "size": {"longest_edge": 512},
    "max_image_size": {"longest_edge": 256},
}
QWEN_VL = {
    "model_type": "qwen_vl_vision",
    "image_size": 448,
    "patch_size": 14,
    "width": 256,
    "layers": 4,
    "heads": 4,
    "mlp_ratio": 4,
    "output_dim": 512,
    "n_queries": 64,
}
VIT = {"image_processor_type": "ViTImageProcessor", "size": 448}
QWEN = {
    "model_type": "qwen",
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "seq_length": 2048,
    "max_position_embeddings": 2048,
    "no_bias": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def compared(command, *flags: str | Path) -> tuple[str, float, float]:
    """The command on a CPU: what it prints, and the GB it predicts and measures."""
    process = command("-m", "nanovlm.memory", *flags, "--device", "cpu")
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()
    pattern = r"predicted ([\d.]+) GB, measured ([\d.]+) GB"
    predicted, measured = re.search(pattern, out.decode()).groups()
    return out.decode(), float(predicted), float(measured)


def published(folder: Path, config: dict, processor: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    ("width", "layers", "vocabulary", "flags"),
    [
        # By what takes most of the memory; with the weights go their moments.
        pytest.param(192, 6, 8000, "--batch-size 16", id="activations"),
        pytest.param(448, 6, 16000, "--batch-size 2", id="weights", marks=SLOW),
        pytest.param(
            320, 6, 8000, "--batch-size 8 --checkpointing", id="checkpointing", marks=SLOW
        ),
    ],
)
def test_the_prediction_is_within_ten_percent_of_the_resident_memory(
    command, tmp_path: Path, width: int, layers: int, vocabulary: int, flags: str
):
    qwen3 = {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    language_model = published(tmp_path / "qwen3", qwen3)
    parts = "--vision-encoder", ASSETS / "tiny-vision-encoder", "--language-model", language_model
    _, predicted, measured = compared(
        command, *TINY, *parts, "--tokens", "128", "--measure", *flags.split()
    )
    assert measured > 0.5 and predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "processor", "language_model", "flags"),
    [
        pytest.param(
            None,
            None,
            SCRATCH,
            "--projector resampler --bidirectional-images --dtype float32 --batch-size 16 "
            "--tokens 160",
            # In bf16 oneDNN keeps code for each number of tokens that an expert was given, up to
            # 0.1 GB of it.
            id="experts, reducer, resampler",
        ),
        pytest.param(
            None,
            None,
            SCRATCH,
            "--projector resampler --language-model-layers 1 --language-model-embedding "
            "--dtype float32 --batch-size 16 --tokens 160 --checkpointing",
            id="top block",
        ),
        pytest.param(
            TILED,
            TILER,
            LLAMA,
            "--projector pixel_shuffle --scale 4 --no-projector-bias --batch-size 3 --tokens 160 "
            "--train projector,vision_encoder",
            id="tiles",
        ),
        pytest.param(
            QWEN_VL,
            VIT,
            QWEN,
            "--vision-norm --batch-size 4 --tokens 192",
            id="encoder's resampler, Qwen",
        ),
        pytest.param(
            QWEN_VL,
            VIT,
            QWEN,
            "--vision-norm --batch-size 4 --tokens 192 --train projector,vision_encoder",
            id="encoder's resampler trainable",
        ),
        pytest.param(None, None, LLAMA, "--objective dpo --batch-size 16 --tokens 160", id="pairs"),
        pytest.param(None, None, LLAMA, "--objective words --train projector", id="words"),
    ],
)
def test_and_with_every_other_kind_of_part(
    command,
    tmp_path: Path,
    encoder: dict | None,
    processor: dict | None,
    language_model: dict,
    flags: str,
):
    folder = ASSETS / "tiny-vision-encoder"
    if encoder:
        folder = published(tmp_path / "encoder", encoder, processor)
    text = published(tmp_path / "language_model", language_model)
    parts = "--vision-encoder", folder, "--language-model", text, "--no-cache-features"
    _, predicted, measured = compared(
        command, *TINY, *parts, "--dtype", "auto", "--measure", *flags.split()
    )
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_forward_pass_at_full_size(command):
    flags = "--preset", "tiny", "--language-model", "decoder-0.1b"
    out, predicted, measured = compared(command, *flags, "--forward")
    assert "parameters: vision encoder" in out and "visual tokens" in out
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "mary",
            [
                "language model qwen2.5-0.5b  +494.0M  +— +494.0M +494.0M",
                "dpo trainable",
                "384×384 takes 169 visual",
                "dpo: training projector,language_model; 2 rows of 265 tokens",
                "dpo: .* 2 rows of 265 tokens, each with a pair of answers, 2 images of 384×384",
            ],
        ),
        (
            "svlm",
            [
                "a token uses 402.0M of the language model: 2 of 4 experts, and 1 shared",
                "projector resampler +27.0M +27.0M +27.0M",
            ],
        ),
        (
            "smolvlm-qwen3",
            [
                "up to 1088 visual tokens .17 tiles of 64, the whole image included.",
                "4:3 832 .3×4 tiles",
                "total +695.1M +12.6M +99.0M +695.1M",
                "stage3: training projector,vision_encoder,language_model",
            ],
        ),
    ],
)
def test_a_table_of_a_presets_parts_and_what_is_trainable_in_each_stage(
    monkeypatch, capsys, preset: str, expected: list[str]
):
    text = answer(monkeypatch, capsys, "--preset", preset, "--gpu", "80")
    for line in expected:
        assert re.search(line, text), f"{line} in\n{text}"


def test_a_later_stage_has_the_shapes_that_the_first_one_left(monkeypatch, capsys):
    assert "language model svlm " in answer(
        monkeypatch, capsys, "--preset", "svlm", "--stage", "2", "--gpu", "80"
    )
    text = answer(
        monkeypatch,
        capsys,
        "--preset",
        "svlm",
        "--stage",
        "stage2",
        "--gpu",
        "80",
        "--vision-encoder",
        "dinov2-large",
    )
    assert (
        "language model svlm " in text
        and "vision encoder dinov2-large " in text
        and "takes 32 visual tokens" in text
    )


def test_other_parts_than_those_of_an_older_run_keep_the_recipes_shapes(
    monkeypatch, capsys, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--preset",
        "zero-qwen-vl",
        "--stage",
        "2",
        "--gpu",
        "80",
        "--language-model",
        "qwen2.5-1.5b",
    )
    before = answer(monkeypatch, capsys, *flags)
    (tmp_path / "runs/zero-qwen-vl-stage1/model").mkdir(parents=True)
    (tmp_path / "runs/zero-qwen-vl-stage1/model/config.json").write_text(
        "{}"
    )  # of a run with the first language model
    assert answer(monkeypatch, capsys, *flags) == before and "takes 256 visual tokens" in before


def test_a_runs_own_settings_are_one_stage(monkeypatch, capsys, tmp_path: Path):
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(load_settings("stage1", [])))
    assert re.findall(
        r"^(\w+): training", answer(monkeypatch, capsys, "--config", str(path)), re.MULTILINE
    ) == ["run"]


def test_no_adapters_on_a_language_model_from_scratch(monkeypatch, capsys):
    text = answer(monkeypatch, capsys, "--preset", "svlm", "--stage", "2", "--gpu", "8")
    assert (
        re.search(r"--optimizer adamw8bit .*first that fits", text) and "--lora-rank" not in text
    ), text


@pytest.mark.slow
def test_adapters_of_a_lower_rank_are_the_last_resort(monkeypatch, capsys):
    text = answer(monkeypatch, capsys, "--preset", "basic-vlm", "--stage", "2", "--gpu", "8")
    assert re.search(r"\n  --lora-rank 32 .*first that fits", text), text


def test_advice_in_order_of_cost_and_the_first_that_fits_is_marked(monkeypatch, capsys):
    text = answer(monkeypatch, capsys, *TINY, "--gpu", "0.7", "--tokens", "512")
    advised = re.findall(r"  (--\S+).* ([\d.]+) GB(.*)", text)
    order = [
        "--dtype",
        "--checkpointing",
        "--batch-size",
        "--optimizer",
        "--stochastic-rounding",
        "--lora-rank",
        "--quantize",
    ]
    assert advised[-1][0] == "--lora-rank"  # lower ones, as the last resort
    while advised[-1][0] == "--lora-rank":
        advised.pop()
    assert [order.index(flag) for flag, _, _ in advised] == sorted(
        order.index(flag) for flag, _, _ in advised
    )
    peaks = [float(peak) for _, peak, _ in advised]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) > 2
    first = next(index for index, peak in enumerate(peaks) if 1.05 * peak + 0.6 <= 0.7 * 1.0732)
    assert [bool(mark) for _, _, mark in advised] == [index == first for index in range(len(peaks))]
    assert "fits a GPU of 8 GB" in answer(monkeypatch, capsys, *TINY, "--gpu", "8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", "8"), "--gpus"),
        (("--gpu", "-1"), "--gpu is -1"),
        (("--tokens", "10"), "raise --tokens"),
        (("--preset", "none"), "presets are"),
        (("--preset", "mary", "--stage", "dpp"), "stages are stage1, stage2, dpo"),
        (("--forward", "--gpu", "8"), "leave --gpu"),
        (("--vision-encoder", "nowhere"), "--vision-encoder nowhere"),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags: tuple[str, ...], message: str):
    with pytest.raises(NanoVLMError, match=message) as caught:
        answer(monkeypatch, capsys, *flags)
    assert "\n" not in str(caught.value)
