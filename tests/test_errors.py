"""The error catalogue is whole: every raise is in it, and a user's call raises every entry."""

import ast
import importlib
import inspect
import json
import re
import sys

import pytest
import torch

import fewbit
from conftest import ROOT
from fewbit import errors
from fewbit.cli import main
from fewbit.recipes import Recipe
from tiny import tiny

PACKAGE = ROOT / "python" / "fewbit"
TOKENS = [torch.arange(32).remainder(97).tolist() for _ in range(2)]
# Not errors that reach a user: abstract methods, Python's own protocol of missing attributes, and
# what patterns.py turns into a CheckpointError itself.
ALLOWED = {
    "NotImplementedError": None, "AttributeError": {"__init__.py"}, "KeyError": {"patterns.py"},
    "_Enough": {"calibrate.py"}, "type(error)": None, "KeyboardInterrupt": {"interrupt.py"},
}  # fmt: skip

TRIGGERS = {}


def raises(id):
    """Registers what a user does to get error ``id``; the function gets an empty directory."""

    def register(function):
        TRIGGERS[id] = function
        return function

    return register


def quantized(folder):
    model = tiny("llama-gqa")
    fewbit.quantize_(model, "rtn", scheme="w4a16g16", progress=False)
    fewbit.save(model, folder / "model", format="fewbit")
    return folder / "model"


@raises("FB100")
def _(folder):
    fewbit.Scheme.parse("w9")


@raises("FB702")
def _(folder):
    from fewbit import stream

    with stream._out_of_memory():
        torch.empty(2**60)


@raises("FB700")
def _(folder):
    from fewbit.distributed import lost

    with lost():
        raise RuntimeError("Connection closed by peer")  # what torch.distributed raises


@raises("FB701")
def _(folder):
    from fewbit import durable

    durable.write(folder / "missing" / "file", b"data")


@raises("FB101")
def _(folder):
    model = tiny("llama-gqa")
    for _ in range(2):
        fewbit.quantize_(model, "rtn", progress=False)


@raises("FB102")
def _(folder):
    fewbit.restore_(tiny("llama-gqa"))


@raises("FB103")
def _(folder):
    fewbit.convert(quantized(folder), folder / "model", "gptq")


@raises("FB104")
def _(folder):
    model = tiny("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    fewbit.quantize_(model, "rtn", progress=False)


@raises("FB200")
def _(folder):
    fewbit.quantize_(tiny("llama-gqa"), "awq", calibration=7, progress=False)


@raises("FB201")
def _(folder):
    fewbit.quantize_(tiny("llama-gqa"), "awq", progress=False)


@raises("FB202")
def _(folder):
    fewbit.perplexity(tiny("llama-gqa"), torch.arange(20), window=32)


@raises("FB203")
def _(folder):
    fewbit.quantize_(tiny("llama-gqa"), "awq", calibration=folder / "none.txt", progress=False)


@raises("FB204")
def _(folder):
    fewbit.quantize_(tiny("llama-gqa"), "awq", calibration=[[5000] * 40], progress=False)


@raises("FB205")
def _(folder):
    model = tiny("llama-gqa")
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)  # finite, and overflows
    fewbit.quantize_(model, "awq", scheme="w4a16g16", calibration=TOKENS, progress=False)


@raises("FB206")
def _(folder):
    model = tiny("llama-gqa")
    fewbit.quantize_(
        model, "gptq", scheme="w4a16g16", calibration=[[1, 1]], strict=True, damp=0.0,
        progress=False,
    )


@raises("FB300")
def _(folder):
    path = quantized(folder) / "config.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 8'))
    fewbit.load(path.parent)


@raises("FB301")
def _(folder):
    fewbit.load(folder)


