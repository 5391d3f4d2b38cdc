"""Own-decoder training imports neither transformers nor peft."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def test_training_on_the_own_decoder_loads_no_framework(hf_folders: Any) -> None:
    program = f"""
import sys
from tunesmith.infer.generate import generate
from tunesmith.job.spec import LoraSpec
from tunesmith.models.heap import keep_freed_memory
from tunesmith.models.load import load_model
from tunesmith.models.lora import add_lora
model = load_model({str(hf_folders("llama")[0])!r}, base="nf4")
assert keep_freed_memory() is keep_freed_memory()
add_lora(model, LoraSpec(name="qlora", rank=4), seed=0)
generate(model, [[3, 4]], max_new_tokens=2, stop_ids=[])
loaded = {{"transformers", "peft", "bitsandbytes", "torchao"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
