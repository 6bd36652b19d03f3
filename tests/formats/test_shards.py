"""Hostile model directories: each must end in one CheckpointError, before anything is read."""

import json
import os
import struct

import pytest
import torch
from directories import read_codes, write_model
from safetensors.torch import save_file

from fewbit.errors import CheckpointError
from fewbit.shards import INDEX, MAX_HEADER, MAX_JSON, Shards

BAD_NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x.safetensors",
    "a/b.safetensors",
    "a\\b.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "C:\\x.safetensors",
    "\\\\host\\x.safetensors",
    "//host/x.safetensors",
    "x.safetensors\0",
    "x\n.safetensors",
    "x.bin",
    "x",
    ".x.safetensors",
    "~/x.safetensors",
    "a/../x.safetensors",
    "./x.safetensors",
    "x.safetensors/",
    "x.safetensors ",
    "con:.safetensors",
    "x|y.safetensors",
    "x?.safetensors",
    "*.safetensors",
    "x\u202e.safetensors",
    "x" * 300 + ".safetensors",
    "file:///x.safetensors",
    "x.safetensors::$DATA",
    "\x7fx.safetensors",
    "x\t.safetensors",
]


def indexed(path, file):
    (path / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
    return path


@pytest.mark.parametrize("name", BAD_NAMES)
def test_f21_bad_file_names(tmp_path, name):
    inner = tmp_path / "model"
    inner.mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not the name of a"):
        Shards(indexed(inner, name))


def test_f21_links_and_special_files(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (inner / "x.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its directory"):
        Shards(indexed(inner, "x.safetensors"))
    os.mkfifo(inner / "fifo.safetensors")
    (inner / "dir.safetensors").mkdir()
    (inner / "loop.safetensors").symlink_to(inner / "loop.safetensors")
    (inner / "dev.safetensors").symlink_to("/dev/zero")
    for name, why in [
        ("fifo", "not a regular file"),
        ("dir", "not a regular file"),
        ("gone", "cannot be read"),
        ("loop", "cannot be read"),
        ("dev", "leads out"),
    ]:
        with pytest.raises(CheckpointError, match=why):
            Shards(indexed(inner, f"{name}.safetensors"))


def test_the_hub_cache_may_link_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.zeros(2)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    assert Shards(snapshot).read("w").tolist() == [0, 0]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "not a whole"),
        (b"\xff" * 8, "above"),
        (struct.pack("<Q", MAX_HEADER + 1), "above"),
        (struct.pack("<Q", 100) + b"{}", "not a whole"),
        (struct.pack("<Q", 2) + b"[]", "not a whole"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "not a whole"),
    ],
)
def test_damaged_headers(tmp_path, content, why):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "not valid JSON"),
        ("[]", "must hold an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"weight_map": 3}', "needs a weight_map"),
        ('{"weight_map": {"w": 3}}', "puts 'w' into 3"),
        ('{"weight_map": {"missing": "model.safetensors"}}', "lacks 'missing'"),
        ('{"weight_map": ' + " " * MAX_JSON + "}", "above"),
    ],
)
def test_damaged_indexes(tmp_path, text, why):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=why):
        Shards(tmp_path)


def test_pickles_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "llm-awq-v2.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="can run code .* reads safetensors only"):
        Shards(tmp_path)
    with pytest.raises(CheckpointError, match="is not a model directory"):
        Shards(tmp_path / "none")


def test_names_are_never_paths(tmp_path):
    save_file({"../../x": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert list(Shards(tmp_path).entries) == ["../../x"]  # a key, used as nothing else
    save_file({"x" * 600: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="name of 600 characters"):
        Shards(tmp_path)


def test_shapes_are_checked_before_weights_are_read(tmp_path, monkeypatch):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    for key, value in {"num_bits": 8, "group_size": 64, "symmetric": True}.items():
        before = weights[key]
        weights[key] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        if key == "symmetric":  # a tensor too many does no harm to shapes
            assert read_codes(tmp_path)[1].scheme_of("x").symmetric
        else:
            with pytest.raises(CheckpointError, match=r"weight_(packed|scale) is|codes need"):
                read_codes(tmp_path)
        weights[key] = before
    weights["num_bits"] = 4
