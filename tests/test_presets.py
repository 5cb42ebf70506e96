"""Errors of the projects that the presets come from, tried on all five presets at toy widths."""

import copy
import dataclasses
import json
import math
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from nanovlm.data.batches import Batches, BatchOptions, RecordEncoder
from nanovlm.data.collate import collate
from nanovlm.data.records import read_records
from nanovlm.data.sequences import TokenSequence
from nanovlm.engine.conversation import Conversation
from nanovlm.evaluation import answers
from nanovlm.evaluation.answers import answer_records
from nanovlm.generate import Prompt, decode, generate
from nanovlm.hub.adapters import load_adapter
from nanovlm.hub.models import load_model, save_model
from nanovlm.inputs.batch import Batch
from nanovlm.inputs.chat import Message
from nanovlm.inputs.image import image_pixels, open_image
from nanovlm.model.vlm import VisionLanguageModel
from nanovlm.training.building import build_model, set_up
from nanovlm.training.optim.optimizer import build_optimizer, set_learning_rates
from nanovlm.training.presets import PRESETS, load_settings
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from nanovlm.utils.files import read_json
from tests.runs import metrics

FIVE = ("svlm", "smolvlm-qwen3", "mary", "basic-vlm", "zero-qwen-vl")


@dataclass
class Toy:
    """A preset at toy widths: its settings of stage 1 on a small world, and its model."""

    name: str
    settings: Settings
    model: VisionLanguageModel
    data: Path
    folder: Path  # where `model` and its run of stage 1 are saved

    def stage(self, name: str, out: Path, **changes) -> Settings:
        """The settings of a stage for a few steps into `out`, from the model of `first_stage`."""
        settings = load_settings(
            name, ["--preset", self.name, "--tiny", "--data", str(self.data / "train.jsonl")]
        )
        return dataclasses.replace(
            settings,
            **{
                "val": "",
                "val_fraction": 0.0,
                "out": str(out),
                "batch_size": 4,
                "max_steps": 4,
                "log_every": 1,
                "save_every": 2,
                "device": "cpu",
                "init": settings.init and str(self.folder / "stage1" / "model"),
                **changes,
            },
        )

    def pixels(self, number: int) -> torch.Tensor:
        """The tiles of one of the toy images, as the vision encoder gets them."""
        return image_pixels(self.image(number), self.model.config.image)

    def image(self, number: int) -> Image.Image:
        return open_image(sorted((self.data / "images" / "train").glob("*.png"))[number])

    def batch(
        self, question: str = "描述图片", answer: str = "一个圆。", images: int = 1, first: int = 0
    ) -> Batch:
        """One sample about `images` images, as a run makes it."""
        messages = [
            Message.parse("user", "<image>" * images + question),
            Message.parse("assistant", answer),
        ]
        shown = [self.image(first + number) for number in range(images)]
        encoded = self.model.chat.encode(
            messages, [self.model.image_tokens(*image.size) for image in shown]
        )
        batch = collate([TokenSequence.of(encoded)], self.model.chat.image_token_id)
        batch.pixels = torch.cat([image_pixels(image, self.model.config.image) for image in shown])
        return batch

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> torch.Tensor:
        return self.model.language_model.hidden_states(
            self.model.embed(batch), batch.attention_mask, groups=self.model.image_groups(batch)
        )[0]


@pytest.fixture(scope="module", params=FIVE)
def toy(request, tiny, tmp_path_factory) -> Toy:
    settings = load_settings("stage1", ["--preset", request.param, "--tiny"])
    torch.manual_seed(settings.seed)
    toy = Toy(
        request.param,
        settings,
        build_model(settings),
        tiny.data,
        tmp_path_factory.mktemp(request.param),
    )
    save_model(toy.model, toy.folder / "model")
    return toy


@pytest.fixture(scope="module")
def first_stage(toy: Toy) -> Path:
    """The folder of a run of stage 1, which began as `toy.model`."""
    run_stage(toy.stage("stage1", toy.folder / "stage1"))
    return toy.folder / "stage1"


