"""How a conversation becomes one prompt: the checkpoint's own Jinja template, XVERSE's `Human: … Assistant: `,
or plain text.

A document is data. Whatever it contains, `<|im_end|>` included, reaches the model as ordinary text, so that it
cannot end the user's turn and speak as the system. Where no message holds such a string the ids are exactly
those of transformers' `apply_chat_template` with `enable_thinking=False`; but instructions that a template has no place
for stand before the first question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longverse.errors import UserError
from longverse.models.tokenizer import Tokenizer

# role and content are texts; an assistant's message may carry `tool_calls`, which only templates understand.
Messages = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "exec", "tool")
# Two noncharacters of Unicode: they mark control strings inside contents while the template works on the real text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
SYSTEM_PROBE = "instructions-7f3a91"

# XVERSE's format as a Jinja template, for files that go to other engines. Our own code builds the prompt itself,
# which also keeps what a document says apart from the end tokens.
XVERSE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' if message['content'] else '' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ 'Exec: ' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


class ChatFormat:
    """One model's prompt format. `kind`: "template" (Jinja), "xverse" or "plain" (a base model: texts parted by
    blank lines).

    `stop_strings`: texts after which an answer is over, beside the tokenizer's end tokens.
    """

    def __init__(self, kind: str, tokenizer: Tokenizer) -> None:
        self.kind = kind
        self.tokenizer = tokenizer
        self.knows_tools = False
        self.stop_strings: tuple[str, ...] = ("\n\nHuman:",) if kind == "xverse" else ()
        if kind == "template":
            if tokenizer.chat_template is None:
                raise UserError("This tokenizer has no chat template; use the plain format.")
            self._template = compile_template(tokenizer.chat_template)
            # Whether the template itself tells the model which functions it may call, and writes its calls.
            self.knows_tools = re.search(r"\btools\b", tokenizer.chat_template) is not None
        elif kind == "xverse":
            if not tokenizer.eos_ids:
                raise UserError("The XVERSE format ends every answer with an end token, and this tokenizer names none.")
            self._eos_id = _first_eos(tokenizer)
        elif kind != "plain":
            raise UserError(f"There is no chat format {kind!r}; the formats are template, xverse and plain.")

    @classmethod
    def for_model(cls, tokenizer: Tokenizer, config: dict[str, Any], name: str) -> ChatFormat:
        """The checkpoint's template if it has one, XVERSE's format for XVERSE models, else plain."""
        if tokenizer.chat_template not in (None, XVERSE_TEMPLATE):
            return cls("template", tokenizer)
        if (
            tokenizer.chat_template == XVERSE_TEMPLATE
            or config.get("model_type") == "xverse"
            or "xverse" in name.lower()
        ):
            return cls("xverse", tokenizer)
        return cls("plain", tokenizer)

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The prompt as text. Roles: system, user, assistant, and exec or tool (the result of a tool call)."""
        _check(messages)
        if self.kind == "template":
            return self._render_template(messages, add_generation_prompt)
        end = self.tokenizer.backend.id_to_token(self._eos_id) if self.kind == "xverse" else None
        return (end or "").join(self._turns(messages, add_generation_prompt))

    def encode(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The prompt as ids. Control strings inside contents stay ordinary text.

        tools: functions as OpenAI's interface describes them; only for a format that `knows_tools`.
        """
        _check(messages)
        assert tools is None or self.knows_tools
        tokenizer = self.tokenizer
        if self.kind != "template":
            ids: list[int] = []
            for position, text in enumerate(self._turns(messages, add_generation_prompt)):
                if position:
                    ids.append(self._eos_id)
                if text or not position:
                    ids.extend(tokenizer.encode(text, special=False, add_bos=None if not position else False))
            return ids
        strings = tokenizer.control_strings
        if not any(string in text for text in _texts([messages, tools]) for string in strings):
            rendered = self._render_template(messages, add_generation_prompt, tools)
            return tokenizer.encode(rendered, special=True, add_bos=False)
        pattern = "|".join(map(re.escape, sorted(strings, key=len, reverse=True)))

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                # Marks that the text brings along are dropped: with them it could pass for marked text.
                return re.sub(pattern, rf"{_OPEN}\g<0>{_CLOSE}", re.sub(f"[{_OPEN}{_CLOSE}]", "", value))
            if isinstance(value, dict):
                return {mark(key): item if key == "role" else mark(item) for key, item in value.items()}
            return [mark(item) for item in value] if isinstance(value, list) else value

        rendered = self._render_template(mark(messages), add_generation_prompt, mark(tools))
        # [text, marked control string, text, …]; a lone mark (the template cut the text there) still parts its two
        # sides.
        pieces = re.split(f"{_OPEN}({pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]", rendered)
        ids = []
        for position, piece in enumerate(pieces):
            if piece:
                ids.extend(tokenizer.encode(piece, special=position % 2 == 0, add_bos=False))
        return ids

    def _render_template(
        self, messages: Messages, add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
    ) -> str:
        turns = [message | {"role": "tool" if message["role"] == "exec" else message["role"]} for message in messages]
        if turns[0]["role"] == "system" and self._lacks_system_role:
            turns = _joined(turns)
        try:
            return self._fill(turns, add_generation_prompt, tools)
        except RecursionError:
            raise UserError(
                "The model's chat template calls itself without end: take the files of another source."
            ) from None
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"The model's chat template refuses this conversation: {error}.") from None

    def _fill(self, turns: Messages, add_generation_prompt: bool, tools: list[dict[str, Any]] | None) -> str:
        return self._template.render(
            messages=turns,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # hybrid models (Qwen3) answer at once: limits are for answers
            **self.tokenizer.special_tokens,
        )

    @cached_property
    def _lacks_system_role(self) -> bool:
        """Whether the template refuses a system message, as Mistral's first ones do, or leaves it out."""
        probe = [{"role": "system", "content": SYSTEM_PROBE}, {"role": "user", "content": "?"}]
        try:
            return SYSTEM_PROBE not in self._fill(probe, True, None)
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError):
            return True

    def _turns(self, messages: Messages, add_generation_prompt: bool) -> list[str]:
        """Texts between which XVERSE's format has an end token (a plain prompt is one text)."""
        if self.kind == "plain":
            text = "\n\n".join(message["content"] for message in messages)
            return [f"{text}\n\n" if add_generation_prompt and messages[-1]["role"] == "assistant" else text]
        turns = [""]
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                turns[-1] += f"{content}\n\n" if content else ""
            elif message["role"] == "user":
                turns[-1] += f"Human: {content}\n\n"
            elif message["role"] == "assistant":
                turns[-1] += f"Assistant: {content}"
                turns.append("")
            else:  # the releases name this role without showing its text; the prefix is our choice
                turns[-1] += f"Exec: {content}\n\n"
        if add_generation_prompt:
            turns[-1] += "Assistant: "
        return turns


