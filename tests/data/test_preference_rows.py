"""Pairs and labelled rows from file to prepared folder: same prompts, both or none, one prompt in one split."""

import json
from dataclasses import replace

import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.types import Conversation, Message, Origin, RowGroup, TokenRow
from tunesmith.data.prepare import load_prepared, prepare_data
from tunesmith.data.preview import LabelledPreview, preview_rows
from tunesmith.data.render import Renderer
from tunesmith.data.row_pairs import RowPairs
from tunesmith.data.split import Likeness, hash_conversation
from tunesmith.data.survey import check
from tunesmith.data.template import NAMED

NONE = {"validation": 0.0, "test": 0.0}
SUBJECTS = "cat dog log mat hen fox owl bat ant bee cow elk".split()
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '(earlier)' if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def line(question, chosen, rejected, **more):
    return json.dumps(
        {"prompt": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected, **more}
    )


def good(question, answer, label, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "label": label, **more})


@pytest.fixture
def make_pair(chat):
    """A pair from the turns of a prompt and the two answers, each a text or turns."""

    def make(prompt, chosen, rejected, **more) -> Conversation:
        head = [Message(role, text, 0.0) for role, text in prompt]
        sides = [[("assistant", s)] if isinstance(s, str) else s for s in (chosen, rejected)]
        first, second = (chat(*head, *side, **more) for side in sides)
        return replace(first, rejected=second.messages)

    return make


@pytest.fixture
def prepare(make_job, chat_tokenizer, tmp_path):
    """Prepares a file of rows of a kind."""

    def run(path, rows, *, on_bad_row="refuse", name="prepared", **data):
        job = make_job(train=path if isinstance(path, list) else str(path), **data)
        return prepare_data(
            job, tokenizer=chat_tokenizer, folder=tmp_path / name, on_bad_row=on_bad_row, rows=rows
        )

    return run


@pytest.fixture
def pair_file(write_lines):
    return write_lines(*[line(f"{s * 9}?", f"the {s}", f"no {s} at all") for s in SUBJECTS])


# --- rendering --------------------------------------------------------------------------------------------------------


def split_row(row):
    start = list(row.mask).index(1)
    return list(row.ids[:start]), list(row.ids[start:]), list(row.mask[start:])


def test_each_side_of_a_pair_is_the_row_it_would_be_alone(make_pair, chat, chat_tokenizer):
    pair = make_pair([("user", "the cat?")], "it sat", "it ran off")
    renderer = Renderer(chat_tokenizer)
    rows = renderer.render_conversation(pair)
    for row, answer in zip(rows, ("it sat", "it ran off"), strict=True):
        (alone,) = renderer.render_conversation(chat(("user", "the cat?"), ("assistant", answer)))
        assert (row.ids, row.mask, row.row_id, row.num_answer_bytes) == (
            alone.ids,
            alone.mask,
            alone.row_id,
            alone.num_answer_bytes,
        )


def test_earlier_answers_belong_to_the_prompt(make_pair, chat_tokenizer):
    prompt = [("system", "be brief"), ("user", "the cat?"), ("assistant", "sat"), ("user", "the dog?")]
    rows = Renderer(chat_tokenizer).render_conversation(make_pair(prompt, "lay", "ran"))
    for row, answer in zip(rows, ("lay", "ran"), strict=True):
        _, trained, mask = split_row(row)
        assert chat_tokenizer.decode(trained) == answer + "<|im_end|>"
        assert all(mask)
    assert split_row(rows[0])[0] == split_row(rows[1])[0]


@pytest.mark.parametrize("name", NAMED)
def test_both_prompts_are_the_same_ids_under_every_named_template(make_pair, chat_tokenizer, make_job, name):
    renderer = Renderer(chat_tokenizer, make_job(train="x", template=name).data)
    for answers in (("it sat", "it ran off"), (" sat", "sat down"), ("42", "4")):
        pair = make_pair([("user", "the cat?"), ("assistant", "a"), ("user", "b")], *answers)
        chosen, rejected = renderer.render_conversation(pair)
        assert (
            split_row(chosen)[0]
            == split_row(rejected)[0]
            == renderer.render_question(replace(pair, rejected=()))
        )


