"""Several processes give the bytes of one; when one of them dies, the same command goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
from sweep import METHODS, digest, quantize

from fewbit.distributed import CHUNKS, Ranks, chunks
from fewbit.errors import UsageError
from tiny import tiny

ONCE = Path(__file__).parent / "once.py"


@pytest.fixture
def model(tmp_path):
    tiny("llama-gqa").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def torchrun(size, *arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(size), str(ONCE), *map(str, arguments),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def agree(model, tmp_path, method, sizes, device="cpu"):
    quantize(model, tmp_path / "one", method)
    for size in sizes:
        done = torchrun(size, model, tmp_path / f"out{size}", method, device)
        assert done.returncode == 0, done.stderr[-3000:]
        assert digest(tmp_path / f"out{size}") == digest(tmp_path / "one")


def test_f18_two_ranks_give_the_bytes_of_one(model, tmp_path):
    agree(model, tmp_path, "gptq", [2])


def test_f18_two_ranks_on_cards_give_the_bytes_of_one_on_the_cpu(model, tmp_path):
    agree(model, tmp_path, "gptq", [2], "cuda")


def test_torchrun_runs_the_command_line(model, tmp_path):
    """Every file of the output the same, and one of the processes speaks."""
    command = ["-m", "fewbit", "quantize", str(model), "-o", "out", "--method", "rtn",
               "--scheme", "w4a16g8", "--threads", "1"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in {"one": [], "two": launch}.items():
        (tmp_path / name).mkdir()
        run = subprocess.run(
            [sys.executable, *start, *command],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=tmp_path / name,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("written") == run.stderr.count("plan ") == 1
    assert digest(tmp_path / "two" / "out") == digest(tmp_path / "one" / "out")
    assert "fewbit_recipe.toml" in [p.name for p in (tmp_path / "two" / "out").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_f18_two_and_three_ranks_give_the_bytes_of_one(model, tmp_path, method):
    agree(model, tmp_path, method, [2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_f13_a_dead_rank_ends_the_job_and_the_next_goes_on(model, tmp_path, rank):
    quantize(model, tmp_path / "one", "gptq")
    done = torchrun(2, model, tmp_path / "out", "gptq", "cpu", rank)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert (tmp_path / "out.fewbit" / "step-00001.json").exists()
    done = torchrun(2, model, tmp_path / "out", "gptq", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert digest(tmp_path / "out") == digest(tmp_path / "one")


def test_every_window_has_one_holder_and_chunks_are_whole():
    for count in (1, 2, 7, 8, 9, 30):
        assert [i for part in chunks(count) for i in part] == list(range(count))
        for size in range(1, CHUNKS + 1):
            ranks = [Ranks(r, size) for r in range(size)]
            assert [i for r in ranks for i in r.own(count)] == list(range(count))
            for part in chunks(count):
                assert len({ranks[0].holders(count)[i] for i in part}) == 1
    with pytest.raises(UsageError, match="at most 8 processes share the work, got 9"):
        Ranks(0, 9)
