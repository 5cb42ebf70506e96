"""Which template and placeholder a published folder gets, and what one that none fits is told."""

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.hub.chat_configs import read_chat_config
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
