"""The plain versions run on whatever device their arguments are on: what a card without a verified
kernel depends on. Without a card, two stand-ins: meta tensors in, meta tensors of the right shape
out; and the CPU with `meta` as the default device, where a tensor made without saying where would
not mix with the arguments."""

import signal

import pytest
import torch
from torch.utils._pytree import tree_map_only

from fewbit import ops, reference

# Their result depends on values (which columns are outliers, which group a column is in).
NEEDS_VALUES = {"gptq", "int8_mixed_linear"}


def arguments():
    w, x = torch.randn(20, 64), torch.randn(3, 64)
    codes = reference.quantize(w, 4, 32, False, "float32")
    codes8 = reference.quantize(w, 8, 32, False, "float32")
    packed, packed8 = reference.pack(*codes, 4, 32), reference.pack(*codes8, 8, 32)
    words = reference.pack_fields(codes[0], 4)
    sums = reference.code_sums(codes8[0], codes8[2], 32)
    h = x.T @ x + 64 * torch.eye(64)
    base = torch.eye(4)
    signs = torch.ones(64, dtype=torch.int8)
    c = torch.triu(torch.randn(64, 64), 1) * 0.01
    columns = torch.tensor([1, 5])
    return {
        "quantize": (w, 4, 32, False, "float16"),
        "dequantize": (*codes, 32, "float16"),
        "pseudo_quantize": (w, 4, 32, True, "bfloat16"),
        "pseudo_quantize_": (w.clone(), 4, 32, False, "float32"),
        "scaled_error": (w, torch.rand(3, 64) + 0.5, 4, 32, False, "float32"),
        "act_stats": (x, torch.zeros(64, dtype=torch.float64), torch.zeros(64)),
        "gram": (x, torch.zeros(64, 64)),
        "gptq": (w, c, 4, 32, False, "float32", "in_order", 4, h.diagonal(), None, None, None, 128),
        "coordinate_descent": (w, h, *codes, 4, 32, 1),
        "hadamard": (x, [base], signs),
        "hadamard_quantize": (x, [base], signs, 4, 0.9),
        "pack": (*codes, 4, 32),
        "unpack": (*packed, 20, 64, 4, 32),
        "pack_fields": (codes[0], 4, False),
        "unpack_fields": (words, 4, 64, False),
        "quantize_per_token": (x, False, None, None),
        "norm_quantize": (x, torch.ones(64), torch.ones(64), 1e-5, False, True),
        "w4a16_linear": (x, *packed, torch.zeros(20), 20, 4, 32),
        "w4a4_linear": (x, *packed, torch.zeros(20), 20, 32, None, None),
        "w8a8_linear": (x, *packed8, None, 20, 8, 32, False, None, None, sums),
        "int8_mixed_linear": (x, *packed8, None, 20, 32, 1.5, None, columns, torch.randn(2, 20)),
    }


def tensors(result):
    return result if isinstance(result, tuple) else () if result is None else (result,)


def test_every_operator_is_here():
    assert set(arguments()) == set(ops.__all__)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - NEEDS_VALUES))
def test_meta_in_meta_out(name):
    given = arguments()[name]
    on_meta = tree_map_only(torch.Tensor, lambda a: a.to("meta"), given)
    want, got = (tensors(getattr(reference, name)(*a)) for a in (given, on_meta))
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert g.device.type == "meta" and g.shape == w.shape and g.dtype == w.dtype


@pytest.mark.parametrize("name", ops.__all__)
def test_new_tensors_are_made_beside_the_arguments(name):
    given, again = arguments()[name], None
    copies = tree_map_only(torch.Tensor, torch.Tensor.clone, given)
    want = tensors(getattr(reference, name)(*given))
    with torch.device("meta"):
        again = tensors(getattr(reference, name)(*copies))
    for w, g in zip(want, again, strict=True):
        assert g.device.type == "cpu" and torch.equal(w, g)


# ---- what the native module does before it calls them --------------------------------------------


