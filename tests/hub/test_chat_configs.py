"""Which template and placeholder a published folder gets, and what one that none fits is told."""

import json

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
from nanovlm.inputs.chat import Chat
from nanovlm.tokenizer import load_tokenizer
from tests.reference.models import byte_pair, sentence_piece


@pytest.mark.parametrize(
    "special, placeholder",
    [
        (("<|image_pad|>", "<image>", "<|extra_0|>"), "<|image_pad|>"),
        (("<image>", "<|extra_0|>"), "<image>"),
        (("<|extra_0|>",), "<|extra_0|>"),
        ((), "<image>"),
    ],
)
def test_the_placeholder_is_what_the_vocabulary_has_for_it(tmp_path, special, placeholder):
    byte_pair(tmp_path, special=("<|im_start|>", "<|im_end|>", *special))
    assert read_chat_config(tmp_path, load_tokenizer(tmp_path)).image_token == placeholder


def test_a_folder_that_no_template_fits_says_what_is_missing(tmp_path):
    byte_pair(tmp_path, special=("<|endoftext|>", "<|im_end|>"))
    with pytest.raises(
        NanoVLMError,
        match=r"no chat template fits its tokenizer: it lacks special tokens of each "
        r"\(chatml needs <\|im_end\|> <\|im_start\|>; .* vicuna needs </s> <s>\)",
    ):
        read_chat_config(tmp_path, load_tokenizer(tmp_path))
    for name, template in (
        ("llama2", "{{ bos_token + '[INST] ' + messages[0].content + ' [/INST]' }}"),
        ("zephyr", "{{ '<|user|>\n' + messages[0].content + eos_token + '<|assistant|>' }}"),
    ):
        sentence_piece(tmp_path / name, template)
        with pytest.raises(NanoVLMError, match="its chat template is another one"):
            read_chat_config(tmp_path / name, load_tokenizer(tmp_path / name))


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"


def chatml(turn: str) -> str:
    return "{% for m in messages %}" + turn + "{% endfor %}" + OPENING


@pytest.mark.parametrize(
    "template",
    [
        chatml("{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"),
        chatml("{{- '<|im_start|>' ~ m.role ~ \"\\n\" ~ m.content | trim -}}{{ '<|im_end|>\\n' }}"),
        "{% for m in messages %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}".strip(),
        chatml(TURN) + "\r\n",
        chatml(  # Yi's, which opens the answer with the question
            "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n"
            "<|im_start|>assistant\n' }}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}"
        ),
    ],
)
def test_templates_that_write_chatml_are_chatml(tmp_path, template):
    config = {"chat_template": template, "bos_token": None, "eos_token": "<|im_end|>"}
    byte_pair(tmp_path, special=CHATML)
    for chat_template in (template, [{"name": "default", "template": template}]):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": chat_template})
        )
        assert read_chat_config(tmp_path, load_tokenizer(tmp_path)).template == "chatml"


@pytest.mark.parametrize(
    "template",
    [
        chatml("[INST] {{ m['content'] }} [/INST]"),
        chatml("{{ '<|im_start|>' + m.role + '\n[INST] ' + m.content + '<|im_end|>\n' }}"),
        chatml("{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"),
        chatml("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"),
        chatml("{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}"),
        "{{ bos_token }}"
        + chatml("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"),
        chatml("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}")
        + "{{ '<think>\n' }}",
        chatml("{{ '<用户>' + m.content + '<AI>' }}"),
        "{{ messages }}",
        chatml(TURN).replace("assistant\n", "model\n"),
        chatml(TURN).replace("assistant\n", "assistant\nSure! "),
        "{{" * 20_000,
        "{% set x = '<" * 20_000,
        "x" * 300_000,
    ],
)
def test_templates_that_write_something_else_are_refused_whatever_tokens_there_are(
    tmp_path, template
):
    byte_pair(tmp_path, special=CHATML)
    config = {"chat_template": template, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(NanoVLMError, match="its chat template is"):
        read_chat_config(tmp_path, load_tokenizer(tmp_path))


def test_the_template_that_a_folder_writes_decides_between_two_that_its_tokens_allow(tmp_path):
    llama3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    template = chatml(
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    ).replace(OPENING, "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
    byte_pair(tmp_path, template, special=(*CHATML, *llama3))
    assert read_chat_config(tmp_path, load_tokenizer(tmp_path)).template == "llama3"


LLAMA_FACTORY = (
    "{% set system_message = 'You help.' %}{% if messages[0].role == 'system' %}"
    "{% set system_message = messages[0].content %}{% endif %}"
    "{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}"
)


@pytest.mark.parametrize(
    ("written", "system"),
    [
        (r"{{ '<|im_start|>system\nYou\'re a \"bot\".<|im_end|>\n' }}", 'You\'re a "bot".'),
        (r"""{{ "<|im_start|>system\nThe user's friend.<|im_end|>\n" }}""", "The user's friend."),
        # Qwen2.5-Math
        (r"{{ '<|im_start|>system\nWrite \\boxed{}.<|im_end|>\n' }}", r"Write \boxed{}."),
        ("{{ '<|im_start|>system\nUse <b>…</b>。\n好。<|im_end|>\n' }}", "Use <b>…</b>。\n好。"),
        (LLAMA_FACTORY, "You help."),
        ("{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}", None),
        ("{% set system_message = '' %}", None),
        ("", None),
    ],
)
def test_the_default_system_prompt_is_what_a_template_writes_word_for_word(
    tmp_path, written, system
):
    byte_pair(tmp_path, written + chatml(TURN), special=CHATML)
    assert read_chat_config(tmp_path, load_tokenizer(tmp_path)).default_system == system


@pytest.mark.parametrize(
    ("given", "expected"),
    [([321, 322, 321], (322,)), (322, (322,)), (321, ()), (None, ()), ([], ())],
)
def test_all_end_tokens_of_the_generation_config_end_an_answer(tmp_path, given, expected):
    byte_pair(tmp_path, special=CHATML)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens["<|im_end|>"] == 321
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    config = read_chat_config(tmp_path, tokenizer)
    assert config.end_ids == expected
    tokenizer.add_special_token(config.image_token)
    assert Chat(config, tokenizer).stop_ids == {321, *expected}


@pytest.mark.parametrize("given", ["x", ["x"], 1.5, True, -1, 2**62, [3, None], {}])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, given):
    byte_pair(tmp_path, special=CHATML)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(NanoVLMError, match="generation_config.json: eos_token_id is "):
        read_chat_config(tmp_path, load_tokenizer(tmp_path))


def test_a_pointer_in_place_of_a_template_is_named(tmp_path):
    byte_pair(tmp_path, special=CHATML)
    (tmp_path / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(NanoVLMError, match="chat_template.jinja: is a Git LFS pointer"):
        read_chat_config(tmp_path, load_tokenizer(tmp_path))
