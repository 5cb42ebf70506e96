"""What went wrong in the projects that the presets come from, tried on all five of them at toy widths."""

import dataclasses
import json
import math
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.runs import metrics

from nanovlm.chat import IGNORED, Message
from nanovlm.data.batches import Row, collate
from nanovlm.data.dataset import Batches
from nanovlm.data.records import read_records
from nanovlm.evaluation import answers
from nanovlm.evaluation.answers import answer_records
from nanovlm.files import read_json
from nanovlm.generate import decode
from nanovlm.image import image_pixels, open_image
from nanovlm.training.building import build_model, set_up
from nanovlm.training.lora import load_adapter
from nanovlm.training.run import run_stage
from nanovlm.training.settings import PRESETS, Settings, load_settings
from nanovlm.vlm import Batch, VisionLanguageModel

FIVE = ("svlm", "smolvlm-qwen3", "mary", "basic-vlm", "zero-qwen-vl")


@dataclass
class Toy:
    """A preset at toy widths: its settings of stage 1 on a small world, and its model."""

    name: str
    settings: Settings
    model: VisionLanguageModel
    data: Path

    def stage(self, name: str, out: Path, **changes) -> Settings:
        """The settings of a stage for a few steps into `out`."""
        settings = load_settings(name, ["--preset", self.name, "--tiny", "--data", str(self.data / "train.jsonl")])
        return dataclasses.replace(settings, **{
            "val": "", "val_samples": 4, "out": str(out), "batch_size": 4, "max_steps": 4, "log_every": 1, "device": "cpu",
            "init": settings.init and str(out.parent / "model"), **changes})

    def pixels(self, number: int) -> torch.Tensor:
        """The pictures that the eyes see of one of the world's images."""
        return image_pixels(self.image(number), self.model.config.image)

    def image(self, number: int) -> Image.Image:
        return open_image(sorted((self.data / "images" / "train").glob("*.png"))[number])

    def batch(self, question: str = "描述图片", answer: str = "一个圆。", images: int = 1, first: int = 0) -> Batch:
        """One sample about `images` images, as a run makes it."""
        messages = [Message.parse("user", "<image>" * images + question), Message.parse("assistant", answer)]
        shown = [self.image(first + number) for number in range(images)]
        encoded = self.model.chat.encode(messages, [self.model.image_tokens(*image.size) for image in shown])
        batch = collate([Row.of(encoded)], self.model.chat.image_token_id)
        batch.pixels = torch.cat([image_pixels(image, self.model.config.image) for image in shown])
        return batch

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> torch.Tensor:
        return self.model.decoder.hidden_states(self.model.embed(batch), batch.attention_mask,
                                                groups=self.model.image_groups(batch))[0]


@pytest.fixture(scope="module", params=FIVE)
def toy(request, tiny) -> Toy:
    settings = load_settings("stage1", ["--preset", request.param, "--tiny"])
    torch.manual_seed(0)
    return Toy(request.param, settings, build_model(settings), tiny.data)


def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    return [not torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after)]


def test_text_is_causal_and_images_are_what_the_preset_says(toy: Toy):
    batch = toy.batch()
    first, last = int(batch.image_positions[0]), int(batch.image_positions[-1])
    before = toy.hidden_states(batch)
    later = len(before) - 2
    batch.input_ids[0, later] = (batch.input_ids[0, later] + 1) % 50
    moved = changed(before, toy.hidden_states(batch))
    assert not any(moved[:later]) and moved[later]

    batch = toy.batch()
    patches = toy.model.look(batch.pixels)
    batch.pixels, batch.patches = None, patches
    before = toy.hidden_states(batch)
    with torch.no_grad():
        visual_tokens = toy.model.projector(patches)
    # Of the visual tokens alone the last one is changed, behind the projector, which may mix them.
    toy.model.projector.register_forward_hook(hook := _ChangeLast())
    moved = changed(before, toy.hidden_states(batch))
    hook.off = True
    assert visual_tokens.shape[1] == toy.model.image_length and moved[last] and all(moved[last:])
    assert any(moved[first:last]) == toy.model.config.bidirectional_images
    assert not any(moved[:first])


