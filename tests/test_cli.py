"""The command line: every wrong use is one sentence, the right exit code, and nothing written."""

import json
import subprocess

import pytest

from fewbit.cli import COMMANDS, main


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_quantise_eval_inspect_on_a_real_model(shared, tmp_path, run):
    model, out = shared / "models" / "opt-tiny-outliers", tmp_path / "out"
    text, books = shared / "data" / "books_calibration.txt", shared / "data" / "books_test.txt"
    code, stdout, _ = run(
        "quantize", model, "-o", out, "--method", "awq", "--bits", 4, "--group-size", 128,
        "--calibration", text, "--window", 256, "--samples", 4, "--quiet",
    )  # fmt: skip
    assert code == 0 and (out / "config.json").is_file()
    assert len(list(out.glob("*.safetensors"))) == 5  # a file per layer, one for what is around
    code, stdout, _ = run("eval", out, "--text", books, "--window", 256, "--limit", 4, "--json")
    quantized = json.loads(stdout)
    code, stdout, _ = run("eval", model, "--text", books, "--window", 256, "--limit", 4, "--json")
    original = json.loads(stdout)
    original, quantized = original["perplexity"], quantized["perplexity"]
    assert original["value"] < quantized["value"] < 1.2 * original["value"]
    assert quantized["predictions"] == 4 * 255
    code, stdout, _ = run("inspect", out)
    assert code == 0 and "24 x w4a16g128asym" in stdout
    options = ("--window", 256, "--limit", 2, "--against", model, "--speed", "--save")
    code, stdout, _ = run("eval", out, "--text", books, *options)
    assert code == 0 and "no BOS, 510 predictions" in stdout and "top-1 agreement" in stdout
    code, stdout, _ = run("report", out)
    assert code == 0 and "KL" in (out / "fewbit_report.html").read_text()


def weights(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def test_a_run_is_repeated_from_its_recipe(shared, tmp_path, run):
    model, out = shared / "models" / "opt-tiny", tmp_path / "out"
    code, _, _ = run("quantize", model, "-o", out, "--method", "rtn", "--bits", 3, "--quiet")
    assert code == 0
    recipe = out / "fewbit_recipe.toml"
    assert run("quantize", "--recipe", recipe, "-o", tmp_path / "b", "--quiet")[0] == 0
    a, b = weights(out), weights(tmp_path / "b")
    assert a == b
    code, _, _ = run("quantize", "--recipe", recipe, "-o", tmp_path / "c", "--bits", 4, "--quiet")
    assert code == 0 and len(weights(tmp_path / "c")) > len(a)
    assert "MODEL_DIR is missing" in run("quantize", "-o", tmp_path / "d", "--method", "rtn")[2]


@pytest.mark.parametrize(
    "change, code, message",
    [
        (["--method", "magic"], 2, "method 'magic' is not known; rtn, awq"),
        (["--method", "awq"], 2, "method 'awq' needs --calibration FILE"),
        (["--calibration", "missing.txt"], 2, "text file 'missing.txt' does not exist"),
        (["--calibration", "SHORT"], 2, "is too short"),
        (["--group-size", "0"], 2, "group_size must be -1 (whole row) or at least 1, got 0"),
        (["--group-size", "100"], 4, "are not a multiple of group_size 100"),
        (["--bits", "9"], 2, "bits must be in 2..8, got 9"),
        (["--scheme", "four"], 2, "scheme 'four' is not of the form"),
        (["--method", "quarot", "--scheme", "w4a4"], 4, "computes more at run time"),
        (["--format", "zip"], 4, "format 'zip' is not known"),
        (["--threads", "0"], 2, "--threads must be in 1..1000, got 0"),
    ],
)
def test_wrong_use(shared, tmp_path, run, change, code, message):
    (tmp_path / "short.txt").write_text("hello")
    change = [str(tmp_path / "short.txt") if c == "SHORT" else c for c in change]
    method = [] if "--method" in change else ["--method", "awq" if "FILE" in change else "rtn"]
    if "--calibration" in change:
        method = ["--method", "awq"]
    out = tmp_path / "out"
    got, stdout, err = run("quantize", shared / "models" / "opt-tiny", "-o", out, *method, *change)
    assert got == code and message in err and "Traceback" not in err
    assert err.strip().count("\n") == 0 and not out.exists()


def test_wrong_directories(shared, tmp_path, run):
    out = tmp_path / "out"
    for model, message in [
        (tmp_path / "missing", "is not a model directory"),
        (shared / "data", "holds neither model.safetensors nor"),
    ]:
        code, _, err = run("quantize", model, "-o", out, "--method", "rtn")
        assert code == 2 and message in err and not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("keep me")
    model = shared / "models" / "opt-tiny"
    code, _, err = run("quantize", model, "-o", tmp_path / "full", "--method", "rtn")
    assert code == 2 and "is not empty" in err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


def test_unknown_architecture_is_refused_by_name(tmp_path, run):
    import transformers

    config = transformers.CTRLConfig(
        vocab_size=97, n_embd=16, n_layer=1, n_head=2, dff=32, n_positions=32
    )
    transformers.CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    code, _, err = run("quantize", tmp_path / "ctrl", "-o", tmp_path / "out", "--method", "rtn")
    assert code == 4 and "no family describes CTRLLMHeadModel" in err
    assert not (tmp_path / "out").exists()


def test_eval_says_when_the_window_is_too_long(shared, run):
    model, text = shared / "models" / "opt-tiny", shared / "data" / "books_test.txt"
    code, _, err = run("eval", model, "--text", text)
    assert code == 2 and "--window 2048 is above the model's 512 positions" in err


def test_doctor_and_help(run, capsys):
    code, stdout, _ = run("doctor")
    assert code == 0 and "CPU kernels" in stdout and "torch" in stdout
    code, stdout, _ = run("doctor", "--json")
    assert json.loads(stdout)["fewbit"]["fix"] == ""
    assert run()[0] == 2
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "example: " in text and text.count("\n") <= 32


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag(run, shell):
    code, script, _ = run("completion", shell)
    assert code == 0 and all(command in script for command in COMMANDS)
    assert "group-size" in script and "max-shard-size" in script
    if shell == "bash":
        probe = "COMP_WORDS=(fewbit quantize --me); COMP_CWORD=2; _fewbit; echo ${COMPREPLY[@]}"
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{probe}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["--method", "--memory"]
