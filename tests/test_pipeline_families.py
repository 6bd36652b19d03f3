"""quantize_ on every family: calibration, all linears packed, undone bit for bit."""

import pytest
import torch

from fewbit.calibrate import Windows
from fewbit.families import describe
from fewbit.linear import PackedLinear
from fewbit.pipeline import quantize_
from fewbit.undo import restore_
from tiny import TWINS, probe, tiny


@pytest.mark.parametrize("twin", TWINS)
@torch.no_grad()
def test_awq_and_back(twin):
    model = tiny(twin)
    before = model(input_ids=probe()).logits
    names = list(model.state_dict())
    masks = [torch.ones(2, 17, dtype=torch.bool), torch.ones(2, 17, dtype=torch.bool)]
    masks[1][:, 12:] = False
    data = Windows([probe(seed=5), probe(seed=6)], masks)
    report = quantize_(model, "awq", "w8a16g16", data, progress=False)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 2 * len(describe(model).linears()) == len(report.linears)
    assert all(r.relative_error < 1e-3 for r in report.linears)
    dense = [r.tokens for r in report.linears if "experts" not in r.name]
    assert set(dense) == {2 * 17 + 2 * 12}
    after = model(input_ids=probe()).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
    restore_(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=probe()).logits, before, rtol=0, atol=0)