class _ChangeLast:
    off = False

    def __call__(self, module, inputs, output):
        if not self.off:
            output = output.clone()
            output[-1, -1] += 1
        return output


def test_another_image_gives_other_logits(toy: Toy):
    one, other = toy.batch(), toy.batch(first=3)
    other.input_ids = one.input_ids
    assert changed(toy.hidden_states(one), toy.hidden_states(other))[-1]


@pytest.mark.parametrize("images", [1, 2])
def test_as_many_placeholders_as_features(toy: Toy, images: int, monkeypatch):
    batch = toy.batch(images=images)
    with torch.no_grad():
        features = toy.model.projector(toy.model.look(batch.pixels))
    assert len(batch.image_positions) == features.shape[:2].numel() > 0
    # The same in the prompt of an evaluation, which is the one that infer.py writes.
    prompts = []
    monkeypatch.setattr(answers, "generate", lambda model, batch, *rest: prompts.append(batch) or [[]])
    records = _records(toy, images)
    list(answer_records(toy.model, records))
    assert len(prompts[0].image_positions) == features.shape[:2].numel()
    # Same bytes in training and in evaluation, up to where the answer begins.
    assert torch.equal(prompts[0].pixels, _loaded(toy, records).pixels)
    asked, learned = prompts[0].input_ids[0].tolist(), _loaded(toy, records).input_ids[0].tolist()
    assert learned[:len(asked)] == asked


def _records(toy: Toy, images: int, turns: int = 1) -> list:
    """A record about the first images, of several turns."""
    names = [str(path.relative_to(toy.data)) for path in sorted((toy.data / "images" / "train").glob("*.png"))[:images]]
    messages = []
    for turn in range(turns):
        messages += [{"role": "user", "content": ("<image>" * images if turn == 0 else "") + f"第{turn}问"},
                     {"role": "assistant", "content": f"答{turn}"}]
    path = toy.data / "own.jsonl"
    path.write_text(json.dumps({"images": names, "messages": messages}, ensure_ascii=False))
    return read_records(path)[0]


def _batches(toy: Toy, records: list) -> Batches:
    return Batches(records, toy.model.chat, toy.model.config.image, toy.model.image_length, batch_size=len(records), share=1,
                   max_length=1024, seed=0, shuffle=False)


def _loaded(toy: Toy, records: list) -> Batch:
    return _batches(toy, records)[0].batch


def test_every_answer_and_its_end_of_turn_is_learned(toy: Toy):
    batch = _loaded(toy, _records(toy, images=1, turns=3))
    chat, tokenizer = toy.model.chat, toy.model.tokenizer
    expected = []
    for turn in range(3):
        expected += [*tokenizer.encode(f"答{turn}"), chat.end_of_turn_id]
    assert batch.targets.tolist() == expected
    assert batch.input_ids[0, batch.target_positions + 1].tolist() == expected
    assert len(batch.target_positions) < batch.input_ids.numel() - len(batch.image_positions)


def test_labels_do_not_depend_on_what_the_words_say(toy: Toy):
    """Searching the text for the answer, or for the assistant's header, would find these in the question."""
    answer = "一个圆。"
    frames = ("ASSISTANT: ", "<|im_start|>assistant\n", "<|im_end|>\n", "</s>")
    batch = toy.batch(question="".join(f"{frame}{answer}" for frame in frames), answer=answer)
    tokens = toy.model.tokenizer.encode(answer)
    assert batch.targets.tolist() == [*tokens, toy.model.chat.end_of_turn_id]
    assert batch.target_positions.tolist() == list(range(int(batch.target_positions[0]),
                                                         int(batch.target_positions[0]) + len(tokens) + 1))


def test_a_missing_image_is_counted_and_not_faked(toy: Toy):
    record = dataclasses.replace(_records(toy, images=1)[0], images=(toy.data / "images" / "gone.png",))
    loaded = _batches(toy, [record])[0]
    assert loaded.batch is None and len(loaded.skipped) == 1 and "gone.png" in loaded.skipped[0]


