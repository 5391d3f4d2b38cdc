"""What is trained is exactly what the model will be asked to produce, whatever the template."""

import json
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, Message, Origin
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer

ORIGIN = Origin("train.jsonl:1", "train.jsonl", 1)
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "n"}},
            "required": ["a"],
        },
    },
}


def make(*turns, tools=(), kind="chat"):
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation(messages, ORIGIN, kind=kind, tools=tuple(tools))


def find_trained(row, tokenizer):
    """Decoded text of each trained stretch."""
    found, current = [], []
    for token, trained in [*zip(row.ids, row.mask, strict=True), (0, 0)]:
        if trained:
            current.append(token)
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return found


def renderer_with(tokenizer, source, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return Renderer(tokenizer, SimpleNamespace(template=str(path)))


# --- one template, by hand --------------------------------------------------------------------------------------------


def test_the_answer_and_its_end_token_are_trained_and_nothing_else(chat_tokenizer):
    renderer = Renderer(chat_tokenizer)
    (row,) = renderer.render_conversation(make(("user", "two plus two?"), ("assistant", "four")))
    assert chat_tokenizer.decode(row.ids) == (
        "<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    )
    assert find_trained(row, chat_tokenizer) == ["four<|im_end|>"]
    assert row.ids[-1] == chat_tokenizer.eos_id
    assert row.mask[-1] == 1
    assert row.mask[0] == 0
    assert row.num_answer_bytes == 4


def test_every_assistant_turn_is_trained_unless_its_weight_is_zero(chat_tokenizer):
    renderer = Renderer(chat_tokenizer)
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "the dog"), ("assistant", "sat, too")]
    (row,) = renderer.render_conversation(make(*turns))
    assert find_trained(row, chat_tokenizer) == ["sat<|im_end|>", "sat, too<|im_end|>"]
    (row,) = renderer.render_conversation(make(turns[0], Message("assistant", "sat", 0.0), *turns[2:]))
    assert find_trained(row, chat_tokenizer) == ["sat, too<|im_end|>"]
    (row,) = renderer.render_conversation(make(*turns[:3], Message("assistant", "sat, too", 0.0)))
    assert find_trained(row, chat_tokenizer) == ["sat<|im_end|>"]
    assert row.mask[-1] == 1, "the row ends with its last trained token"


def test_a_batch_gives_the_rows_of_one_at_a_time(chat_tokenizer):
    rows = [make(("user", f"number {n}?"), ("assistant", f"it is {n}")) for n in range(5)]
    together = Renderer(chat_tokenizer).render_conversations(rows)
    assert together == [Renderer(chat_tokenizer).render_conversation(row) for row in rows]


def test_a_question_is_the_start_of_its_training_row(chat_tokenizer):
    renderer = Renderer(chat_tokenizer)
    row = make(("user", "a"), ("assistant", "\nb"), ("user", "c"), ("assistant", "d"))
    (trained,) = renderer.render_conversation(row)
    question = renderer.render_question(row)
    assert list(trained.ids[: len(question)]) == question
    assert chat_tokenizer.decode(trained.ids[len(question) :]) == "d<|im_end|>"


def test_completions_are_raw_text_with_bos_and_eos(real_tokenizers):
    llama = real_tokenizers["llama2"]
    renderer = Renderer(llama)
    row = make(("user", "The cat"), ("assistant", " sat."), kind="completion")
    (trained,) = renderer.render_conversation(row)
    assert trained.ids[0] == llama.bos_id
    assert trained.ids[-1] == llama.eos_id
    assert list(trained.ids[: trained.mask.index(1)]) == [llama.bos_id, *llama.encode("The cat")]
    assert renderer.render_question(row) == list(trained.ids[: trained.mask.index(1)])
    assert trained.num_answer_bytes == 5


