"""Wrong flags: one-line errors, no guessing, and the new name of what was renamed."""

import pytest

from nanovlm.errors import NanoVLMError
from nanovlm.utils.parser import CommandParser


def test_a_wrong_flag_is_one_line_and_never_abbreviated(capsys):
    parser = CommandParser()
    parser.add_argument("--number", type=int)
    for arguments, expected in (
        (["--numb", "1"], "unrecognized arguments"),
        (["--number", "x"], "invalid int value: 'x'"),
    ):
        with pytest.raises(NanoVLMError, match=expected) as caught:
            parser.parse_args(arguments)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vision", "DIR"], "--vision is now --vision-encoder"),
        (["--text-shape=qwen"], "--text-shape is now --language-model-shape"),
        (["--lr-text", "1e-4"], "--lr-text is now --lr-language-model"),
        (["--part", "vision"], "--part vision is now --part vision_encoder"),
        (["--dtype", "bf16"], "--dtype bf16 is now --dtype bfloat16"),
        (["--visions", "DIR"], "unrecognized arguments: --visions DIR; --help lists the flags"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(arguments, message):
    parser = CommandParser()
    parser.add_argument("--part", choices=("vision_encoder", "language_model"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    with pytest.raises(NanoVLMError) as caught:
        parser.parse_args(arguments)
    assert str(caught.value) == message
