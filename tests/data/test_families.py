"""Templates of many families, written here: what holds of the real ones holds of these, wherever the tests run.

Each is rendered with and without `{% generation %}` around its answers; both must train the same tokens.
"""

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.types import Message
from tunesmith.data.render import Renderer

# name: (one turn, the generation prompt, what ends an answer); ANSWER stands for the answer and its end.
FAMILIES = {
    "tags": (
        "{% if m.role == 'assistant' %}<|im_start|>assistant\n{ANSWER}\n{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "brackets": (
        "{% if m.role == 'assistant' %} {ANSWER}{% else %}[INST] {{ m.content }} [/INST]{% endif %}",
        "",
        "<|im_end|>",
    ),
    "sections": (
        "{% if m.role == 'assistant' %}### Response:\n{ANSWER}\n\n{% else %}### Instruction:\n{{ m.content }}\n\n"
        "{% endif %}",
        "### Response:\n",
        "<|im_end|>",
    ),
    "another name": (
        "{% if m.role == 'assistant' %}<|im_start|>model\n{ANSWER}\n{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | trim }}<|im_end|>\n{% endif %}",
        "<|im_start|>model\n",
        "<|im_end|>",
    ),
    "no end": (
        "{% if m.role == 'assistant' %}assistant: {ANSWER}\n{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}",
        "assistant:",
        "",
    ),
}  # fmt: skip
CONVERSATIONS = {
    "one turn": [("user", "two plus two?"), ("assistant", "it is four")],
    "three turns": [
        ("user", "the cat"),
        ("assistant", "sat on the mat"),
        ("user", "and the dog?"),
        ("assistant", "on the log, too"),
    ],
    "odd text": [("user", "¿qué?"), ("assistant", "日本 😀 <b>{x}</b>\n\n  end")],
    "one without weight": [("user", "a"), Message("assistant", "b", 0.0), ("user", "c"), ("assistant", "d")],
}


def write_template(name, folder, *, marked):
    turn, prompt, end = FAMILIES[name]
    answer = "{{ m.content }}" + end
    answer = f"{{% generation %}}{answer}{{% endgeneration %}}" if marked else answer
    # Jinja eats a line end right behind a block.
    turn = turn.replace("{ANSWER}\n", "{ANSWER}{{ '\\n' }}")
    source = "{% for m in messages %}" + turn.replace("{ANSWER}", answer) + "{% endfor %}"
    path = folder / f"{name} {marked}.jinja"
    path.write_text(source + "{% if add_generation_prompt %}" + prompt + "{% endif %}")
    return str(path)


@pytest.fixture
def open_renderer(chat_tokenizer, make_job, tmp_path):
    """Renderer of a family, with or without generation tags."""

    def open_(name, *, marked=False):
        template = write_template(name, tmp_path, marked=marked)
        return Renderer(chat_tokenizer, make_job(train="x", template=template).data)

    return open_


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_answers_and_their_end_are_trained(open_renderer, chat, chat_tokenizer, name, turns):
    conversation = chat(*turns)
    renderer = open_renderer(name)
    (row,) = renderer.render_conversation(conversation)
    stretches, before = [], 0
    for token, bit in zip(row.ids, row.mask, strict=True):
        if bit and not before:
            stretches.append([])
        if bit:
            stretches[-1].append(token)
        before = bit
    trained = [m for m in conversation.messages if m.role == "assistant" and m.weight > 0]
    said = [chat_tokenizer.decode(ids).strip() for ids in stretches]
    end = FAMILIES[name][2]
    expected = [message.content + end for message in trained]
    if not end:
        expected[-1] += chat_tokenizer.eos_token
    assert said == expected
    question = renderer.render_question(conversation)
    assert list(row.ids[: len(question)]) == question, "a prompt at judging is the prompt of training"
    assert row.mask[-1] == 1


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_tags_change_nothing(open_renderer, chat, name, turns):
    conversation = chat(*turns)
    plain, marked = (open_renderer(name, marked=m).render_conversation(conversation) for m in (False, True))
    assert [(row.ids, row.mask) for row in plain] == [(row.ids, row.mask) for row in marked]


def test_a_tag_around_something_else_is_refused(open_renderer, chat, make_job, chat_tokenizer, tmp_path):
    path = tmp_path / "wrong.jinja"
    path.write_text(
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}: "
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(chat_tokenizer, make_job(train="x", template=str(path)).data)
    with pytest.raises(DataError, match="encloses other text than the answer"):
        renderer.render_conversation(chat(("user", "a"), ("assistant", "b")))