def test_both_prompts_are_the_same_ids_under_real_templates_and_tokenizers(
    shared, real_tokenizers, make_pair, make_job
):
    num_rendered = 0
    for path in sorted((shared / "chat_templates").rglob("*.jinja")):
        for name in ("llama2", "llama3", "qwen2"):
            renderer = Renderer(real_tokenizers[name], make_job(train="x", template=str(path)).data)
            pair = make_pair([("user", "The cat?"), ("assistant", "Sat."), ("user", "Why?")], "So.", "'s why")
            try:
                chosen, rejected = renderer.render_conversation(pair)
            except DataError:
                continue
            num_rendered += 1
            assert split_row(chosen)[0] == split_row(rejected)[0], path
    assert num_rendered > 60


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "mistral-v3", "qwen2"])
def test_both_prompts_of_raw_text_are_the_same_ids(real_tokenizers, make_pair, name):
    # "The cat s" and "The cat" would meet in one token where a text is tokenised as a whole.
    pair = make_pair([("user", "The cat")], "s sat.", " ran.", kind="completion")
    chosen, rejected = Renderer(real_tokenizers[name]).render_conversation(pair)
    assert split_row(chosen)[0] == split_row(rejected)[0]
    assert chosen.ids[-1] == rejected.ids[-1] == real_tokenizers[name].eos_id


def test_answers_that_a_template_makes_equal_are_refused(make_pair, chat_tokenizer, make_job, tmp_path):
    path = tmp_path / "trim.jinja"
    path.write_text(chat_tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content | trim }}"))
    renderer = Renderer(chat_tokenizer, make_job(train="x", template=str(path)).data)
    with pytest.raises(DataError, match=r"train\.jsonl:1: chosen and rejected are the same tokens"):
        renderer.render_conversation(make_pair([("user", "the cat?")], "it sat", "it sat "))


def test_an_answer_of_several_turns_is_refused_under_a_template_that_rewrites_earlier_ones(
    make_pair, chat_tokenizer, make_job, tmp_path
):
    path = tmp_path / "rewrites.jinja"
    path.write_text(REWRITES)
    renderer = Renderer(chat_tokenizer, make_job(train="x", template=str(path)).data)
    (chosen, rejected) = renderer.render_conversation(
        make_pair([("user", "a"), ("assistant", "b"), ("user", "c")], "yes", "no")
    )
    assert split_row(chosen)[0] == split_row(rejected)[0]
    several = [("assistant", "wait"), ("user", "so?"), ("assistant", "yes")]
    with pytest.raises(DataError, match="it rewrites earlier turns"):
        renderer.render_conversation(make_pair([("user", "a")], several, "no"))


def test_a_labelled_row_carries_its_label_as_a_number(chat, chat_tokenizer):
    asked = chat(("user", "the cat?"), ("assistant", "it sat"))
    renderer = Renderer(chat_tokenizer)
    (plain,) = renderer.render_conversation(asked)
    assert not plain.numbers
    for label, number in ((True, 1.0), (False, 0.0)):
        (row,) = renderer.render_conversation(replace(asked, label=label))
        assert row == replace(plain, numbers={"desirable": number})


# --- the folder -------------------------------------------------------------------------------------------------------