def test_plain_text_trains_every_token_after_the_first(real_tokenizers):
    (row,) = Renderer(real_tokenizers["llama2"]).render_conversation(
        make(("assistant", "The cat sat."), kind="text")
    )
    assert list(row.mask) == [0] + [1] * (len(row.ids) - 1)
    assert row.num_answer_bytes == len("The cat sat.")
    gpt2 = real_tokenizers["gpt2"]
    (row,) = Renderer(gpt2).render_conversation(make(("assistant", "The cat sat."), kind="text"))
    assert gpt2.decode(row.ids[:1]) == "The", "GPT-2 puts no BOS before text"
    assert list(row.mask) == [0] + [1] * (len(row.ids) - 1)
    assert row.num_answer_bytes == len(" cat sat.")


def test_a_pad_token_equal_to_eos_leaves_the_trained_eos_alone(chat_folder, tmp_path):
    import shutil

    folder = shutil.copytree(chat_folder, tmp_path / "model")
    settings_path = folder / "tokenizer_config.json"
    values = json.loads(settings_path.read_text()) | {"pad_token": "<|im_end|>"}
    settings_path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id
    (row,) = Renderer(tokenizer).render_conversation(make(("user", "a"), ("assistant", "b")))
    assert (row.ids[-1], row.mask[-1]) == (tokenizer.eos_id, 1)


def test_an_end_marker_outside_the_stop_tokens_is_one_of_ours(chat_folder, tmp_path):
    import shutil

    folder = shutil.copytree(chat_folder, tmp_path / "model")
    settings_path = folder / "tokenizer_config.json"
    values = json.loads(settings_path.read_text()) | {"eos_token": "<|endoftext|>"}
    settings_path.write_text(json.dumps(values))
    renderer = Renderer(load_tokenizer(folder))
    assert renderer.tokenizer.eos_ids == (0,)
    assert renderer.stop_ids == (0, 2)
    (row,) = renderer.render_conversation(make(("user", "a"), ("assistant", "b")))
    assert row.ids[-1] == 2


