"""A streamed run that computes on a card (card.py: a stand-in for one), and the choice of the card.

The stand-in computes what the CPU does, so that the bytes must be the CPU's.
"""

import json

import pytest
import torch
from sweep import digest, quantize, windows

import fewbit
from card import CARD, Card, OnCard
from fewbit import distributed, stream
from fewbit.errors import UnsupportedError, UsageError
from fewbit.recipes import Recipe
from fewbit.scheme import Scheme
from fewbit.solvers.gptq import GPTQ
from fewbit.solvers.obq import OBQ
from tiny import tiny

RUNS = {  # method, twin, scheme, format
    "gptq": ("awq+gptq", "llama-gqa", "w4a16g8", "compressed-tensors"),
    "smoothquant": ("smoothquant", "opt", "w8a8", "int-quantized"),
    "rotated": ("quarot+qronos", "opt", "w4a4kv4", "fewbit"),
    "cached": ("quarot", "llama-gqa", "w4a4kv4", "fewbit"),
    "experts": ("gptq", "mixtral", "w4a16g8", "compressed-tensors"),
}
SLOW = {
    **{name: ("awq+gptq", name, "w4a16g8", "compressed-tensors")
       for name in ("gpt2", "bloom", "falcon-7b", "gemma3", "phi3", "qwen3-moe", "llama-tied-64")},
    "llm-int8": ("llm-int8", "opt", "w8a8", "llm-int8"),
    "mixed": ("mixed", "llama-gqa", "w4a16g8", "fewbit"),
    "learned": ("spinquant", "llama-gqa", "w4a4", "fewbit"),
    "tuned": ("gptq+tune", "llama-gqa", "w4a16g8", "compressed-tensors"),
}  # fmt: skip


def run(folder, name, device):
    method, twin, scheme, format = {**RUNS, **SLOW}[name]
    if not (folder / "model").exists():
        tiny(twin).save_pretrained(folder / "model")
    stream.quantize_directory(
        folder / "model", folder / device, method, scheme, windows(24), format=format,
        device=device, progress=False,
    )
    return digest(folder / device)


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_layers_are_computed_on_the_card_to_the_same_bytes(tmp_path, name):
    with Card() as card:
        done = run(tmp_path, name, "cuda")
    assert card.calls["linear"] > 10 and card.calls["scaled_dot_product_attention"] > 4
    assert card.calls["gram.default"] > 10 or name in ("cached", "llm-int8", "learned")
    assert done == run(tmp_path, name, "cpu")


@pytest.mark.parametrize("solver", [GPTQ(clip=False), OBQ(), OBQ(sweeps=2)])
def test_solvers_without_a_name_run_on_the_card_too(tmp_path, solver):
    recipe = Recipe("test", Scheme.parse("w3a16g8"), solver=solver)
    tiny("opt").save_pretrained(tmp_path / "model")
    arguments = {"calibration": windows(24), "format": "fewbit", "progress": False}
    with Card():
        stream.quantize_directory(
            tmp_path / "model", tmp_path / "card", recipe, device="cuda", **arguments
        )
    stream.quantize_directory(tmp_path / "model", tmp_path / "cpu", recipe, **arguments)
    assert digest(tmp_path / "card") == digest(tmp_path / "cpu")


@pytest.fixture
def model(tmp_path):
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Stopped(Exception):
    pass


def stop(event):
    if event["event"] == "layer":
        raise Stopped


def test_a_run_on_the_card_goes_on_after_a_stop_but_not_on_another(model, tmp_path):
    quantize(model, tmp_path / "cpu", "quarot+gptq")
    with Card() as card, pytest.raises(Stopped):
        quantize(model, tmp_path / "out", "quarot+gptq", device="cuda", callback=stop)
    card.answers["get_device_name"] = lambda device: "another"
    with card, pytest.raises(UsageError, match=r'environment.device \("cpu", now "another"\)'):
        quantize(model, tmp_path / "out", "quarot+gptq", device="cuda")
    with Card():
        quantize(model, tmp_path / "out", "quarot+gptq", device="cuda")
    assert digest(tmp_path / "out") == digest(tmp_path / "cpu")


