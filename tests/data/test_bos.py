"""One BOS at the start of every row and prompt, by the tokenizer's own rule, whatever template and row write."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tunesmith.core.errors import DataError
from tunesmith.core.types import Message
from tunesmith.data.checks import CheckReport, find_findings
from tunesmith.data.render import Renderer
from tunesmith.data.template import NAMED
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.job.spec import DataSpec

LETTERS = "▁abcdefghijklmnopqrstuvwxyz\n.:1234567890ABCDEFGHIJKLMNOPQRSTUVWXYZ<>/|_[]#'\"?!,"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def load_letters(tmp_path_factory):
    """A sentencepiece-like tokenizer, a token a letter: a space stands before a text's start, and BOS before all."""

    def load(template=TEMPLATE, *, eos="</s>"):
        folder = tmp_path_factory.mktemp("letters")
        names = ["<s>", "</s>"]
        vocab = {letter: number for number, letter in enumerate([*names, *dict.fromkeys(LETTERS)])}
        backend = Tokenizer(models.BPE(vocab, [], unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(folder)

    return load


@pytest.fixture
def letters(load_letters):
    return load_letters()


def spell(tokenizer, ids):
    return " ".join(tokenizer.token(number) for number in ids)


def render(tokenizer, conversation, template=None):
    renderer = Renderer(tokenizer, DataSpec(train="", template=template))
    (row,) = renderer.render_conversation(conversation)
    return row, renderer


def test_a_text_begins_as_the_tokenizer_begins_it(letters, chat):
    row, renderer = render(letters, chat(("assistant", "ab c"), kind="text"))
    # As text, `<s>ab c` would lose the space before `a`.
    assert spell(letters, row.ids) == "<s> ▁ a b ▁ c </s>"
    assert list(row.mask) == [0, 1, 1, 1, 1, 1, 1]
    assert renderer.render_question(chat(("assistant", "ab c"), kind="text")) == [letters.bos_id]


def test_a_completion_continues_a_prompt_that_begins_as_the_tokenizer_begins_it(letters, chat):
    conversation = chat(("user", "ab"), ("assistant", " c"), kind="completion")
    row, renderer = render(letters, conversation)
    assert spell(letters, row.ids) == "<s> ▁ a b ▁ c </s>"
    assert list(row.mask) == [0, 0, 0, 0, 1, 1, 1]
    assert renderer.render_question(conversation) == list(row.ids[:4])


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_written_bos_counts_as_the_only_one(letters, chat, kind):
    turns = [("assistant", "<s>ab")] if kind == "text" else [("user", "<s>a"), ("assistant", "b")]
    once, renderer = render(letters, chat(*turns, kind=kind))
    assert list(once.ids).count(letters.bos_id) == 1
    assert renderer.counts["rows_with_bos_twice"] == 0
    turns[0] = (turns[0][0], "<s><s>" + turns[0][1])
    thrice, renderer = render(letters, chat(*turns, kind=kind))
    assert (thrice.ids, thrice.mask) == (once.ids, once.mask)
    assert renderer.counts["rows_with_bos_twice"] == 1


DOUBLED = {
    "a template that writes it twice": "{{ bos_token }}" + TEMPLATE,
    "a template that spells it": "<s>" + TEMPLATE,
}


@pytest.mark.parametrize("template", DOUBLED.values(), ids=DOUBLED.keys())
def test_a_template_that_doubles_bos_gives_the_rows_of_one_that_does_not(load_letters, chat, template):
    conversation = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    right, renderer = render(load_letters(), conversation)
    assert renderer.counts["rows_with_bos_twice"] == 0
    row, renderer = render(load_letters(template), conversation)
    assert (row.ids, row.mask) == (right.ids, right.mask)
    assert spell(load_letters(), row.ids).count("<s>") == 1
    assert renderer.render_question(conversation) == list(
        row.ids[: len(renderer.render_question(conversation))]
    )
    assert renderer.render_prompt_text([Message("user", "a")]).count("<s>") == 1


def test_a_generation_tag_does_not_hide_a_second_bos(load_letters, chat):
    marked = "{{ bos_token }}" + TEMPLATE.replace(
        "{{ m.content }}{{ eos_token if m.role == 'assistant' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '' }}",
    )
    conversation = chat(("user", "a"), ("assistant", "b"))
    row, _ = render(load_letters(marked), conversation)
    right, _ = render(load_letters(), conversation)
    assert (row.ids, row.mask) == (right.ids, right.mask)


def test_a_row_that_writes_the_templates_bos_again_loses_the_second(load_letters, chat):
    bare = TEMPLATE.replace("[{{ m.role }}] ", "{{ '[assistant] ' if m.role == 'assistant' }}")
    row, renderer = render(load_letters(bare), chat(("user", "<s>a"), ("assistant", "b")))
    right, _ = render(load_letters(bare), chat(("user", "a"), ("assistant", "b")))
    assert (row.ids, row.mask) == (right.ids, right.mask)
    assert renderer.counts["rows_with_bos_twice"] == 1


def test_a_second_bos_elsewhere_is_refused_naming_the_row(letters, chat):
    for conversation in (
        chat(("user", "a <s><s> b"), ("assistant", "c")),
        chat(("assistant", "a<s><s>b"), kind="text"),
    ):
        with pytest.raises(
            DataError, match=r"train\.jsonl:1: '<s>' stands twice in a row; .*--on-bad-row skip"
        ):
            render(letters, conversation)
    with pytest.raises(DataError, match="prompt: '<s>' stands twice"):
        Renderer(letters).render_prompt([Message("user", "a <s><s> b")])


def test_where_bos_is_eos_too_an_end_and_a_beginning_may_meet(load_letters, chat):
    tokenizer = load_letters(eos="<s>")
    row, _ = render(tokenizer, chat(("assistant", "a<s><s>b"), kind="text"))
    assert list(row.ids).count(tokenizer.bos_id) == 4  # before, twice within, as EOS


@pytest.mark.parametrize("name", NAMED)
def test_the_named_templates_write_one(letters, chat, name):
    row, renderer = render(letters, chat(("user", "a"), ("assistant", "b")), template=name)
    assert row.ids[0] == letters.bos_id
    assert list(row.ids).count(letters.bos_id) == 1
    assert not renderer.counts["rows_with_bos_twice"]


def test_a_dropped_bos_is_told_once(load_letters, chat):
    tokenizer = load_letters("{{ bos_token }}" + TEMPLATE)
    _, renderer = render(tokenizer, chat(("user", "a"), ("assistant", "b")))
    found = find_findings(CheckReport(counts=dict(renderer.counts)), renderer)
    assert [item.message for item in found if "BOS" in item.message] == [
        "1 rows began with BOS twice, and the second was dropped: the template writes it, and so does the row or the "
        "template again. Other software may not drop it"
    ]


def test_real_tokenizers_begin_texts_with_the_golden_ids(shared, chat):
    golden = json.loads((shared / "golden" / "model_reference_shared.json").read_text())
    examples = golden["tinystories-656k"]["examples"]
    tokenizer = load_tokenizer(shared / "models" / "tinystories-656k")
    for example in examples:
        row, renderer = render(tokenizer, chat(("assistant", example["text"]), kind="text"))
        assert list(row.ids) == [*example["ids"], tokenizer.eos_id]
        first, _, rest = example["text"].partition(" ")
        conversation = chat(("user", first), ("assistant", " " + rest), kind="completion")
        row, renderer = render(tokenizer, conversation)
        assert list(row.ids[:2]) == example["ids"][:2], "BOS, and the space before the first word"
        assert renderer.render_question(conversation) == list(row.ids[: row.mask.index(1)])


def test_plain_text_begins_as_transformers_begins_it(shared):
    transformers = pytest.importorskip("transformers")
    for name in ("stories260k", "tinystories-656k"):  # the second has BOS among its normalised tokens
        folder = shared / "models" / name
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("Once upon a time", "Lily saw a dog.", "a"):
            assert [*ours.bos_before(text), *ours.encode(text)] == theirs(text).input_ids, (name, text)