def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    return [not torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after)]


def test_text_is_causal_and_images_are_what_the_preset_says(toy: Toy):
    batch = toy.batch()
    first, last = int(batch.image_positions[0]), int(batch.image_positions[-1])
    before = toy.hidden_states(batch)
    later = len(before) - 2
    batch.input_ids[0, later] = (batch.input_ids[0, later] + 1) % 50
    after = toy.hidden_states(batch)
    assert changed(before, after) == [False] * later + [True] * (len(before) - later)
    batch.attention_mask = None  # as for the one row that infer.py asks about
    torch.testing.assert_close(toy.hidden_states(batch), after)

    batch = toy.batch()
    patches = toy.model.vision_features(batch.pixels)
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
def test_training_evaluation_and_infer_show_the_model_the_same(toy: Toy, images: int, monkeypatch):
    """As many placeholders as features, the same tokens around them, the same bytes of pixels."""
    records = _records(toy, images)
    training_batch = _loaded(toy, records)
    with torch.no_grad():
        features = toy.model.projector(toy.model.vision_features(training_batch.pixels))
    assert len(training_batch.image_positions) == features.shape[:2].numel() > 0

    asked: list[Batch] = []
    monkeypatch.setattr(
        answers, "generate", lambda model, batch, *rest: asked.append(batch) or [[]]
    )
    monkeypatch.setattr(
        Conversation, "generate", lambda conversation, batch, *rest: asked.append(batch) or []
    )
    list(answer_records(toy.model, records))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "infer.py",
            *map(str, records[0].images),
            "第0问",
            "--model",
            str(toy.folder / "model"),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ],
    )
    infer.main()
    assert len(asked) == 2
    for prompt in asked:
        assert torch.equal(prompt.pixels, training_batch.pixels) and torch.equal(
            prompt.image_positions, training_batch.image_positions
        )
        length = prompt.input_ids.shape[1]
        assert torch.equal(prompt.input_ids, training_batch.input_ids[:, :length])
        assert length == training_batch.target_positions[0] + 1  # up to where the answer begins


def test_infer_answers_about_several_images(toy: Toy, monkeypatch, capsys):
    """The whole way through infer.py, none of it replaced, gives what the model at hand answers."""
    records = _records(toy, images=3)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "infer.py",
            *map(str, records[0].images),
            "第0问",
            "--model",
            str(toy.folder / "model"),
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--max-new-tokens",
            "4",
        ],
    )
    infer.main()
    assert capsys.readouterr().out.strip() == next(
        answer_records(toy.model, records, max_new_tokens=4)
    )


def _records(toy: Toy, images: int, turns: int = 1) -> list:
    """A record of several turns about images of a size that no vision encoder takes."""
    names = [f"{number}.png" for number in range(images)]
    for number, name in enumerate(names):
        values = np.random.default_rng(number).integers(
            0, 256, (61 + 20 * number, 90, 3), dtype=np.uint8
        )
        Image.fromarray(values).save(toy.folder / name)
    messages = []
    for turn in range(turns):
        messages += [
            {
                "role": "user",
                "content": ("<image>\n" * images if turn == 0 else "") + f"第{turn}问",
            },
            {"role": "assistant", "content": f"答{turn}"},
        ]
    path = toy.folder / "own.jsonl"
    path.write_text(json.dumps({"images": names, "messages": messages}, ensure_ascii=False))
    return read_records(path)[0]


def _batches(toy: Toy, records: list) -> Batches:
    options = BatchOptions(batch_size=len(records), max_length=1024, shuffle=False)
    return Batches(records, RecordEncoder.of(toy.model), options)


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