def test_a_template_without_end_marker_gets_the_tokenizers_eos(chat_tokenizer, tmp_path):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    renderer = renderer_with(chat_tokenizer, source, tmp_path)
    (row,) = renderer.render_conversation(make(("user", "a"), ("assistant", "b")))
    assert find_trained(row, chat_tokenizer) == [" b<|im_end|>"]
    assert renderer.counts["eos_added_after_answer"] == 1


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}MORE<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_marked_generation_agrees_with_what_is_found(chat_tokenizer, tmp_path):
    row = make(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    renderer = renderer_with(chat_tokenizer, GENERATION.replace("MORE", ""), tmp_path)
    (trained,) = renderer.render_conversation(row)
    assert find_trained(trained, chat_tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
    assert trained == Renderer(chat_tokenizer).render_conversation(row)[0]


def test_marked_generation_that_encloses_other_text_is_refused(chat_tokenizer, tmp_path):
    wrong = GENERATION.replace("MORE", "").replace(
        "{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}x"
    )
    with pytest.raises(DataError, match="encloses other text than the answer"):
        renderer_with(chat_tokenizer, wrong, tmp_path).render_conversation(
            make(("user", "a"), ("assistant", "b"))
        )


REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}{% else %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_templates_that_drop_reasoning_give_one_row_per_turn(chat_tokenizer, tmp_path):
    renderer = renderer_with(chat_tokenizer, REASONING, tmp_path)
    turns = [
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\noh\n</think>\n\nd"),
    ]
    first, second = renderer.render_conversation(make(*turns))
    assert find_trained(first, chat_tokenizer) == ["hm\n</think>\n\nb<|im_end|>"]
    assert find_trained(second, chat_tokenizer) == ["oh\n</think>\n\nd<|im_end|>"]
    assert "hm" not in chat_tokenizer.decode(second.ids), "history is shown as a model will meet it"
    question = renderer.render_question(make(*turns))
    assert list(second.ids[: len(question)]) == question


def test_an_answer_without_reasoning_closes_the_block_at_once(chat_tokenizer, tmp_path):
    renderer = renderer_with(chat_tokenizer, REASONING, tmp_path)
    (row,) = renderer.render_conversation(make(("user", "a"), ("assistant", "b")))
    assert find_trained(row, chat_tokenizer) == ["\n</think>\n\nb<|im_end|>"]
    assert renderer.counts["empty_reasoning_added"] == 1


def test_a_row_that_the_template_refuses_is_named_with_the_reason(chat_tokenizer, tmp_path):
    renderer = renderer_with(chat_tokenizer, "{{ raise_exception('no systems here') }}", tmp_path)
    with pytest.raises(DataError) as caught:
        renderer.render_conversation(make(("user", "a"), ("assistant", "b")))
    assert str(caught.value).startswith("train.jsonl:1: ")
    assert "no systems here" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- real templates and tokenizers ------------------------------------------------------------------------------------

PLAIN = {
    "single": make(("user", "What is 2+2?"), ("assistant", "It is 4.")),
    "multi": make(
        ("user", "Hi"), ("assistant", "Hello there!"), ("user", "What is 2+2?"), ("assistant", "It is 4.")
    ),
    "space": make(
        ("user", "Hi"), ("assistant", "  Hello\n\n there!\n"), ("user", "What?"), ("assistant", "\nIt is 4. ")
    ),
    "unicode": make(("user", "¿Qué?"), ("assistant", "日本 😀 ﷽\n\n"), ("user", "1"), ("assistant", "ế")),
}
SYSTEM = make(
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", "Hello there!"),
    ("user", "2+2?"),
    ("assistant", "4"),
)
TOOLS = make(
    ("user", "add"),
    Message("assistant", "", 1.0, {"content": None, "tool_calls": [CALL]}),
    Message("tool", "3", 1.0, {"tool_call_id": "abcdefghi", "name": "add"}),
    ("assistant", "It is 3."),
    tools=(TOOL,),
)
# `functions` and `datetime` are variables that nothing passes to this template, transformers included.
REFUSED = {"fireworks-ai-llama-3-firefunction-v2"}
NO_SYSTEM = {"google-gemma-2-2b-it"}
TOOL_TEMPLATES = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "meetkai-functionary-medium-v3.1",
    "meetkai-functionary-medium-v3.2",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "qwen2.5-instruct",
}
# Text that a template writes around each answer, where it is more than the end of the turn.
BEFORE = {
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_RESPONSE|>",
    "meetkai-functionary-medium-v3.2": "all\n",
}
REASONS = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "</think>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "</think>",
    "llama-cpp-deepseek-r1": "</think>",
}
END_MARKERS = {
    "chatml": "<|im_end|>",
    "gemma-it": "<end_of_turn>",
    "llama-3-instruct": "<|eot_id|>",
    "openchat-3.5": "<|end_of_turn|>",
    "phi-3": "<|end|>",
    "CohereForAI-c4ai-command-r-plus-tool_use": "<|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "meetkai-functionary-medium-v3.1": "<|eot_id|>",
    "meetkai-functionary-medium-v3.2": "<|eot_id|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
}


@pytest.fixture(scope="module")
def real_templates(shared, tmp_path_factory):
    """Files of the real templates; those of one collection also without indentation, as its authors use them."""
    folder = tmp_path_factory.mktemp("templates")
    found = []
    for path in sorted((shared / "chat_templates").rglob("*.jinja")):
        found.append(path)
        if path.parent.name == "chujiezheng":
            compact = folder / path.name
            compact.write_text(path.read_text().replace("    ", "").replace("\n", ""))
            found.append(compact)
    assert len(found) == 35 + 18
    return found


def squeeze(text):
    """Text without white space and what sentencepiece writes for it: decoders and templates move it about."""
    return "".join(unicodedata.normalize("NFC", text).replace("▁", " ").split())


