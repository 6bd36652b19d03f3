"""Words of checkpoint formats: bit streams along rows, and AWQ's eight interleaved rows."""

import pytest
import torch

from fewbit import ops, reference

SIZES = [
    (0, 5),
    (3, 0),
    (1, 1),
    (2, 7),
    (3, 8),
    (1, 9),
    (5, 31),
    (2, 32),
    (4, 33),
    (3, 70),
    (2, 257),
]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows, columns", SIZES)
def test_equals_the_reference(isa, bits, rows, columns):
    q = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    words = ops.pack_fields(q, bits)
    assert torch.equal(words, reference.pack_fields(q, bits))
    assert torch.equal(ops.unpack_fields(words, bits, columns), q)
    assert torch.equal(reference.unpack_fields(words, bits, columns), q)


@pytest.mark.parametrize("rows, columns", [(0, 5), (8, 0), (8, 1), (16, 33), (64, 17)])
def test_interleaved_equals_the_reference(isa, rows, columns):
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    words = ops.pack_fields(q, 4, True)
    assert torch.equal(words, reference.pack_fields(q, 4, True))
    assert torch.equal(ops.unpack_fields(words, 4, columns, True), q)
    assert torch.equal(reference.unpack_fields(words, 4, columns, True), q)


def test_words_to_spare_and_views(isa):
    q = torch.randint(0, 8, (6, 40), dtype=torch.uint8)
    words = torch.nn.functional.pad(ops.pack_fields(q, 3), (0, 2), value=-1)
    assert torch.equal(ops.unpack_fields(words, 3, 40), q)
    assert torch.equal(ops.pack_fields(q.T, 3), ops.pack_fields(q.T.contiguous(), 3))


def test_is_a_proper_torch_op():
    q = torch.randint(0, 16, (8, 24), dtype=torch.uint8)
    for interleave in (False, True):
        torch.library.opcheck(torch.ops.fewbit.pack_fields.default, (q, 4, interleave))
        words = ops.pack_fields(q, 4, interleave)
        torch.library.opcheck(torch.ops.fewbit.unpack_fields.default, (words, 4, 24, interleave))


def test_says_what_is_wrong():
    q = torch.zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits must be in 2..8, got 9"):
        ops.pack_fields(q, 9)
    with pytest.raises(ValueError, match="q must be Byte, got Int"):
        ops.pack_fields(q.int(), 4)
    with pytest.raises(ValueError, match="rows in eights, got 4 bits and 4 rows"):
        ops.pack_fields(q, 4, True)
    words = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="22 columns of 3 bits need 3 words a row, got 2"):
        ops.unpack_fields(words, 3, 22)
    with pytest.raises(ValueError, match="columns must be in 0..64"):
        ops.unpack_fields(words, 3, 1 << 62)
    with pytest.raises(ValueError, match="interleaving needs 4 bits"):
        ops.unpack_fields(words, 3, 2, True)
