"""Against the peers' own code: pack here, unpack there, and back; bit for bit.

Needs the ``dev`` extra (and GPTQModel and AutoAWQ, which are installed with --no-deps); what is
absent is skipped. Older compressed-tensors: ``pip install --no-deps --target OLD
compressed-tensors==0.17.0``, then ``PYTHONPATH=OLD pytest tests/formats/test_peers.py``.
"""

import importlib
from importlib.metadata import version

import pytest
import torch
from strategies import dequantize, random_codes, same

from fewbit import formats
from fewbit.formats import bits as fields
from fewbit.formats.awq import Gemm, Gemv, GemvFast
from fewbit.formats.bitsandbytes import LLM_INT8, Bnb4, LlmInt8
from fewbit.formats.compressed_tensors import IntQuantized, PackQuantized
from fewbit.formats.gptq import Gptq, GptqV2
from fewbit.scheme import Scheme


def peer(module):
    """Import, or skip with what is missing; peers warn, print and fail in many ways."""
    try:
        return importlib.import_module(module)
    except BaseException as error:  # noqa: B036 - some peers leave by SystemExit
        pytest.skip(f"{module} cannot be imported: {error}")


pytestmark = pytest.mark.filterwarnings("ignore")
GRIDS = [(b, g, s) for b in (2, 3, 4, 8) for g in (32, -1) for s in (True, False)]


def dense():
    """Since 0.18 compressed-tensors' fields of 3, 5, 6 and 7 bits straddle words."""
    release = version("compressed-tensors").split(".")
    return tuple(int(part) for part in release[:2]) >= (0, 18)


@pytest.mark.parametrize("elements", [13, 64, 96])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_words_of_every_version(bits, elements):
    """Rows of words and columns of words, in the layout of the version that is installed."""
    for place in ("pack_quantized.helpers", "quantized_compressors.pack_quantized"):
        try:
            theirs = importlib.import_module(f"compressed_tensors.compressors.{place}")
            break
        except ImportError:
            continue
    else:
        pytest.skip("compressed_tensors has no packing functions that are known")
    scheme, n = Scheme(bits, -1, False), 240  # whole words: 0.9.4 cannot pack a ragged column
    codes = random_codes(n, elements, scheme)
    middle = 1 << (bits - 1)
    rows = theirs.pack_to_int32((codes.q.int() - middle).to(torch.int8), bits)
    zeros = (codes.zero_point.int() - middle).to(torch.int8)
    zeros = theirs.pack_to_int32(zeros, bits, packed_dim=0)
    stored = {
        "weight_packed": rows,
        "weight_zero_point": zeros,
        "weight_scale": codes.scale,
        "weight_shape": torch.tensor([n, elements]),
    }
    section = PackQuantized().config({"a": scheme}, [])
    format = formats.parse(section | {"version": version("compressed-tensors")}).format
    format.check(stored, scheme, n, elements)
    assert same(format.unpack(stored, scheme), codes)
    if dense() or fields.WORD % bits == 0:
        ours = format.pack(codes, scheme)
        assert all(torch.equal(ours[name], tensor) for name, tensor in stored.items())
        there = theirs.unpack_from_int32(ours["weight_packed"], bits, torch.Size([n, elements]))
        assert torch.equal(there.int() + middle, codes.q.int())


@pytest.mark.parametrize("bits, group_size, symmetric", GRIDS)
def test_compressed_tensors_pack_quantized(bits, group_size, symmetric):
    base = peer("compressed_tensors.compressors.pack_quantized.base")
    quantization = peer("compressed_tensors.quantization")
    if bits == 3 and not dense():
        pytest.skip("this compressed-tensors reads padded words only, which are not written")
    scheme = Scheme(bits, group_size, symmetric, "float32")
    n, k = 40, 96
    codes = random_codes(n, k, scheme, dtype=torch.float32)
    config = PackQuantized().config({"a": scheme}, [])["config_groups"]["group_0"]
    theirs = quantization.QuantizationScheme.model_validate(config)
    compressor = base.PackedQuantizationCompressor
    tensors = PackQuantized().pack(codes, scheme)
    # There: the independent reader dequantises our file to the same weight.
    weight = compressor.decompress(dict(tensors), theirs)["weight"]
    want = dequantize(codes, scheme).float()  # one rounding, as in float32 arithmetic
    assert torch.equal(weight, want)
    # Back: it packs the same codes to the same bytes.
    state = {"weight": weight, "weight_scale": codes.scale}
    if not symmetric:
        signed = codes.zero_point.int() - (1 << (bits - 1))
        state["weight_zero_point"] = signed.to(torch.int8)
    packed = compressor.compress(state, theirs)
    assert set(packed) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(packed[name], tensor), name


