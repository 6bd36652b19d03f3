"""unpack_fields on words that pack_fields did not write: every bit pattern is read as it stands."""

import pytest
import torch

from fewbit import ops, reference


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("words", [1, 2, 7, 16])
def test_any_words_read_as_the_reference_reads_them(isa, bits, words):
    packed = torch.randint(-(2**31), 2**31, (3, words)).to(torch.int32)
    for columns in {0, 1, 32 * words // bits - 1, 32 * words // bits}:
        want = reference.unpack_fields(packed, bits, columns)
        assert torch.equal(ops.unpack_fields(packed, bits, columns), want)


def test_any_interleaved_words(isa):
    packed = torch.randint(-(2**31), 2**31, (3, 37)).to(torch.int32)
    want = reference.unpack_fields(packed, 4, 37, True)
    assert torch.equal(ops.unpack_fields(packed, 4, 37, True), want)
    assert torch.equal(ops.pack_fields(want, 4, True), packed)
