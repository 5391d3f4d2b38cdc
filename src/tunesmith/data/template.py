"""Chat templates: a sandbox that renders what transformers renders, with bounds, and templates by name.

The sandbox stops escapes; the bounds stop a template that would fill memory (`'a' * 10**9`). Time is not bounded here.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.core.errors import DataError

MAX_RENDERED_CHARS = 64 * 1024 * 1024
_MAX_REPEATED = 1_000_000
_WIDENING = {"ljust", "rjust", "center", "zfill", "expandtabs"}
# Private-use characters around what `{% generation %}` encloses; a text that holds them is refused.
GENERATION_START, GENERATION_END = "\U000f7e01", "\U000f7e02"


class TemplateError(ValueError):
    """What a template said while rendering, before the row it happened in is known."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks its output in a render with `mark_generation`."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        marking = context.get("_mark_generation")
        return f"{GENERATION_START}{caller()}{GENERATION_END}" if marking else caller()


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Repetition and powers are the cheap ways to ask for all memory."""
        if operator == "**" and (abs(float(left)) > 1000 or abs(float(right)) > 100):
            raise SecurityError("a power this large is not allowed")
        for text, count in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(count, int):
                size = len(cast("str | list[Any] | tuple[Any, ...]", text))
                if size * count > _MAX_REPEATED:
                    raise SecurityError("a repetition this large is not allowed")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__name__", "") in _WIDENING and any(
            isinstance(a, int) and a > _MAX_REPEATED for a in args
        ):
            raise SecurityError("a padding this wide is not allowed")
        return super().call(context, obj, *args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As models were trained to see it: no HTML escaping, real characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _pad(text: Any, width: int = 80) -> str:
    if width > _MAX_REPEATED:
        raise SecurityError("a padding this wide is not allowed")
    return str(text).center(width)


def _format(pattern: Any, *args: Any, **kwargs: Any) -> str:
    if re.search(r"\d{5}|\*", str(pattern)):
        raise SecurityError("a padding this wide is not allowed")
    return str(pattern) % (kwargs or args)


def _make_environment(today: datetime.date) -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    filters = cast("Any", environment).filters
    filters.update(tojson=_to_json, center=_pad, format=_format)
    names = cast("Any", environment).globals
    names.update(raise_exception=_raise_exception, strftime_now=_Clock(today))
    return environment


class _Clock:
    """`strftime_now`: the day of preparation, at midnight, so that rows of one run agree."""

    def __init__(self, today: datetime.date) -> None:
        self._now = datetime.datetime(today.year, today.month, today.day)

    def __call__(self, pattern: str) -> str:
        return self._now.strftime(pattern)


class ChatTemplate:
    """A compiled template. `render` raises TemplateError with one line saying what the template did not like."""

    def __init__(
        self, source: str, *, name: str = "chat template", today: datetime.date | None = None
    ) -> None:
        self.source, self.name = source, name
        environment = _make_environment(today or datetime.date.today())
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{name}:{error.lineno}",
                f"{error.message}",
                rule="a chat template is Jinja",
                cure="Repair it, or name another template",
            ) from None
        self.writes_date = "strftime_now" in source
        self.marks_generation = re.search(r"\{%-?\s*generation\b", source) is not None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        mark_generation: bool = False,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> str:
        """Text of a conversation, with the generation prompt after it if asked."""
        variables: dict[str, Any] = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "_mark_generation": mark_generation,
        }
        # Absent, not empty, where the tokenizer has none: templates ask `is defined`.
        if bos_token is not None:
            variables["bos_token"] = bos_token
        if eos_token is not None:
            variables["eos_token"] = eos_token
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(variables):
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError(f"renders more than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except TemplateError:
            raise
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
        ) as e:
            raise TemplateError(f"{type(e).__name__}: {e}") from None
        except (RecursionError, MemoryError) as error:
            raise TemplateError(f"{type(error).__name__}") from None
        return "".join(parts)


def find_template(name: str) -> ChatTemplate:
    """`data.template`: a name from NAMED, or a Jinja file. Raises DataError naming the known names."""
    if name in NAMED:
        return ChatTemplate(NAMED[name], name=name)
    path = Path(name)
    if not path.is_file():
        raise DataError(
            f"data.template: {name}",
            "no such template or file",
            rule=f"known templates are {', '.join(NAMED)}",
            cure="Give one of them, or the path of a Jinja file",
        )
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), name=name)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            name,
            f"cannot be read ({error})",
            rule="a template is UTF-8 text",
            cure="Repair it, or name another",
        ) from None


# Written so that each turn ends with a token that the model can learn to stop on. `eos` stands for the tokenizer's own
# end token where a family's marker is not in the vocabulary.
_MARKED = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_HEADERS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_SECTIONS = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content + eos_token + '\\n\\n' -}}
{%- else -%}
{{- raise_exception('the alpaca template has no ' + message.role + ' turns') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

_SPEAKERS = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- 'USER: ' + message.content + '\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT: ' + message.content + eos_token + '\\n' -}}
{%- else -%}
{{- raise_exception('the vicuna template has no ' + message.role + ' turns') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_TAGS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

_BRACKETS = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- '[INST] ' + ns.system + message.content + ' [/INST]' -}}{%- set ns.system = '' -%}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content + eos_token -}}
{%- else -%}
{{- raise_exception('the mistral template has no ' + message.role + ' turns') -}}
{%- endif -%}
{%- endfor -%}
"""

NAMED: dict[str, str] = {
    "chatml": _MARKED,
    "llama-3": _HEADERS,
    "alpaca": _SECTIONS,
    "vicuna": _SPEAKERS,
    "zephyr": _TAGS,
    "mistral": _BRACKETS,
}