@pytest.mark.parametrize("activations", ["token", "static", "asymmetric"])
def test_compressed_tensors_int_quantized(activations):
    base = peer("compressed_tensors.compressors.naive_quantized.base")
    quantization = peer("compressed_tensors.quantization")
    static, symmetric = activations != "token", activations != "asymmetric"
    scheme = Scheme(
        8, -1, True, "float32", activation_bits=8, activations="static" if static else "token",
        symmetric_activations=symmetric,
    )  # fmt: skip
    codes = random_codes(24, 64, scheme, dtype=torch.float32)
    extras = {"input_scale": torch.full((1,), 0.5), "input_zero_point": torch.tensor([-3]).char()}
    extras = dict(list(extras.items())[: static + (not symmetric)])
    tensors = IntQuantized().pack(codes, scheme, **extras)
    config = IntQuantized().config({"a": scheme}, [])["config_groups"]["group_0"]
    theirs = quantization.QuantizationScheme.model_validate(config)
    compressor = base.IntQuantizationCompressor
    weight = compressor.decompress(dict(tensors), theirs)["weight"]
    assert torch.equal(weight, dequantize(codes, scheme).float())
    packed = compressor.compress({"weight": weight, "weight_scale": codes.scale, **extras}, theirs)
    assert set(packed) == set(tensors)
    assert all(torch.equal(packed[name], tensor) for name, tensor in tensors.items())
    IntQuantized().check(packed, scheme, 24, 64)
    assert same(IntQuantized().unpack(packed, scheme), codes)
    assert IntQuantized().extras(packed, scheme) == extras


def test_compressed_tensors_one_scale_a_tensor():
    base = peer("compressed_tensors.compressors.naive_quantized.base")
    quantization = peer("compressed_tensors.quantization")
    scheme = Scheme(8, -1, True, "float32", activation_bits=8)
    config = IntQuantized().config({"a": scheme}, [])["config_groups"]["group_0"]
    config["weights"]["strategy"] = "tensor"
    theirs = quantization.QuantizationScheme.model_validate(config)
    q = random_codes(24, 64, scheme).q.int() - 128
    state = {"weight": q * 0.25, "weight_scale": torch.tensor([0.25])}
    packed = base.IntQuantizationCompressor.compress(state, theirs)
    IntQuantized().check(packed, scheme, 24, 64)
    weight = dequantize(IntQuantized().unpack(packed, scheme), scheme)
    assert torch.equal(weight.float(), state["weight"])


@pytest.mark.parametrize("group_size", [32, -1])
def test_autoawq_gemm(group_size):
    packing = peer("awq.utils.packing_utils")
    gemm = peer("awq.modules.linear.gemm")
    scheme = Scheme(4, group_size)
    n, k = 64, 96
    codes = random_codes(n, k, scheme)
    tensors = Gemm().pack(codes, scheme)
    size = scheme.group_of(k)
    weight = packing.dequantize_gemm(
        tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, size
    )
    assert torch.equal(weight.T, dequantize(codes, scheme).float())
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float64)
    linear.weight.data = dequantize(codes, scheme)
    scale, zero = codes.scale.double().T.contiguous(), codes.zero_point.double().T.contiguous()
    packed = gemm.WQLinear_GEMM.from_linear(linear, 4, size, False, scale, zero)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(packed, name), tensor), name


@pytest.mark.parametrize("module, format", [("gemv", Gemv()), ("gemv_fast", GemvFast())])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_autoawq_gemv_files_are_read(module, format, group_size):
    theirs = peer(f"awq.modules.linear.{module}")
    scheme, n, k = Scheme(4, group_size), 16, 256
    codes = random_codes(n, k, scheme)
    linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float64)
    linear.weight.data = dequantize(codes, scheme)
    kind = theirs.WQLinear_GEMV if module == "gemv" else theirs.WQLinear_GEMVFast
    zero, scale = codes.zero_point.double(), codes.scale.double()
    stored = dict(kind.from_linear(linear, 4, group_size, False, scale, zero).named_buffers())
    format.check(stored, scheme, n, k)
    assert format.size({s: t.shape for s, t in stored.items()}, scheme) == (n, k)
    assert same(format.unpack(stored, scheme), codes)