@raises("FB302")
def _(folder):
    path = quantized(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fewbit.load(path.parent)


@raises("FB303")
def _(folder):
    (quantized(folder) / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    fewbit.load(folder / "model")


@raises("FB400")
def _(folder):
    fewbit.save(torch.nn.Linear(2, 2), folder / "out")


@raises("FB401")
def _(folder):
    fewbit.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), "rtn", progress=False)


@raises("FB402")
def _(folder):
    model = tiny("llama-gqa")
    fewbit.quantize_(model, "rtn", scheme="w3a16g16", progress=False)
    fewbit.save(model, folder / "out", format="awq")


@raises("FB403")
def _(folder):
    path = quantized(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "quip"
    path.write_text(json.dumps(config))
    fewbit.load(path.parent)


@raises("FB404")
def _(folder):
    fewbit.quantize_(
        tiny("bloom"), "quarot", scheme="w8a8kv8", calibration=TOKENS, progress=False
    )


@raises("FB500")
def _(folder):
    class Wrong(fewbit.recipes.Rotate):  # a user's own transform
        def outside(self, model, family):
            records = super().outside(model, family)
            model.lm_head.weight.mul_(1.01)
            return records

    recipe = Recipe("wrong", fewbit.Scheme.parse("w8a16g16"), (Wrong(),))
    fewbit.quantize_(tiny("llama-gqa"), recipe, calibration=TOKENS, progress=False)


@raises("FB600")
def _(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fewbit._C", None)  # as if it were not built
        patch.delattr(fewbit, "_C")
        importlib.reload(fewbit)


@raises("FB601")
def _(folder):
    path = quantized(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # as if it were not installed
        fewbit.load(path)


def test_every_entry_is_raised():
    assert set(TRIGGERS) == set(errors.catalogue())


@pytest.mark.parametrize("id", TRIGGERS)
def test_raised(id, tmp_path):
    with pytest.raises(errors.catalogue()[id]) as caught:
        TRIGGERS[id](tmp_path)
    assert caught.value.id == id and str(caught.value) == f"{caught.value.message} [{id}]"
    assert "\n" not in caught.value.message and not re.search(r"\[FB", caught.value.message)


def test_entries_have_an_id_a_cause_and_a_fix():
    kinds = list(errors.catalogue().values())
    assert len({kind.id for kind in kinds}) == len(kinds) > 20
    for kind in kinds:
        assert "id" in vars(kind), f"{kind.__name__} has no id of its own"
        assert re.fullmatch(r"FB[1-9]\d\d", kind.id)
        family = kind.mro()[kind.mro().index(errors.FewbitError) - 1]
        assert family.id == kind.id[:3] + "00", f"{kind.__name__} is not in the family of its id"
        cause, _, fix = inspect.getdoc(kind).partition("\n\n")
        assert "\n" not in cause and cause.endswith(".") and fix.endswith(".")


def test_no_raise_is_outside_the_catalogue():
    known = {kind.__name__ for kind in errors.catalogue().values()}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(kind).removeprefix("errors.")
            files = ALLOWED.get(name, set())
            where = f"{path.relative_to(PACKAGE)}:{node.lineno} raises {name}"
            assert name in known or files is None or path.name in files, where


def test_native_errors_carry_an_id():
    for path in sorted((ROOT / "cpp").rglob("*.*")):
        for statement in re.findall(r"\bthrow (?:std|py)[^;]*;", path.read_text()):
            carries = "[FB" in statement or "message.str()" in statement  # check() in common.h
            assert carries, f"{path.name}: {statement}"
    with pytest.raises(ValueError, match=r"bits must be in 2..8, got 9 \[FB100\]"):
        fewbit.ops.quantize(torch.zeros(2, 4), 9, 4, False)


def test_explain(capsys):
    assert main(["explain", "fb103"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("FB103 OutputError (exit code 2)\n") and "\nFix: Choose a new" in text
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{id}  " in listed for id in errors.catalogue())
    assert main(["explain", "FB999"]) == 2 and "[FB100]" in capsys.readouterr().err