def test_a_model_that_knows_an_answer_stops_after_it(toy: Toy):
    """The end of turn is trained, not only labelled: one sample is overfitted, then asked for."""
    model, batch = copy.deepcopy(toy.model), _loaded(toy, _records(toy, images=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch) / len(batch.targets)
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
    end = int(batch.target_positions[0]) + 1
    prompt = dataclasses.replace(
        batch, input_ids=batch.input_ids[:, :end], attention_mask=batch.attention_mask[:, :end]
    )
    assert model.tokenizer.decode(generate(model, prompt, max_new_tokens=20)[0]) == "答0"


def test_labels_do_not_depend_on_what_the_words_say(toy: Toy):
    """Searching the text for the answer, or the assistant's header, would find the question's."""
    answer = "一个圆。"
    frames = ("ASSISTANT: ", "<|im_start|>assistant\n", "<|im_end|>\n", "</s>")
    batch = toy.batch(question="".join(f"{frame}{answer}" for frame in frames), answer=answer)
    tokens = toy.model.tokenizer.encode(answer)
    assert batch.targets.tolist() == [*tokens, toy.model.chat.end_of_turn_id]
    assert batch.target_positions.tolist() == list(
        range(int(batch.target_positions[0]), int(batch.target_positions[0]) + len(tokens) + 1)
    )


def test_a_missing_image_is_counted_and_not_faked(toy: Toy):
    record = dataclasses.replace(
        _records(toy, images=1)[0], images=(toy.data / "images" / "gone.png",)
    )
    loaded = _batches(toy, [record])[0]
    assert loaded.batch is None and len(loaded.skipped) == 1 and "gone.png" in loaded.skipped[0]


def test_cached_and_uncached_generation_agree(toy: Toy):
    batch = toy.batch()
    with torch.no_grad():
        embeddings, groups = toy.model.embed(batch), toy.model.image_groups(batch)
    prompt = Prompt(embeddings, batch.input_ids, groups=groups)
    options = dict(max_new_tokens=12, stop_ids={-1})
    cached, uncached = (
        list(decode(toy.model.language_model, prompt, use_cache=use_cache, **options))
        for use_cache in (True, False)
    )
    assert cached == uncached and len(cached) == 12
    # With random weights a model may repeat one word for any image: compare the vectors, too.
    words = toy.model.tokenizer.encode("一个红色的圆。")
    with torch.no_grad():
        whole = torch.cat(
            (embeddings, toy.model.language_model.embed_tokens(torch.tensor([words]))), dim=1
        )
        groups = toy.model.image_groups(batch)
        groups = groups if groups is None else torch.nn.functional.pad(groups, (0, len(words)))
        cache, start, parts = (
            toy.model.language_model.new_cache(1, whole.shape[1]),
            embeddings.shape[1],
            [],
        )
        for first, last in (
            (0, start),
            *((end - 1, end) for end in range(start + 1, whole.shape[1] + 1)),
        ):
            seen = groups if groups is None else groups[:, :last]
            parts.append(
                toy.model.language_model.hidden_states(
                    whole[:, first:last], cache=cache, groups=seen
                )
            )
        at_once = toy.model.language_model.hidden_states(
            whole, prompt_lengths=torch.tensor([start]), groups=groups
        )
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once, atol=1e-4, rtol=0)


def test_every_projector_can_learn_words_before_stage_1(toy: Toy, tmp_path: Path):
    """With tiles, with a resampler, and with a vision encoder that has one."""
    changes = {
        "objective": "words",
        "train": "projector",
        "language_model_layers": 0,
        "language_model_embedding": False,
        "lr": 5e-3,
        "max_steps": 16,
        "val": str(toy.data / "val.jsonl"),
    }
    run_stage(toy.stage("stage1", tmp_path / "words", **changes))
    losses = [line["loss"] for line in metrics(tmp_path / "words")]
    assert sum(losses[-4:]) < sum(losses[:4]) and (tmp_path / "words/samples.png").exists()
    model = load_model(tmp_path / "words" / "model")
    rows = model.language_model.embed_tokens.weight.norm(dim=-1)
    with torch.no_grad():
        tokens = model.projector(model.vision_features(toy.pixels(0)))
    assert rows.min() / 2 < tokens.norm(dim=-1).mean() < 2 * rows.max()