@pytest.mark.parametrize("bits, group_size, symmetric", GRIDS)
def test_gptqmodel(bits, group_size, symmetric):
    module = peer("gptqmodel.nn_modules.qlinear.torch")
    convert = peer("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    config = peer("gptqmodel.quantization.config").QuantizeConfig(bits=bits)
    scheme, n, k = Scheme(bits, group_size, symmetric), 64, 96
    codes = random_codes(n, k, scheme, low=1)
    theirs = module.TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=False,
        in_features=k,
        out_features=n,
        bias=False,
    )
    tensors = GptqV2().pack(codes, scheme)
    for name, tensor in tensors.items():
        assert getattr(theirs, name).shape == tensor.shape, name
        getattr(theirs, name).data.copy_(tensor)
    theirs.scales = theirs.scales.float()
    assert torch.equal(theirs.dequantize_weight().T, dequantize(codes, scheme).float())
    # Back: their packer on the same weight, then their conversion to v1.
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = dequantize(codes, scheme).float()
    g_idx = tensors["g_idx"]
    theirs.pack_original(linear, codes.scale.float(), codes.zero_point.float(), g_idx)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(theirs, name), tensor), name
    convert(theirs, config)
    assert torch.equal(theirs.qzeros, Gptq().pack(codes, scheme)["qzeros"])


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bits, symmetric", [(2, False), (4, True), (4, False), (8, True)])
def test_gptqmodel_columns_in_activation_order_are_read(bits, symmetric, version):
    module = peer("gptqmodel.nn_modules.qlinear.torch")
    convert = peer("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    config = peer("gptqmodel.quantization.config").QuantizeConfig(bits=bits)
    scheme, n, k = Scheme(bits, 32, symmetric), 64, 96
    codes = random_codes(n, k, scheme, low=1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(k, dtype=torch.int32)
    g_idx[order] = (torch.arange(k) // 32).to(torch.int32)
    theirs = module.TorchLinear(
        bits=bits, group_size=32, sym=symmetric, desc_act=True, in_features=k, out_features=n,
        bias=False,
    )  # fmt: skip
    group = g_idx.long()
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = (codes.q.float() - codes.zero_point[:, group]) * codes.scale[:, group]
    theirs.pack_original(linear, codes.scale.float(), codes.zero_point.float(), g_idx)
    theirs.eval()
    if version == "v1":
        convert(theirs, config)
    stored = {s: getattr(theirs, s).half() if s == "scales" else getattr(theirs, s)
              for s in ("qweight", "qzeros", "scales", "g_idx")}  # fmt: skip
    format = Gptq() if version == "v1" else GptqV2()
    format.check(stored, scheme, n, k)
    read, found = format.unpack(stored, scheme), format.extras(stored, scheme)["order"]
    assert torch.equal(dequantize(read, scheme).float(), linear.weight.data[:, found])


@pytest.mark.parametrize("bits, symmetric", [(2, False), (3, False), (4, True), (8, False)])
def test_gptqmodel_reads_version_one(bits, symmetric):
    model = peer("gptqmodel.utils.model")
    module = peer("gptqmodel.nn_modules.qlinear.torch")
    scheme, n, k = Scheme(bits, 32, symmetric), 64, 96
    codes = random_codes(n, k, scheme, low=1)
    theirs = module.TorchLinear(
        bits=bits, group_size=32, sym=symmetric, desc_act=False, in_features=k, out_features=n,
        bias=False,
    )  # fmt: skip
    for name, tensor in Gptq().pack(codes, scheme).items():
        getattr(theirs, name).data.copy_(tensor)
    model.convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
    theirs.scales = theirs.scales.float()
    assert torch.equal(theirs.dequantize_weight().T, dequantize(codes, scheme).float())


@pytest.mark.parametrize("group_size", [32, -1])
def test_gptqmodel_reads_and_writes_awq(group_size):
    packing = peer("gptqmodel.quantization.awq.utils.packing_utils")
    scheme = Scheme(4, group_size)
    codes = random_codes(64, 96, scheme)
    tensors, size = Gemm().pack(codes, scheme), scheme.group_of(96)
    parts = tensors["qweight"], tensors["qzeros"], tensors["scales"].float()
    weight = packing.dequantize_gemm(*parts, bits=4, group_size=size)
    assert torch.equal(weight.T, dequantize(codes, scheme).float())
    packed = packing.pack_awq(codes.q.T.int(), codes.zero_point.T.int(), 4)
    for name, tensor in zip(("qweight", "qzeros"), packed, strict=True):
        assert torch.equal(tensor, tensors[name]), name


def test_bitsandbytes_llm_int8():
    functional = peer("bitsandbytes.functional")
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).half()
    weight, scb, _ = functional.int8_vectorwise_quant(w)
    stored = {"weight": weight, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}
    codes = LlmInt8().unpack(stored, LLM_INT8)
    again = LlmInt8().pack(codes, LLM_INT8)
    assert torch.equal(again["weight"], weight)
    assert torch.equal(again["SCB"] / 127, scb / 127)
    there = functional.int8_vectorwise_dequant(again["weight"], again["SCB"])
    bound = 2 * torch.finfo(torch.float32).eps * there.abs()  # they multiply by 1/127
    assert bool(((there - dequantize(codes, LLM_INT8)).abs() <= bound).all())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bit(kind, nested):
    functional = peer("bitsandbytes.functional")
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(
        w, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    stored = {"weight": packed}
    for name, value in state.as_dict(packed=True).items():
        stored[f"weight.{name}"] = value
    ours = Bnb4().weight(stored, 48, 128, "w")
    assert torch.equal(ours, functional.dequantize_4bit(packed, state))