def test_pairs_come_back_side_by_side(prepare, pair_file, tmp_path, chat_tokenizer):
    prepare(pair_file, "pairs", split={"validation": 0.25, "test": 0.25})
    read = load_prepared(tmp_path / "prepared")
    assert json.loads((tmp_path / "prepared" / "prepared.json").read_text())["rows"] == read.kind == "pairs"
    renderer = Renderer(chat_tokenizer)
    for split, size in (("train", 6), ("validation", 3), ("test", 3)):
        pairs, conversations = read.examples(split), read.conversations(split)
        assert len(pairs) == len(conversations) == size
        assert len(read.rows(split)) == 2 * size
        assert read.conversation_numbers(split) == [n // 2 for n in range(2 * size)]
        assert pairs.lengths == [len(pair.ids) for pair in pairs]
        for pair, conversation in zip(pairs, conversations, strict=True):
            assert isinstance(pair, RowGroup)
            fresh = renderer.render_conversation(conversation)
            assert [(list(r.ids), list(r.mask), r.row_id) for r in pair.rows] == [
                (r.ids, r.mask, r.row_id) for r in fresh
            ]
            assert chat_tokenizer.decode(split_row(pair.rows[0])[1]).startswith("the ")
            assert chat_tokenizer.decode(split_row(pair.rows[1])[1]).startswith("no ")


def test_labels_come_back_with_their_rows(prepare, write_lines, tmp_path):
    path = write_lines(*[good(f"{s * 9}?", f"the {s}", n % 3 == 0) for n, s in enumerate(SUBJECTS)])
    prepare(path, "labelled")
    read = load_prepared(tmp_path / "prepared")
    assert read.kind == "labelled"
    rows = read.examples("train")
    assert len(rows) == 10
    for row, conversation in zip(rows, read.conversations("train"), strict=True):
        assert isinstance(row, TokenRow)
        assert row.numbers == {"desirable": 1.0 if conversation.label else 0.0}
        assert conversation.label is ((row.origin.index - 1) % 3 == 0)


def test_answers_have_no_other_folder_than_before(prepare, write_lines, tmp_path):
    turns = [[{"role": "user", "content": s * 9}, {"role": "assistant", "content": s}] for s in SUBJECTS]
    prepared = prepare(write_lines(*[json.dumps({"messages": t}) for t in turns]), "answers")
    assert prepared.kind == "answers"
    assert prepared.examples("train") is prepared.rows("train")
    root = tmp_path / "prepared"
    assert set(json.loads((root / "prepared.json").read_text())) == {"schema", "splits", "fingerprints"}
    assert "preferences" not in json.loads((root / "checks.json").read_text())
    for value in map(json.loads, (root / "train.rows.jsonl").read_text().splitlines()):
        assert "numbers" not in value
    for value in map(json.loads, (root / "train.conversations.jsonl").read_text().splitlines()):
        assert not {"rejected", "label"} & set(value)


def test_a_flipped_label_or_pair_is_other_data(prepare, write_lines):
    found = []
    for number, flip in enumerate((False, True)):
        lines = [good(f"{s * 9}?", f"the {s}", (s == "cat") != flip) for s in SUBJECTS]
        found.append(
            prepare(write_lines(*lines), "labelled", name=f"l{number}", split=NONE).fingerprints[
                "train_sha256"
            ]
        )
        sides = [("yes", "no"), ("no", "yes")][number]
        lines = [line(f"{s * 9}?", *(f"{side} {s}" for side in sides)) for s in SUBJECTS]
        found.append(
            prepare(write_lines(*lines), "pairs", name=f"p{number}", split=NONE).fingerprints["train_sha256"]
        )
    assert len(set(found)) == 4


def test_pairs_of_lists_refuse_an_odd_number_of_rows():
    row = TokenRow([1, 2], [0, 1], Origin("t:1", "t", 1), "a")

    class Rows(list):
        lengths = [2, 2, 2]

    with pytest.raises(ValueError, match="3 rows are not pairs"):
        RowPairs(Rows([row] * 3))
    pairs = RowPairs(rows := type("Two", (list,), {"lengths": [2, 2]})([row] * 2))
    assert pairs[-1].rows == tuple(rows)
    assert [pair.rows for pair in pairs[:5]] == [tuple(rows)]
    with pytest.raises(IndexError):
        pairs[1]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_with_a_side_too_long_goes_as_a_whole(prepare, write_lines, longer):
    long = " ".join(["cat"] * 100)
    sides = (long, "short") if longer == "chosen" else ("short", long)
    lines = [line(f"{s * 9}?", f"the {s}", f"no {s}") for s in SUBJECTS]
    path = write_lines(*lines, line("why on earth?", *sides))
    prepared = prepare(path, "pairs", max_tokens=64, split=NONE)
    assert len(prepared.examples("train")) == 12
    facts = prepared.report.splits["train"]
    assert (facts.num_dropped, facts.num_conversations, facts.num_rows) == (2, 12, 24)
    whole = prepare(path, "pairs", name="whole", split=NONE).examples("train")
    assert facts.num_lost_targets == sum(row.num_targets for row in whole[12].rows)
    assert any(
        "2 rows are longer than max_tokens, or the other of their pair is" in w
        for w in prepared.report.warnings
    )
    with pytest.raises(DataError, match=r"train\.jsonl:13: \d+ tokens; data.max_tokens is 64"):
        prepare(path, "pairs", max_tokens=64, too_long="refuse", name="refuse")


def test_cutting_cuts_each_side_and_leaves_out_what_it_makes_equal(prepare, write_lines):
    same = " ".join(["cat"] * 100)
    lines = [line(f"{s * 9}?", f"{s} {same}", f"no {s}") for s in SUBJECTS]
    path = write_lines(*lines, line("why on earth?", same + " yes", same + " no"))
    prepared = prepare(path, "pairs", max_tokens=64, too_long="truncate", split=NONE)
    pairs = prepared.examples("train")
    assert len(pairs) == 12
    assert all(len(pair.rows[0].ids) == 64 > len(pair.rows[1].ids) for pair in pairs)
    assert prepared.report.counts["pairs_equal_once_cut"] == 1
    assert any("1 pairs are the same tokens once cut" in text for text in prepared.report.warnings)


def test_a_cut_row_keeps_its_label(prepare, write_lines):
    long = " ".join(["cat"] * 100)
    path = write_lines(*[good(f"{s * 9}?", f"{s} {long}", s == "owl") for s in SUBJECTS])
    prepared = prepare(path, "labelled", max_tokens=64, too_long="truncate", split=NONE)
    assert [row.numbers["desirable"] for row in prepared.rows("train")] == [
        float(s == "owl") for s in SUBJECTS
    ]


def test_bad_pairs_are_set_aside_with_their_reasons(prepare, write_lines, tmp_path):
    lines = [line(f"{s * 9}?", f"the {s}", f"no {s}") for s in SUBJECTS]
    path = write_lines(*lines, line("why?", "so", "so"), '{"prompt": "why?", "chosen": "so"}')
    with pytest.raises(DataError, match=r"train\.jsonl:13: chosen and rejected are the same"):
        prepare(path, "pairs")
    prepared = prepare(path, "pairs", on_bad_row="skip")
    kept = [json.loads(text) for text in (tmp_path / "rejected_rows.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in kept] == ["train.jsonl:13", "train.jsonl:14"]
    assert prepared.report.sources[0].num_rejected == 2


# --- which data an objective takes ------------------------------------------------------------------------------------


def test_pairs_are_taken_apart_for_labels_and_that_is_said(prepare, pair_file):
    prepared = prepare(pair_file, "labelled", split={"validation": 0.0, "test": 0.25})
    assert prepared.report.sources[0].num_rows == 12
    assert [row.numbers["desirable"] for row in prepared.rows("train")] == [1.0, 0.0] * 9
    (note,) = [f.message for f in prepared.report.findings if f.code == "unpaired"]
    assert note.startswith("train.jsonl: 12 pairs taken apart into labelled rows")


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            "pairs",
            "answers",
            r"train\.jsonl: its rows are chosen and rejected answers \(pairs\); objective sft learns from answers\. "
            r"Set objective: dpo \(or orpo, simpo, reward\), or give another source",
        ),
        (
            "labelled",
            "answers",
            r"its rows are answers with a label \(messages_labelled\).* Set objective: kto, or give the source format: "
            r"messages",
        ),
        (
            "labelled",
            "pairs",
            r"this objective learns from pairs of a chosen and a rejected answer\. Set objective: kto",
        ),
        (
            "answers",
            "pairs",
            r"its rows are answers \(messages\); this objective learns from pairs.* Set objective: sft",
        ),
        ("answers", "labelled", r"objective kto learns from answers with a label\. Set objective: sft"),
    ],
)
def test_data_of_another_objective_is_refused_with_the_one_that_fits(
    prepare, write_lines, kind, rows, message
):
    lines = {
        "pairs": line("the cat?", "sat", "ran"),
        "labelled": good("the cat?", "sat", True),
        "answers": json.dumps({"messages": json.loads(good("the cat?", "sat", True))["messages"]}),
    }
    for on_bad_row in ("refuse", "skip"):
        with pytest.raises(DataError, match=message):
            prepare(write_lines(lines[kind]), rows, on_bad_row=on_bad_row)


