import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.formats import bits as fields


def stream(codes, bits):
    """The dense stream as one big integer, cut into words: the definition, in plain Python."""
    value = sum(c << (bits * i) for i, c in enumerate(codes))
    words = [(value >> (32 * i)) & 0xFFFFFFFF for i in range(fields.words(len(codes), bits))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@given(st.integers(2, 8), st.integers(0, 130), st.integers(0, 3), st.randoms())
def test_pack_is_the_stream_and_unpack_its_inverse(bits, k, rows, random):
    q = [[random.randrange(1 << bits) for _ in range(k)] for _ in range(rows)]
    codes = torch.tensor(q, dtype=torch.uint8).reshape(rows, k)
    packed = fields.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [stream(row, bits) for row in q]
    assert torch.equal(fields.unpack(packed, bits, k), codes)


def test_three_bit_vector():
    # formats.md 3.3: q = 0 3 6 1 4 7 2 5 repeated.
    q = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5] * 4, dtype=torch.uint8)
    words = [w & 0xFFFFFFFF for w in fields.pack(q, 3).tolist()]
    assert words == [0x98ABC398, 0xC398ABC3, 0xABC398AB]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_layout_wastes_the_top_bits(bits):
    per = 32 // bits
    q = torch.randint(0, 1 << bits, (3, 64), dtype=torch.uint8)
    words = torch.zeros(3, fields.words_padded(64, bits), dtype=torch.int64)
    for i in range(64):
        words[:, i // per] |= q[:, i].long() << (bits * (i % per))
    assert torch.equal(fields.unpack_padded(words.to(torch.int32), bits, 64), q)


def test_views_are_packed_as_they_read():
    q = torch.randint(0, 16, (70, 40), dtype=torch.uint8)
    assert torch.equal(fields.pack(q.T, 4), fields.pack(q.T.contiguous(), 4))
    packed = fields.pack(q.T, 4)
    assert torch.equal(fields.unpack(packed.T.contiguous().T, 4, 70), q.T)
