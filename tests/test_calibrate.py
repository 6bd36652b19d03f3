"""Calibration input in all its forms; statistics that padding and batching do not change."""

import gc
import weakref

import pytest
import torch

from fewbit import calibrate
from fewbit.errors import CalibrationError
from fewbit.families import decoder_layers, describe
from fewbit.linearise import linearise
from tiny import probe, tiny


class Words:
    """A tokenizer that knows letters."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(c) % 97 for c in text]})


def test_every_form_of_input(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 8)
    for form in (path, str(path), "abcdefgh\n" * 8, ["abcdefgh"] * 8):
        data = calibrate.windows(form, Words(), window=16, samples=3)
        assert [tuple(b.shape) for b in data.batches] == [(1, 16)] * 3 and data.tokens == 48
    ids = torch.arange(32).reshape(2, 16)
    assert calibrate.windows(ids).tokens == 32
    assert calibrate.windows([[1, 2, 3], [4, 5]]).tokens == 5
    masked = [{"input_ids": [[1, 2, 0]], "attention_mask": [[1, 1, 0]]}]
    assert calibrate.windows(masked).tokens == 2
    assert calibrate.windows(ids).digest() != calibrate.windows(ids + 1).digest()


@pytest.mark.parametrize(
    "form, message",
    [
        (None, "this method needs calibration"),
        ([], "the calibration input is empty"),
        ("short text\n", "too short: 11 tokens, and 3 windows of 16 tokens need 48"),
        ("missing.txt", "the text file 'missing.txt' does not exist"),
        (7, "must be text, token ids or a path, got int"),
        ([[]], "calibration sample 0 (holds no tokens|is not token ids)"),
        ([["a"]], "calibration sample 0 is not token ids"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}], "sample 0 holds no tokens"),
    ],
)
def test_says_what_is_wrong(form, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate.windows(form, Words(), window=16, samples=3)


def test_text_needs_a_tokenizer():
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        calibrate.windows("a\nb")


def layer_stats(model, data, index=1):
    family = describe(model)
    inputs = calibrate.capture(model, family, data)
    for layer in decoder_layers(model)[:index]:
        inputs = calibrate.run_layer(layer, inputs)
    return calibrate.collect(decoder_layers(model)[index], family, inputs)[0]


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_padding_and_batching_do_not_enter_statistics(name):
    model = tiny(name)
    ids = probe(batch=2, tokens=12)
    apart = layer_stats(model, calibrate.windows([ids[:1], ids[1:, :9]]))
    padded = torch.cat([ids[:1], torch.nn.functional.pad(ids[1:, :9], (0, 3), value=1)])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    together = layer_stats(
        model, calibrate.windows([{"input_ids": padded, "attention_mask": mask}])
    )
    for path, stats in apart.items():
        assert stats.tokens == together[path].tokens == 21
        # The same tokens pass matrix products of another shape: float32 rounding remains.
        torch.testing.assert_close(stats.gram, together[path].gram, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats.max_abs, together[path].max_abs, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_inputs():
    model = tiny("llama-gqa")
    seen = []
    layer = decoder_layers(model)[0]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    data = calibrate.windows(probe(3, 10))
    stats = layer_stats(model, data, 0)["mlp.down_proj"]
    hook.remove()
    x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).double()
    torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.mean_abs.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(stats.max_abs.double(), x.abs().amax(0))
    dw = torch.randn(5, x.shape[1])
    loss = (x @ dw.double().T).square().sum() / len(x)
    assert abs(stats.output_loss(dw) / float(loss) - 1) < 1e-5


def test_names_the_linear_and_sample_that_is_not_finite():
    model = tiny("llama-gqa")
    decoder_layers(model)[0].mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(CalibrationError, match="mlp.down_proj is not finite in .* sample 0"):
        layer_stats(model, calibrate.windows(probe()), 0)


def test_refuses_tokens_outside_the_vocabulary():
    with pytest.raises(CalibrationError, match="sample 0 has token 500, the vocabulary 97"):
        layer_stats(tiny("opt"), calibrate.windows([[1, 500]]))


@pytest.mark.parametrize("name", ["opt", "llama-gqa", "mixtral", "falcon-7b"])
def test_a_batch_goes_no_further_than_the_last_input_that_is_wanted(name):
    model = tiny(name)
    family = describe(model)
    undo = linearise(model, family)
    try:
        layer = decoder_layers(model, family)[0]
        data = calibrate.windows(list(probe(5).split(1)))
        inputs = calibrate.capture(model, family, data)
        whole, _ = calibrate.collect(layer, family, inputs)
        runs = dict.fromkeys(family.linears(), 0)

        def count(path):
            def hook(*_):
                runs[path] += 1

            return layer.get_submodule(path).register_forward_hook(hook)

        hooks = [count(path) for path in runs]
        for paths in family.inputs():
            runs.update(dict.fromkeys(runs, 0))
            some, outputs = calibrate.collect(layer, family, inputs, only=paths, keep=False)
            assert outputs is None and set(some) >= set(paths)
            for path in paths:
                assert torch.equal(some[path].gram, whole[path].gram)
                assert torch.equal(some[path].sample, whole[path].sample)
            if "expert" not in paths[0]:  # the first batch shows what comes; then none gets there
                assert runs[paths[0]] == 1
        for hook in hooks:
            hook.remove()
    finally:
        undo()


def test_sums_go_with_the_statistics_that_are_made_of_them():
    model = tiny("llama-gqa")
    gc.collect()
    gc.disable()  # no help from the collector of cycles
    try:
        stats = layer_stats(model, calibrate.windows(probe(2)))
        sums = [weakref.ref(s.gram) for s in stats.values()]
        del stats
        assert all(ref() is None for ref in sums)
    finally:
        gc.enable()