def check_rows(conversation, renderer, name):
    """Trained text is the answers with their end, and every row starts with the ids a server would send."""
    tokenizer = renderer.tokenizer
    rows = renderer.render_conversation(conversation)
    texts = renderer.render_texts(conversation)
    answers = [m for m in conversation.messages if m.role == "assistant"]
    trained = [text for row in rows for text in find_trained(row, tokenizer)]
    assert len(trained) == len(answers), name
    ending = renderer._ending.marker
    for text, message in zip(trained, answers, strict=True):
        text = squeeze(text)
        if "tool_calls" in message.extra:
            assert "add" in text, name
            continue
        start = squeeze(BEFORE.get(name, "") + REASONS.get(name, ""))
        # Falcon's template replaces empty lines in answers.
        body = squeeze(message.content.strip())
        eos = squeeze(tokenizer.eos_token or "")
        assert text in {f"{start}{body}{squeeze(ending)}{more}" for more in ("", eos)}, name
    for row, text in zip(rows, texts, strict=True):
        first = text.spans[0].start
        cut = row.mask.index(1)
        assert not any(row.mask[:cut])
        if not text.history:
            assert list(row.ids[:cut]) == tokenizer.encode(text.text[:first]), name
        assert row.mask[-1] == 1
        assert row.ids[-1] in renderer.stop_ids, name
    question = renderer.render_question(conversation)
    assert list(rows[-1].ids[: len(question)]) == question, name


@pytest.mark.parametrize("tokenizer_name", ["gpt2", "llama2", "llama3", "mistral-v3", "qwen2"])
def test_every_real_template_is_masked_exactly_with_every_real_tokenizer(
    real_templates, real_tokenizers, tokenizer_name, monkeypatch
):
    tokenizer = real_tokenizers[tokenizer_name]
    monkeypatch.setattr(tokenizer, "bos_token", tokenizer.bos_token or "")
    for path in real_templates:
        renderer = Renderer(tokenizer, SimpleNamespace(template=str(path)))
        name = path.stem
        if name in REFUSED:
            with pytest.raises(DataError, match="'functions' is undefined"):
                renderer.render_conversation(PLAIN["single"])
            continue
        for conversation in PLAIN.values():
            check_rows(conversation, renderer, name)
        if name in NO_SYSTEM:
            with pytest.raises(DataError, match="System role not supported"):
                renderer.render_conversation(SYSTEM)
        else:
            check_rows(SYSTEM, renderer, name)
        if name in TOOL_TEMPLATES:
            check_rows(TOOLS, renderer, name)
        else:
            with pytest.raises(DataError, match="tool call"):
                renderer.render_conversation(TOOLS)
        if name in END_MARKERS:
            assert renderer._ending.marker == END_MARKERS[name]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>|\x00"), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, answers=st.lists(TEXT.filter(str.strip), min_size=1, max_size=3))
def test_trained_tokens_decode_to_the_answers_and_their_end(chat_tokenizer, question, answers):
    turns = [turn for answer in answers for turn in (("user", question), ("assistant", answer))]
    renderer = Renderer(chat_tokenizer)
    (row,) = renderer.render_conversation(make(*turns))
    assert find_trained(row, chat_tokenizer) == [f"{answer}<|im_end|>" for answer in answers]
    assert row.num_answer_bytes == sum(len(answer.encode()) for answer in answers)
    question_ids = renderer.render_question(make(*turns))
    assert list(row.ids[: len(question_ids)]) == question_ids


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, answer=TEXT.filter(str.strip))
def test_sentencepiece_rows_have_no_space_that_the_text_has_not(real_tokenizers, question, answer):
    llama = real_tokenizers["llama2"]
    row = make(("user", question), ("assistant", answer), kind="completion")
    (trained,) = Renderer(llama).render_conversation(row)
    assert llama.decode(trained.ids, skip_special=True) == question + answer


def test_real_conversations_are_masked_exactly(shared, real_tokenizers):
    from tunesmith.data.formats import RawRow, parse_row

    qwen = real_tokenizers["qwen2"]
    renderer = Renderer(qwen)
    lines = (shared / "sft" / "sgd_chat_1500.jsonl").read_text().splitlines()[:60]
    for line in lines:
        conversation = parse_row(RawRow(json.loads(line), ORIGIN), "messages")
        (row,) = renderer.render_conversation(conversation)
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        assert find_trained(row, qwen) == [f"{answer}<|im_end|>" for answer in answers]
