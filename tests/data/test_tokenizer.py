"""A tokenizer that adds nothing, knows every stop id, and refuses to outgrow its embedding."""

import json
import shutil
import subprocess
import sys

import pytest

from tunesmith.core.errors import DataError, ModelError, TunesmithError
from tunesmith.core.types import Message
from tunesmith.data.render import Renderer
from tunesmith.data.tokenizer import load_tokenizer


@pytest.fixture
def folder(chat_folder, tmp_path):
    """A copy of the small model folder that a test may change."""
    return shutil.copytree(chat_folder, tmp_path / "model")


def write(path, value):
    path.write_text(json.dumps(value))


def test_the_real_vocabularies_give_llama_cpps_ids(real_tokenizers, shared):
    for name, file in (("gpt2", "gpt-2"), ("llama2", "llama-spm")):
        inputs = (shared / f"golden/tokenizer/ggml-vocab-{file}.gguf.inp").read_bytes().decode()
        outputs = (shared / f"golden/tokenizer/ggml-vocab-{file}.gguf.out").read_text().split("\n")
        texts = inputs.split("\n__ggml_vocab_test__\n")
        assert len(texts) == 47
        for text, ids in zip(texts, outputs, strict=False):
            assert real_tokenizers[name].encode(text) == [int(number) for number in ids.split()], text


def test_stop_ids_come_from_all_three_files(folder):
    write(folder / "config.json", {"eos_token_id": 0, "vocab_size": 400})
    write(folder / "generation_config.json", {"eos_token_id": [0, 1]})
    assert load_tokenizer(folder).eos_ids == (2, 0, 1)


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder):
    size = load_tokenizer(folder).vocab_size
    write(folder / "config.json", {"vocab_size": size})
    assert load_tokenizer(folder).vocab_size == size
    write(folder / "config.json", {"vocab_size": size - 1})
    with pytest.raises(ModelError, match=rf"ids up to {size - 1}, the embedding {size - 1} rows") as caught:
        load_tokenizer(folder)
    assert caught.value.exit_code == 2


def test_the_template_is_found_wherever_it_is_kept(folder):
    (folder / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(folder).chat_template == "from a file"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(folder).chat_template == "plain"


def test_a_tokenizer_without_template_is_refused_when_chat_needs_one(folder):
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    renderer = Renderer(load_tokenizer(folder))
    with pytest.raises(DataError, match="has no chat template") as caught:
        renderer.render_prompt([Message("user", "hi")])
    assert "data.template" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_gets_no_token_that_it_does_not_spell(real_tokenizers):
    for tokenizer in real_tokenizers.values():
        assert tokenizer.bos_id not in tokenizer.encode("hello")
    llama = real_tokenizers["llama2"]
    assert llama.adds_bos
    assert llama.encode("<s>hello")[0] == llama.bos_id


def test_a_continuation_has_no_space_of_its_own(real_tokenizers):
    llama = real_tokenizers["llama2"]
    assert llama.decode([*llama.encode("un"), *llama.encode_continuation("happy")]) == "unhappy"
    assert llama.decode([*llama.encode("un"), *llama.encode("happy")]) == "un happy"


def test_pieces_join_to_the_text(real_tokenizers):
    texts = ["Hi", " there", "\n\né日本", "  x", "<0x0A>", "\t", "…"]
    for name, tokenizer in real_tokenizers.items():
        pieces = tokenizer.encode_pieces(texts, [False, *[True] * (len(texts) - 1)])
        assert tokenizer.decode([i for piece in pieces for i in piece.ids]) == "".join(texts), name


def test_saving_copies_the_base_models_own_files(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_new_tokens_become_one_id_and_are_saved(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    size, before = tokenizer.vocab_size, tokenizer.sha256
    assert tokenizer.add_tokens(["<ticket>", "<|im_end|>"]) == [size, 2]
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("a<ticket>b")[1] == size
    assert tokenizer.sha256 != before
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode("a<ticket>b") == tokenizer.encode("a<ticket>b")


def test_the_hash_follows_vocabulary_and_template(folder):
    before = load_tokenizer(folder).sha256
    assert load_tokenizer(folder).sha256 == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).sha256 != before


@pytest.mark.parametrize(
    ("break_it", "finding"),
    [
        (lambda f: (f / "tokenizer.json").write_text('{"version": '), "cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "is not UTF-8"),
    ],
)
def test_damaged_tokenizers_are_told_in_one_line(folder, break_it, finding):
    break_it(folder)
    with pytest.raises(TunesmithError) as caught:
        load_tokenizer(folder)
    assert finding in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_data_imports_neither_torch_nor_transformers():
    modules = (
        "batch checks collect formats hub prepare preview render sources split stream template tokenizer"
    )
    imports = "; ".join(f"import tunesmith.data.{name}" for name in modules.split())
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'rensa'} & set(sys.modules)"
    code = f"import sys; {imports}; print({heavy})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