def test_cached_and_uncached_generation_agree(toy: Toy):
    batch = toy.batch()
    with torch.no_grad():
        embeddings = toy.model.embed(batch)
    options = dict(max_new_tokens=12, stop_ids={-1}, groups=toy.model.image_groups(batch))
    cached, uncached = (
        list(decode(toy.model.decoder, embeddings, batch.input_ids, None, use_cache=use_cache, **options))
        for use_cache in (True, False))
    assert cached == uncached and len(cached) == 12


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_only_what_the_stage_names_moves(toy: Toy, stage: str):
    if stage not in stages_of(toy.name):
        pytest.skip(f"{toy.name} has no {stage}")
    settings = toy.stage(stage, Path("unused"))
    torch.manual_seed(0)
    model = build_model(toy.settings)
    set_up(model, settings, torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=10.0)
    for number in range(4):  # of a choice of experts, each token moves a few
        model(toy.batch(first=number)).backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    parts = {name.split(".")[0] for name in moved}
    named = {"text": "decoder"}
    assert parts == {named.get(part, part) for part in settings.trained_parts}
    if settings.lora_rank:
        assert all(name.endswith(("lora_A", "lora_B")) for name in moved if name.startswith("decoder."))
    if settings.text_layers:
        blocks = {int(name.split(".")[2]) for name in moved if name.startswith("decoder.blocks.")}
        assert blocks == set(range(len(model.decoder.blocks))[-settings.text_layers:])


def stages_of(preset: str) -> list[str]:
    return list(tomllib.loads((PRESETS / f"{preset}.toml").read_text(encoding="utf-8")))


def test_a_resumed_run_goes_on_to_the_same_losses(toy: Toy, tmp_path: Path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_stage(toy.stage("stage1", whole))
    run_stage(toy.stage("stage1", halves, save_every=2))
    for path in (halves / "model", halves / "checkpoints" / "step_4"):
        shutil.rmtree(path)
    run_stage(toy.stage("stage1", halves, save_every=2, resume=True))
    assert metrics(whole) == metrics(halves) and len(metrics(whole)) == 4
    assert all(math.isfinite(line["loss"]) for line in metrics(whole))


def test_saved_adapters_hold_the_projector(toy: Toy, tmp_path: Path):
    toy.model.save_pretrained(tmp_path / "model")
    run_stage(toy.stage("stage2", tmp_path / "run", lora_rank=2, text_layers=0, text_embedding=False, train="projector,text"))
    adapted = VisionLanguageModel.from_pretrained(tmp_path / "model")
    load_adapter(adapted, tmp_path / "run" / "adapter")
    trained = VisionLanguageModel.from_pretrained(tmp_path / "run" / "model")
    for name, parameter in trained.projector.named_parameters():
        assert torch.equal(parameter, adapted.projector.get_parameter(name))
        assert not torch.equal(parameter, toy.model.projector.get_parameter(name))
    assert read_json(tmp_path / "run" / "adapter" / "adapter.json")["rank"] == 2


def test_trained_asked_and_the_same_after_loading(toy: Toy, tmp_path: Path):
    """Stage 1, stage 2 from its model, a question: what the commands do."""
    run_stage(toy.stage("stage1", tmp_path / "one"))
    os.rename(tmp_path / "one" / "model", tmp_path / "model")
    run_stage(toy.stage("stage2", tmp_path / "two"))
    losses = [line["loss"] for line in metrics(tmp_path / "two")]
    assert all(math.isfinite(loss) for loss in losses)
    model = VisionLanguageModel.from_pretrained(tmp_path / "two" / "model")
    assert model.config == toy.model.config
    said = list(answer_records(model, read_records(toy.data / "val.jsonl")[0][:3], max_new_tokens=4))
    assert len(said) == 3
    assert IGNORED not in [token for text in said for token in model.tokenizer.encode(text)]
