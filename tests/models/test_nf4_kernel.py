"""The arithmetic of the Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors.

It does not round to bf16 and fp8 as a GPU does, so that values are compared in fp32 here; test_fp8.py compares bits on
a GPU.
"""

from __future__ import annotations

from segment_tools import interpret

SCRIPT = """
import torch
from tunesmith.models import nf4_kernel
from tunesmith.models.quant import Nf4Matrix

torch.manual_seed(0)
for outputs, inputs in ((96, 128), (70, 64), (33, 192)):
    for double_quant in (True, False):
        matrix = Nf4Matrix(torch.randn(outputs, inputs) * 0.05, double_quant=double_quant)
        stored = (matrix.packed, matrix.absmax, matrix.outer_absmax, matrix.offset)
        dense = matrix.dense(torch.float32)
        found = torch.empty(outputs, inputs)
        nf4_kernel.unpack_into(found, *stored)
        assert torch.equal(found, dense)
        inverse = 448 / dense.abs().amax(1)
        expected = (dense * inverse[:, None]).clamp(-448, 448)
        for transposed in (False, True):
            # Between rows (or columns) of other matrices, which stay as they are.
            whole = torch.zeros(outputs + 10, inputs)
            whole = whole.t().contiguous() if transposed else whole
            out = whole[:, 5 : 5 + outputs] if transposed else whole[5 : 5 + outputs]
            nf4_kernel.unpack_fp8_into(
                out, *stored, inverse=inverse, shape=(outputs, inputs), transposed=transposed
            )
            assert torch.equal(out.t() if transposed else out, expected)
            assert whole.count_nonzero() == expected.count_nonzero()
    codes = torch.randint(256, (outputs, inputs), dtype=torch.uint8)
    found = torch.empty(inputs, outputs, dtype=torch.uint8)
    nf4_kernel.transpose_into(found, codes)
    assert torch.equal(found, codes.t())
"""


def test_the_kernels_write_what_plain_torch_does() -> None:
    interpret(SCRIPT)
