"""The command: its prediction is what a process of its own then needs, and its advice is right and in order."""

import json
import re
import sys
from pathlib import Path

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.memory.__main__ import main
from nanovlm.training.settings import ASSETS

TINY = ("--preset", "tiny", "--stage", "2")


def answer(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["memory", *flags])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("width", "layers", "vocabulary", "flags"), [
    pytest.param(192, 6, 8000, ["--batch-size", "16"], id="activations"),  # mostly what is kept for the backward pass
    pytest.param(448, 6, 16000, ["--batch-size", "2"], id="weights", marks=pytest.mark.slow),  # and their moments
    pytest.param(320, 6, 8000, ["--batch-size", "8", "--checkpointing"], id="checkpointing", marks=pytest.mark.slow),
])
def test_the_prediction_is_within_ten_percent_of_the_resident_memory(
        command, tmp_path: Path, width: int, layers: int, vocabulary: int, flags: list[str]):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": vocabulary,
        "max_position_embeddings": 1024, "tie_word_embeddings": True}))
    process = command("-m", "nanovlm.memory", *TINY, "--vision", ASSETS / "tiny-vision", "--text", tmp_path,
                      "--device", "cpu", "--tokens", "128", "--measure", *flags)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()
    predicted, measured = map(float, re.search(r"predicted ([\d.]+) GB, measured ([\d.]+) GB", out.decode()).groups())
    assert measured > 0.5 and predicted == pytest.approx(measured, rel=0.1)


def test_advice_in_order_of_cost_and_the_first_that_fits_is_marked(monkeypatch, capsys):
    text = answer(monkeypatch, capsys, *TINY, "--gpu", "0.1", "--tokens", "512")
    advised = re.findall(r"  (--\S+).* ([\d.]+) GB(.*)", text)
    order = ["--dtype", "--checkpointing", "--batch-size", "--optimizer", "--stochastic-rounding", "--lora-rank",
             "--quantize"]
    assert [order.index(flag) for flag, _, _ in advised] == sorted(order.index(flag) for flag, _, _ in advised)
    peaks = [float(peak) for _, peak, _ in advised]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) > 2
    first = next(index for index, peak in enumerate(peaks) if peak <= 0.1)
    assert [bool(mark) for _, _, mark in advised] == [index == first for index in range(len(peaks))]
    assert "fits 8 GB" in answer(monkeypatch, capsys, *TINY, "--gpu", "8")


@pytest.mark.parametrize(("flags", "message"), [
    (("--gpus", "8"), "--gpus"), (("--gpu", "-1"), "--gpu is -1"), (("--tokens", "10"), "raise --tokens"),
    (("--preset", "none"), "presets are"), (("--vision", "nowhere"), "--vision nowhere")])
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags: tuple[str, ...], message: str):
    with pytest.raises(NanoVLMError, match=message) as caught:
        answer(monkeypatch, capsys, *flags)
    assert "\n" not in str(caught.value)
