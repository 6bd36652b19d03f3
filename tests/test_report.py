"""The report as data, as figures, as a page."""

import json
from html.parser import HTMLParser

import pytest
import torch

from fewbit.errors import CheckpointError
from fewbit.pipeline import quantize_
from fewbit.report import Report
from fewbit.report.page import page
from fewbit.report.plots import PLOTS
from tiny import tiny

pytest.importorskip("matplotlib")
VOID = {"meta", "path", "use", "rect", "circle", "image", "br", "line"}
CASES = [
    ("rtn", "w4a16g16", {"errors", "sizes"}),
    ("awq", "w4a16g16", {"outliers", "channels", "errors", "search", "sizes"}),
    ("smoothquant", "w8a8", {"outliers", "channels", "errors", "sizes"}),
    ("quarot+gptq", "w4a16g16", {"outliers", "channels", "errors", "sizes"}),
]


def make(method, scheme, **options):
    batches = torch.randint(90, (8, 32), generator=torch.Generator().manual_seed(0))
    model = tiny("llama-gqa")
    return quantize_(model, method, scheme, batches, window=32, progress=False, **options)


class Page(HTMLParser):
    """Checks nesting, and that nothing is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.ids = [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe", "img")
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith("#"), attrs
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("method, scheme, plots", CASES)
def test_page_and_figures(tmp_path, method, scheme, plots):
    report = make(method, scheme)
    assert {name for name, plot in PLOTS.items() if plot.has(report)} == plots
    for name in plots:
        figure = getattr(report, f"plot_{name}")()
        (ax,) = figure.axes
        assert ax.get_ylabel() and (ax.get_xlabel() or name == "sizes")
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.to_dict() == json.loads(json.dumps(report.to_dict()))
    found = Page(page(again))
    assert len(found.ids) == len(set(found.ids))
    assert all(plot.title in found.text for name, plot in PLOTS.items() if name in plots)
    assert method in found.text and "relative error" in found.text
    assert "@media (prefers-color-scheme: dark)" in page(again)


def test_search_curves_show_the_chosen_point():
    report = make("smoothquant", "w8a8", alpha="auto")
    (ax,) = report.plot_search().axes
    marked = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    curves = [r for r in report.transforms if "alphas" in r]
    assert len(marked) == len(curves) > 0
    chosen = [r["alpha"] for r in curves]
    assert [m.get_xdata()[0] for m in marked] == [0 if c is None else c for c in chosen]


@pytest.mark.parametrize("form", ["search", "duo", "both"])
def test_search_curves_of_awq_lie_at_their_exponents(form):
    report = make("awq", "w3a16g16", form=form, points=4)
    curves = [r for r in report.transforms if "ratios" in r]
    (ax,) = report.plot_search().axes
    marked = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    lines = [line for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata()) > 2]
    assert len(marked) == len(curves) > 0
    assert len(lines) == len(curves) * (1 + (form == "both"))
    assert list(lines[0].get_xdata()) == [0.0, 0.25, 0.5, 0.75]
    for record, point in zip(curves, marked, strict=True):
        exponent = str(record["ratio"]).removeprefix("duo ")
        assert point.get_xdata()[0] == float(exponent)
        assert point.get_ydata()[0] == pytest.approx(record["loss"] / record["rtn_loss"])


def test_outliers_shrink_under_a_rotation():
    torch.manual_seed(0)
    model = tiny("llama-gqa")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 50
    report = quantize_(model, "quarot", "w4a16g16", progress=False)
    first = next(r for r in report.outliers if r["path"].endswith("q_proj"))
    assert first["before"]["ratio"] > 10 * first["after"]["ratio"]
    profile = first["before"]["profile"]
    assert len(profile) == 33 and profile == sorted(profile, reverse=True)


def test_a_notebook_shows_a_figure_by_itself():
    """Without pyplot nothing has told it how."""
    figure = make("rtn", "w4a16g16").plot_errors()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_bits_and_fallbacks():
    report = make("rtn", "w4a16g16")
    linear = report.linears[0]
    assert linear.weights == 48 * 48 and linear.rung == 0 and report.fallbacks == []
    # 4 bits, and a float16 scale and uint8 zero point for 16 weights; rows are padded to 16.
    assert report.bits_per_weight == pytest.approx(4 + 24 / 16, rel=0.1)
    linear.info["rung"] = 2
    assert report.fallbacks == [linear] and "fallbacks 1" in str(report)
    assert "Fallbacks" in page(report)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"linears": [{"x": 1}]}'])
def test_what_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a report"):
        Report.load(tmp_path / "r.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Report.load(tmp_path / "missing.json")