def elsewhere(name, *given):
    """The op as on a device without kernels: its entry for any other backend, on CPU tensors."""
    op = getattr(torch.ops.fewbit, name).default
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return op.redispatch(other, *given)


@pytest.mark.parametrize("name", ops.__all__)
def test_a_device_without_kernels_gets_the_plain_version(name):
    given = arguments()[name]
    copies = tree_map_only(torch.Tensor, torch.Tensor.clone, given)
    want = tensors(getattr(reference, name)(*given))
    for w, g in zip(want, tensors(elsewhere(name, *copies)), strict=True):
        assert w.dtype == g.dtype and torch.equal(w, g)
    for g, c in zip(given, copies, strict=True):  # what is written in place
        assert not isinstance(g, torch.Tensor) or torch.equal(g, c)


def spoilt(given):
    """The arguments with one of them wrong, one after the other."""
    for i, a in enumerate(given):
        wrong = ()
        if isinstance(a, torch.Tensor):
            wrong = (a[..., :-1], a[None], a.double(), a.bool(), a.to_sparse())
        elif isinstance(a, list):
            wrong = ([torch.eye(3)], [torch.ones(4, 2)], [torch.eye(4, dtype=torch.long)])
        elif isinstance(a, str):
            wrong = ("nonsense",)
        elif isinstance(a, float):
            wrong = (-1.0, 3.0)
        elif isinstance(a, int) and not isinstance(a, bool):
            wrong = (-7, 9, 1 << 40)
        for w in wrong:
            yield (*given[:i], w, *given[i + 1 :])


def outcome(function, *given):
    copies = tree_map_only(torch.Tensor, torch.Tensor.clone, given)
    try:
        function(*copies)
    except ValueError as error:
        return str(error)
    except (RuntimeError, OverflowError) as error:
        return type(error)
    return "served"


@pytest.mark.parametrize("name", ops.__all__)
def test_wrong_arguments_are_refused_on_every_device_in_the_same_words(name):
    native = getattr(torch.ops.fewbit, name).default
    refused = 0
    for given in spoilt(arguments()[name]):
        dense = all(not isinstance(a, torch.Tensor) or not a.is_sparse for a in given)
        want, got = outcome(native, *given), outcome(lambda *a: elsewhere(name, *a), *given)
        assert got == want or (not dense and "must be dense" in got)
        refused += want != "served"
    assert refused >= 3


def test_arguments_on_two_devices_are_refused():
    x, g = torch.randn(3, 8), torch.zeros(8, 8, device="meta")
    with pytest.raises(ValueError, match=r"gram: tensors must lie on one device, got cpu and meta"):
        elsewhere("gram", x, g)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 only prints why")
def test_what_the_plain_version_refuses_is_a_value_error():
    q, s, z = reference.quantize(torch.randn(16, 64), 8, 32, False, "float32")
    says = r"^q holds codes above 15, the largest of 4 bits \[FB100\]$"
    with pytest.raises(ValueError, match=says):
        elsewhere("pack", q, s, z, 4, 32)
    *given, columns, weight = arguments()["int8_mixed_linear"]
    with pytest.raises(ValueError, match=r"^kept must hold columns in 0..63 \[FB100\]$"):
        elsewhere("int8_mixed_linear", *given, columns + 60, weight)
    given = list(arguments()["gptq"])
    given[9] = torch.zeros(64, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^order must hold every column 0..63 once"):
        elsewhere("gptq", *given)
    given[9] = torch.arange(64).reshape(2, 32).T.reshape(64)  # between groups and back
    with pytest.raises(ValueError, match="order leaves and re-enters a group"):
        elsewhere("gptq", *given)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 only prints why")
def test_ctrl_c_stays_one_in_the_plain_version():
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            elsewhere("coordinate_descent", *arguments()["coordinate_descent"][:-1], 1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_text_of_an_argument_is_not_taken_for_an_error_of_torch():
    w, *_ = arguments()["quantize"]
    with pytest.raises(ValueError, match='^scale_dtype must be .* got "API call failed"'):
        ops.quantize(w, 4, 32, False, "API call failed")