def test_answers_of_a_labelled_set_are_learned_where_its_shape_is_named(prepare, write_lines):
    path = write_lines(*[good(f"{s * 9}?", f"the {s}", s == "cat") for s in SUBJECTS])
    prepared = prepare([{"path": str(path), "format": "messages"}], "answers")
    assert len(prepared.rows("train")) == 10
    assert all(not row.numbers for row in prepared.rows("train"))


# --- splits and clusters ----------------------------------------------------------------------------------------------


def test_a_prompt_never_lies_in_two_splits(prepare, write_lines):
    # Four answers to each of 12 prompts, nothing alike but the prompt.
    words = "river stone lamp green quiet seven table cloud paper bread horse winter".split()
    lines = [
        line(f"what of the {s}?", f"{w * 5} {n} {s[::-1]}", f"{s * n} {w[::-1] * 4}")
        for s, w in zip(SUBJECTS, words, strict=True)
        for n in range(2, 6)
    ]
    prepared = prepare(write_lines(*lines), "pairs", split={"validation": 0.25, "test": 0.25})
    prompts = {
        split: {c.prompt[0].content for c in prepared.conversations(split)} for split in prepared.splits
    }
    assert [len(found) for found in prompts.values()] == [6, 3, 3]
    assert len(set.union(*prompts.values())) == 12
    assert len(set(prepared.clusters("train"))) == 6
    assert prepared.report.splits["train"].num_near_duplicates == 0


