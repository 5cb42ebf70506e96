"""Our chat templates as programs in Jinja, for folders that other tools read.

A program begins with a comment that holds its `ChatConfig`, by which `read_jinja` knows it again.
"""

import dataclasses
import json
import re

from nanovlm.errors import NanoVLMError
from nanovlm.inputs.chat import EMPTY_THINK, Chat, ChatConfig
from nanovlm.tokenizer import Tokenizer
from nanovlm.utils.config import from_dict
from nanovlm.utils.files import parse_json

_MARK = re.compile(r"\{#- nanovlm (\{.*\}) -#\}\n")
# As `Chat.encode` goes through a conversation. A turn's content is text, or parts as OpenAI's: then
# each image that opens a turn stands on a line of its own, where `after_images` says nothing else.
_PROGRAM = """\
{{%- set image, think = {image}, {think} -%}}
{{%- set before = {before} -%}}
{{%- set before_text = {before_text} -%}}
{{%- set after = {after} -%}}
{{%- set seen = namespace(query=-1, text=false) -%}}
{{%- for message in messages -%}}
  {{%- if message.role == 'user' -%}}{{%- set seen.query = loop.index0 -%}}{{%- endif -%}}
{{%- endfor -%}}
{first}{system}{{%- for message in messages -%}}
  {{%- if message.role not in before -%}}
    {{{{- raise_exception('the roles are system, user and assistant') -}}}}
  {{%- endif -%}}
  {{%- set is_answer = message.role == 'assistant' -%}}
  {{%- set is_earlier = is_answer and (add_generation_prompt or not loop.last) -%}}
  {{%- set role = 'earlier' if is_earlier else message.role -%}}
  {{{{- before[role] -}}}}
  {{%- if is_answer and loop.index0 > seen.query -%}}{{{{- think -}}}}{{%- endif -%}}
  {{%- set text = [{{'type': 'text', 'text': message.content}}] -%}}
  {{%- set parts = text if message.content is string else message.content -%}}
  {{%- set seen.text = false -%}}
  {{%- for part in parts -%}}
    {{%- if part.type == 'image' -%}}
      {{%- if message.role != 'user' -%}}
        {{{{- raise_exception('images belong to user turns') -}}}}
      {{%- endif -%}}
      {{{{- image -}}}}
{after_image}    {{%- elif part.type == 'text' -%}}
      {{%- if loop.first{not_spaced} -%}}{{{{- before_text[role] -}}}}{{%- endif -%}}
{after_images}      {{{{- part.text -}}}}
      {{%- set seen.text = true -%}}
    {{%- else -%}}
      {{{{- raise_exception('parts are text and image') -}}}}
    {{%- endif -%}}
  {{%- endfor -%}}
  {{{{- after[role] -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- before['assistant'] + think -}}}}{{%- endif -%}}
"""
_SYSTEM = """\
{{%- if not messages or messages[0].role != 'system' -%}}
  {{{{- {text} -}}}}
{{%- endif -%}}
"""
_FIRST = "{{{{- {text} -}}}}\n"
_AFTER_IMAGE = "      {%- if not (seen.text or loop.last) -%}{{- '\\n' -}}{%- endif -%}\n"
_AFTER_IMAGES = """\
      {{%- if not (seen.text or loop.first) -%}}{{{{- {text} -}}}}{{%- endif -%}}
"""
_NOT_SPACED = " and not (is_answer and part.text[:1].isspace())"


def write_jinja(chat: Chat) -> str:
    """A program that writes a conversation as `chat.encode` does, with one token an image.

    What it writes and `Chat.encode` differ in one thing: a control token that a user types is text
    to us, and that token to a program which tokenizes the whole.
    """
    config, template = chat.config, chat.template
    roles = template.before
    end = template.end_of_turn
    before_text = {role: template.before_text.get(role, "") for role in roles}
    # A space that the tokenizer puts before an answer is one that stands between it and its
    # opening, unless that ends with a token.
    opening = template.before["assistant"]
    puts_space = chat.tokenizer.puts_space and not opening.endswith(tuple(template.special))
    if puts_space:
        before_text |= {"assistant": " ", "earlier": " "}
    system = ""
    if config.default_system:
        text = before_text["system"] + config.default_system + end["system"]
        text = template.before["system"] + text + template.after["system"]
        system = _SYSTEM.format(text=_literal(text))
    known = {name: value for name, value in dataclasses.asdict(config).items() if name != "end_ids"}
    mark = json.dumps(known).replace("#", "\\u0023")
    return f"{{#- nanovlm {mark} -#}}\n" + _PROGRAM.format(
        image=_literal(config.image_token),
        think=_literal(EMPTY_THINK if config.empty_think else ""),
        before=_literal(roles),
        before_text=_literal(before_text),
        after=_literal({role: end[role] + template.after[role] for role in roles}),
        first=_FIRST.format(text=_literal(template.first)) if template.first else "",
        system=system,
        after_image=_AFTER_IMAGE if template.after_images is None else "",
        after_images=_AFTER_IMAGES.format(text=_literal(template.after_images))
        if template.after_images
        else "",
        not_spaced="" if puts_space else _NOT_SPACED,
    )


def read_jinja(source: str, tokenizer: Tokenizer) -> ChatConfig | None:
    """The settings of a program that `write_jinja` wrote; None for one of other people.

    Raises NanoVLMError for one that has been changed since.
    """
    mark = _MARK.match(source)
    if mark is None:
        return None
    where = "chat_template.jinja"
    try:
        config = from_dict(ChatConfig, parse_json(mark[1]), where)
        is_whole = write_jinja(Chat(config, tokenizer)).strip() == source.strip()
    except ValueError:
        is_whole = False
    if not is_whole:
        raise NanoVLMError(
            f"{where}: begins as one that nanovlm wrote and goes on otherwise; take its first line "
            "away, so that it is read as a published one, or export the model again"
        )
    return config


def _literal(value: str | dict[str, str]) -> str:
    """A text, or an object of texts, as Jinja reads it."""
    return json.dumps(value, ensure_ascii=False)
