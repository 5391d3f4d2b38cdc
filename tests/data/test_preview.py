"""What is shown of a row: each stretch with its fate, in text that cannot steer a terminal."""

from tunesmith.data.preview import make_printable, preview_row
from tunesmith.data.render import Renderer


def test_segments_are_masked_trained_and_stop(chat, chat_tokenizer):
    (row,) = Renderer(chat_tokenizer).render_conversation(chat(("user", "the cat?"), ("assistant", "it sat")))
    shown = preview_row(row, chat_tokenizer)
    assert list(shown.segments) == [
        ("<|im_start|>user↵\nthe cat?<|im_end|>↵\n<|im_start|>assistant↵\n", "masked"),
        ("it sat", "trained"),
        ("<|im_end|>", "stop"),
    ]
    assert shown.place == "train.jsonl:1"
    assert shown.num_tokens == len(row.ids)
    assert shown.num_targets == row.num_targets


def test_a_sentencepiece_answer_keeps_its_first_space(chat, real_tokenizers):
    llama = real_tokenizers["llama2"]
    (row,) = Renderer(llama).render_conversation(
        chat(("user", "The cat"), ("assistant", " sat."), kind="completion")
    )
    shown = preview_row(row, llama)
    assert list(shown.segments) == [("<s> The cat", "masked"), (" sat.", "trained"), ("</s>", "stop")]


def test_controls_and_direction_marks_are_spelled_out():
    assert make_printable("a\x1b[31mb\u202ec\x00\td\r\n") == "a\\u001b[31mb\\u202ec\\u0000→\td␍↵\n"
    assert make_printable("é日本 😀") == "é日本 😀"