def test_a_prompt_is_the_same_whatever_its_case_and_spaces(make_pair):
    pairs = [
        make_pair([("system", "be brief"), ("user", "What of  the cat?")], "it sat all day", "no"),
        make_pair([("user", "what of the cat? ")], "who could ever tell", "yes"),
        make_pair([("user", "what of the dog?")], "who could ever tell that", "never"),
    ]
    groups = Likeness(pairs).find_split_groups(pairs)
    assert groups[0] == groups[1] != groups[2]


def test_the_hash_of_a_row_follows_its_other_side_and_its_label(make_pair, chat):
    pair = make_pair([("user", "a")], "b", "c")
    answer = chat(("user", "a"), ("assistant", "b"))
    rows = [
        pair,
        replace(pair, rejected=(*pair.rejected[:-1], Message("assistant", "d"))),
        replace(pair, rejected=()),
        answer,
        replace(answer, label=True),
        replace(answer, label=False),
    ]
    assert len({hash_conversation(row) for row in rows}) == 6


def test_equal_pairs_are_trained_once_and_flipped_ones_are_told(prepare, write_lines):
    lines = [line(f"{s * 9}?", f"the {s}", f"no {s}") for s in SUBJECTS]
    path = write_lines(*lines, lines[0], line("catcatcatcatcatcatcatcatcat?", "no cat", "the cat"))
    report = prepare(path, "pairs", split=NONE).report
    assert report.splits["train"].num_exact_duplicates == 1
    assert report.preferences["train"].num_examples == 13
    assert report.preferences["train"].num_conflicts == 2
    assert "train: 2 pairs also stand there the other way round" in report.warnings


def test_a_given_split_that_shares_prompts_with_train_is_told(prepare, write_lines):
    held_out = write_lines(
        line("cat" * 9 + "?", "anything else", "or not"), line("why?", "so", "no"), name="v.jsonl"
    )
    lines = [line(f"{s * 9}?", f"the {s}", f"no {s}") for s in SUBJECTS]
    report = prepare(write_lines(*lines), "pairs", split={"validation": str(held_out), "test": 0.0}).report
    assert "validation: 1 of 2 rows have a prompt that train has, too" in report.warnings


# --- check and preview ------------------------------------------------------------------------------------------------