def test_a_live_model_on_the_card_is_quantised_there(tmp_path):
    made, ids = tiny("llama-gqa"), windows(24)
    fewbit.quantize_(made, "quarot+gptq", "w4a4kv4", ids, progress=False)
    with Card():
        there = tiny("llama-gqa").to(CARD)
        fewbit.quantize_(there, "quarot+gptq", "w4a4kv4", ids, progress=False)
        got, want = there.state_dict(), made.state_dict()
        assert all(isinstance(t, OnCard) and torch.equal(t.cpu(), want[n]) for n, t in got.items())


def test_the_plan_counts_the_memory_of_the_card_and_refuses_a_small_one(model):
    arguments = (model, "gptq", "w4a16g8", windows(96))
    on_cpu = stream.plan_directory(*arguments)
    with Card():
        plan = stream.plan_directory(*arguments, device="cuda")
    assert on_cpu.card == 0 < plan.card and "MiB of cuda:0" in str(plan)
    layers = {p.name: p for p in plan.phases}["layers"]
    # What a layer's way through the card needs is no longer the CPU's, but for what is read.
    assert layers.memory < max(p.memory for p in on_cpu.phases if p.name == "layers")
    assert json.loads(json.dumps(plan.to_dict()))["card"] == plan.card
    with Card(plan.card - plan.passing), pytest.raises(
        UsageError, match=r"cuda:0 has \d+ MiB free, and phase 'layers' needs \d+ MiB there: free "
        r"as much, or use device 'cpu', or --window 95"
    ):
        stream.plan_directory(*arguments, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_run_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, and torch .* finds none; use"):
        quantize(model, tmp_path / "out", "rtn", device="cuda")
    with pytest.raises(UsageError, match="device must be one of cpu, cuda, got 'tpu'"):
        quantize(model, tmp_path / "out", "rtn", device="tpu")


def test_every_rank_takes_the_card_of_its_number(monkeypatch):
    with Card() as card:
        card.patch.setattr(torch.cuda, "device_count", lambda: 2)
        chosen = []
        card.patch.setattr(torch.cuda, "set_device", chosen.append)
        for number in "01":
            monkeypatch.setenv("LOCAL_RANK", number)
            assert distributed.place("cuda") == torch.device("cuda", int(number))
        assert chosen == [0, 1]
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(UnsupportedError, match="process 2 .* no GPU of its own: there are 2"):
            distributed.place("cuda")


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_objects_go_by_gloo_and_tensors_of_cards_by_nccl(monkeypatch, device, backend):
    started, group = [], torch.distributed
    monkeypatch.setattr(group, "init_process_group", started.append)
    monkeypatch.setattr(group, "barrier", lambda: None)
    monkeypatch.setattr(group, "destroy_process_group", lambda: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with Card(), distributed.job(device) as ranks:
        assert (ranks.rank, ranks.size, ranks.device.type) == (1, 2, device)
    assert started == [backend]
    # Torch's own reading of the words: a group that has "cpu" takes objects and barriers there.
    config = group.distributed_c10d.BackendConfig(group.Backend(backend))
    assert config.get_device_backend_map()["cpu"] == "gloo"
    assert config.get_device_backend_map().get("cuda", "gloo") == backend.split(":")[-1]


def test_the_stand_in_refuses_what_a_card_refuses():
    with Card():
        a, b = torch.ones(3, device="cuda"), torch.ones(3)
        assert a.device == CARD and a.is_cuda and b.device.type == "cpu"
        assert isinstance(a + 1, OnCard) and isinstance(torch.zeros_like(a), OnCard)
        assert isinstance(b.to(a), OnCard) and not isinstance(a.cpu(), OnCard)
        assert isinstance(a[torch.tensor([0, 2])], OnCard) and isinstance(a * b[0], OnCard)
        for wrong in (lambda: a + b, lambda: b[a > 0], lambda: torch.stack([a, b])):
            with pytest.raises(RuntimeError, match="tensors of cuda:0 and, of shape .* of the CPU"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            torch.rand(3, generator=torch.Generator(), device="cuda")
        moved = a.cpu()
        moved[0] = 7
        assert a.tolist() == [1, 1, 1]
