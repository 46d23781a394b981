"""Deployed codes that are no numbers."""

import pytest
import torch

from ospq_export.formats.choice import named
from ospq_export.graph.quantizers import ActivationQuantizer
from ospq_export.validate.codes.locate import MAX_EXCESS
from ospq_export.validate.codes.records import CodeDifferences


@pytest.mark.parametrize(
    ("name", "broken", "steps"), [("fp8", 0x7F, 252), ("fp8", 0xFF, 252), ("nvfp4", float("nan"), 14)]
)
def test_a_code_that_is_no_number_is_a_fault(name, broken, steps):
    quantizer = ActivationQuantizer("q", named(name, weight=False), may_shift=False)
    quantizer.scale.fill_(0.5)
    x = torch.linspace(-3, 3, 32)[None]
    levels = quantizer.codes(x)
    # What ONNX Runtime returns: bytes of FP8, levels from a file for checking.
    codes = quantizer.format.encode(levels) if name == "fp8" else levels
    found = CodeDifferences()
    found.add(quantizer, x, codes)
    assert found.share == 0 and found.excess <= 0 and sum(found.histogram) == 32
    codes[0, 3] = broken
    found.add(quantizer, x, codes)
    assert found.differing == 1 and found.max_step == steps
    assert found.excess == steps > MAX_EXCESS[True]
    assert sum(found.histogram) == 63