def test_check_counts_sides_and_tells_of_length_bias(write_lines, make_job, chat_tokenizer):
    lines = [line(f"{n * 7919} {n * 104729}?", "a b c d e" if n < 30 else "a", "a b") for n in range(40)]
    job = make_job(train=str(write_lines(*lines)), split=NONE)
    report = check(job, tokenizer=chat_tokenizer, rows="pairs")
    facts = report.preferences["train"]
    assert (facts.kind, facts.num_examples, facts.num_prompts) == ("pairs", 40, 40)
    assert facts.num_answers == {"chosen": 40, "rejected": 40}
    assert (facts.num_chosen_longer, facts.num_chosen_shorter) == (30, 10)
    assert facts.answer_tokens["chosen"]["50"] > facts.answer_tokens["rejected"]["50"]
    assert any("the chosen answer is longer in 75% of pairs" in text for text in report.warnings)
    assert type(report).from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("num_good", "message"),
    [
        (12, "train: all 12 answers have the label true"),
        (0, "train: all 12 answers have the label false"),
        (10, "train: 10 good and 2 bad answers; weigh them"),
        (8, None),
    ],
)
def test_check_tells_of_labels_out_of_balance(write_lines, make_job, chat_tokenizer, num_good, message):
    lines = [good(f"{s * 9}?", f"the {s}", n < num_good) for n, s in enumerate(SUBJECTS)]
    job = make_job(train=str(write_lines(*lines)), split=NONE)
    report = check(job, tokenizer=chat_tokenizer, rows="labelled")
    assert report.preferences["train"].num_answers == {"desirable": num_good, "undesirable": 12 - num_good}
    told = [f.message for f in report.findings if f.code in ("one_label", "unbalanced_labels")]
    assert [text.startswith(message or "?") for text in told] == [True] * (message is not None)


def test_check_tells_of_an_answer_with_both_labels(write_lines, make_job, chat_tokenizer):
    lines = [good(f"{s * 9}?", f"the {s}", True) for s in SUBJECTS]
    lines.append(good("catcatcatcatcatcatcatcatcat?", "the cat", False))
    job = make_job(train=str(write_lines(*lines)), split=NONE)
    report = check(job, tokenizer=chat_tokenizer, rows="labelled")
    assert "train: 2 rows give one answer to one prompt both labels" in report.warnings


def test_a_preview_shows_the_prompt_of_a_pair_once(make_pair, chat, chat_tokenizer):
    renderer = Renderer(chat_tokenizer)
    rows = renderer.render_conversation(make_pair([("user", "the cat?")], "it sat", "it ran"))
    (pair,) = preview_rows([RowGroup(tuple(rows))], chat_tokenizer)
    assert list(pair.prompt) == [
        ("<|im_start|>user↵\nthe cat?<|im_end|>↵\n<|im_start|>assistant↵\n", "masked")
    ]
    assert list(pair.chosen.segments) == [("it sat", "trained"), ("<|im_end|>", "stop")]
    assert list(pair.rejected.segments) == [("it ran", "trained"), ("<|im_end|>", "stop")]
    assert pair.num_tokens == len(rows[0].ids) + len(rows[1].ids)
    labelled = replace(chat(("user", "the cat?"), ("assistant", "it sat")), label=False)
    (shown,) = preview_rows(renderer.render_conversation(labelled), chat_tokenizer)
    assert isinstance(shown, LabelledPreview)
    assert shown.label is False


@pytest.mark.parametrize(
    ("name", "rows", "num_examples"),
    [
        ("dpo_en_demo.json", "pairs", 295),
        ("raschka_preference_1100.json", "pairs", 1094),
        ("hh_harmless_test_a.jsonl", "pairs", 1150),
        ("kto_en_demo.json", "labelled", 300),
        ("dpo_en_demo.json", "labelled", 590),
    ],
)
def test_real_sets_are_prepared_whole(shared, prepare, name, rows, num_examples):
    prepared = prepare(
        shared / "preference" / name,
        rows,
        on_bad_row="skip",
        max_tokens=1 << 20,
        split={"validation": 0.1, "test": 0.1},
    )
    assert sum(len(prepared.examples(split)) for split in prepared.splits) == num_examples
    prompts = [
        {tuple((m.role, m.content) for m in c.prompt) for c in prepared.conversations(split)}
        for split in prepared.splits
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
