"""The sandbox renders what transformers renders, within bounds."""

import json

import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.template import NAMED, ChatTemplate, TemplateError, find_template

TURNS = [
    {"role": "user", "content": 'Hi <there> & "you"é'},
    {"role": "assistant", "content": "  Hello\n"},
    {"role": "user", "content": "What is 2+2?"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "é"}},
            "required": ["a"],
        },
    },
}


def read_templates(shared):
    """The real templates by name, those of one collection also without their indentation, as they are used."""
    found = {}
    for path in sorted((shared / "chat_templates").rglob("*.jinja")):
        found[path.stem] = path.read_text()
        if path.parent.name == "chujiezheng":
            found[path.stem + " (compact)"] = path.read_text().replace("    ", "").replace("\n", "")
    return found


def test_real_templates_render_as_in_transformers(shared):
    from transformers.utils.chat_template_utils import render_jinja_template

    templates = read_templates(shared)
    assert len(templates) == 35 + 18
    compared = 0
    for name, source in templates.items():
        for messages, tools in ((TURNS, None), (WITH_SYSTEM, None), (TURNS, [TOOL])):
            options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
            try:
                theirs, _ = render_jinja_template([messages], tools=tools, chat_template=source, **options)
            except Exception:
                with pytest.raises(TemplateError):
                    ChatTemplate(source).render(messages, tools=tools, **options)
                continue
            assert ChatTemplate(source).render(messages, tools=tools, **options) == theirs[0], name
            compared += 1
    assert compared > 120


def test_rendered_conversations_are_those_of_llama_cpp(shared):
    golden = json.loads((shared / "golden" / "chat_template_expected_a.json").read_text())
    assert len(golden["cases"]) == 9
    for case in golden["cases"]:
        text = ChatTemplate(case["template_str"]).render(
            golden["conversation"],
            add_generation_prompt=golden["add_generation_prompt"],
            bos_token=case.get("bos_token", ""),
            eos_token=case.get("eos_token", ""),
        )
        assert text == (case["expected_output_jinja"] or case["expected_output"]), case["name"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 10 ** 1000000 }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{% for a in range(100000000) %}a{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)
def test_a_hostile_template_is_stopped(source):
    template = ChatTemplate(source)
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "a"}])


def test_a_template_that_is_not_jinja_names_its_line():
    with pytest.raises(DataError, match=r"mine:2: .*a chat template is Jinja"):
        ChatTemplate("a\n{% if %}", name="mine")


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_open_an_assistant_turn_as_they_write_it(name):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    template = find_template(name)
    options = {"bos_token": "<s>", "eos_token": "</s>"}
    prompt = template.render(turns[:1], add_generation_prompt=True, **options)
    whole = template.render(turns, **options)
    assert prompt.startswith("<s>")
    assert whole.startswith(prompt)
    assert "Hello." in whole[len(prompt) :]


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(
        DataError, match=r"data\.template: chatlm: no such template or file; known templates are chatml"
    ):
        find_template("chatlm")