def test_only_what_a_stage_names_moves(toy: Toy):
    for stage in stages_of(toy.name):
        settings = toy.stage(stage, Path("unused"))
        model = copy.deepcopy(toy.model)
        set_up(model, settings, torch.device("cpu"))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, settings)
        set_learning_rates(optimizer, 1.0)
        for _ in range(2):  # an adapter's first matrix moves after its second
            for number in range(4):  # of a choice of experts, each token moves a few
                model(toy.batch(first=number)).backward()
            optimizer.step()
        moved = {
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert moved == {
            name for name in before if _is_named(name, settings, len(model.language_model.blocks))
        }, stage


def _is_named(parameter: str, settings: Settings, blocks: int) -> bool:
    """Whether a preset's stage trains this parameter, said independently of `freeze`."""
    part, name = parameter.split(".", 1)
    if part != "language_model":
        return part in settings.trained_parts
    if "language_model" not in settings.trained_parts:
        return False
    if settings.lora_rank:
        targets = settings.lora_targets.split(",")
        return name.endswith(("lora_A", "lora_B")) and any(
            f".{target}." in name for target in targets
        )
    if not settings.language_model_layers:
        return True
    if name.startswith("blocks."):
        return int(name.split(".")[1]) >= blocks - settings.language_model_layers
    return name.startswith(("norm.", "lm_head.")) or settings.language_model_embedding


def stages_of(preset: str) -> list[str]:
    return list(tomllib.loads((PRESETS / f"{preset}.toml").read_text(encoding="utf-8")))


def test_a_resumed_run_goes_on_to_the_same_losses(toy: Toy, first_stage: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(first_stage, run)
    for path in (run / "model", run / "checkpoints" / "step_4"):
        shutil.rmtree(path)
    run_stage(toy.stage("stage1", run, resume=True))
    assert metrics(run) == metrics(first_stage) and len(metrics(run)) == 4
    assert all(math.isfinite(line["loss"]) for line in metrics(run))
    assert (run / "model/model.safetensors").read_bytes() == (
        first_stage / "model/model.safetensors"
    ).read_bytes()


def test_saved_adapters_hold_the_projector(toy: Toy, first_stage: Path, tmp_path: Path):
    run_stage(
        toy.stage(
            "stage2",
            tmp_path / "run",
            lora_rank=2,
            language_model_layers=0,
            language_model_embedding=False,
            train="projector,language_model",
            max_steps=2,
        )
    )
    adapted = load_model(first_stage / "model")
    load_adapter(adapted, tmp_path / "run" / "adapter")
    started, trained = (load_model(run / "model") for run in (first_stage, tmp_path / "run"))
    for name, parameter in trained.projector.named_parameters():
        assert torch.equal(parameter, adapted.projector.get_parameter(name))
        assert not torch.equal(parameter, started.projector.get_parameter(name))
    assert read_json(tmp_path / "run" / "adapter" / "adapter.json")["rank"] == 2


def test_each_stage_goes_on_from_the_one_before_and_the_last_is_asked(
    toy: Toy, first_stage: Path, tmp_path: Path
):
    """What the commands do, with a validation and its answers; with pairs in a stage with DPO."""
    run, records = first_stage, {"val": str(toy.data / "val.jsonl"), "val_samples": 2}
    image = _records(toy, images=1)[0].images[0]
    pairs = [
        {"image": str(image), "prompt": "描述图片", "chosen": f"对{n}。", "rejected": f"错{n}。"}
        for n in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    )
    for stage in stages_of(toy.name)[1:]:
        source = {"data": str(tmp_path / "pairs.jsonl")} if stage == "dpo" else records
        run_stage(
            toy.stage(stage, tmp_path / stage, init=str(run / "model"), max_steps=2, **source)
        )
        run = tmp_path / stage
        assert all(math.isfinite(line["loss"]) for line in metrics(run))
    model = load_model(run / "model")
    assert model.config == toy.model.config
    said = list(
        answer_records(model, read_records(toy.data / "val.jsonl")[0][:3], max_new_tokens=4)
    )
    assert len(said) == 3