def _joined(messages: Messages) -> Messages:
    """The conversation with its system message put before the user's first, where that comes next."""
    if [message["role"] for message in messages[1:2]] != ["user"]:
        return messages
    system, first = messages[0]["content"], messages[1]["content"]
    return [messages[1] | {"content": f"{system}\n\n{first}" if system.strip() else first}, *messages[2:]]


def _texts(value: Any) -> Iterator[str]:
    """All texts inside lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _check(messages: Messages) -> None:
    if not messages:
        raise UserError("A conversation needs at least one message.")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"A message has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise UserError(f"The content of a message must be text, not {type(content).__name__}.")


def _first_eos(tokenizer: Tokenizer) -> int:
    named = tokenizer.special_tokens.get("eos_token")
    token_id = tokenizer.backend.token_to_id(named) if named is not None else None
    return min(tokenizer.eos_ids) if token_id is None else token_id


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; for a prompt it is what stands between."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """Compile a chat template in a sandbox, with the settings and helpers that templates on the hub are written for."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(template)
    except RecursionError:
        raise UserError(
            "The model's chat template is nested too deeply to be read: take the files of another source."
        ) from None
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise UserError(f"The model's chat template has an error on line {error.lineno}: {error.message}.") from None


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first of the stop texts."""
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def may_stop(text: str, stop: tuple[str, ...]) -> int:
    """How many last characters of `text` may be the beginning of a stop text, and have to wait."""
    return max((size for end in stop for size in range(1, len(end)) if text.endswith(end[:size])), default=0)
