# SPDX-License-Identifier: Apache-2.0
"""The report: one file that needs nothing else, holds every number, and survives hostile names."""

import re
from html.parser import HTMLParser

import pytest
import torch
from deltaweave.converter import BitDeltaOptions, CompressionOptions, Recipe, compress, compress_bitdelta
from deltaweave.formats import Delta, DeltaweaveError
from helpers import perturbed, tiny_checkpoint

from deltaweave.evaluation import Candidate, Comparison, TaskScore, TextScore
from deltaweave.evaluation.tasks import Task
from deltaweave.report import save_plots, write_report
from deltaweave.report.details import read_details
from deltaweave.report.figures import byte_kinds
from deltaweave.report.style import COLOURS

HOSTILE = '<script>alert("$x_1$")</script> & co'
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, tags, links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_checkpoint(folder / "base", dtype=torch.float32)
    tuned = perturbed(base, folder / "tuned", added_tokens=1)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    recipe = Recipe(bands="8:1,3:4,2:*", ratio=3 / 4, group_size=32)
    calibrated = CompressionOptions(recipe, str(text), samples=4, sequence_length=32)
    return [
        compress(base, tuned, folder / "calibrated.safetensors", calibrated),
        compress(base, tuned, folder / "rounded.safetensors", CompressionOptions(recipe, "none")),
        compress_bitdelta(base, tuned, folder / "bitdelta.safetensors", BitDeltaOptions("none")),
    ]


def candidate(name, size, *, kl=0.1, correct=40, scored=True):
    return Candidate(
        name=name,
        method=f"made by {name}",
        projection_bytes=size,
        file_bytes=size,
        projection_ratio=1 / 8 if size else None,
        file_ratio=1 / 7 if size else None,
        text=TextScore(1000, 5.125, kl, 0.01, 0.875, 0.25) if scored else None,
        task=TaskScore(correct, 50) if scored else None,
        samples=("4", HOSTILE),
    )


def comparison(deltas, *, scored=True):
    rows = [
        candidate("base", None, correct=5, scored=scored),
        candidate("fine-tune", 10**6, kl=0.0, correct=50, scored=scored),
    ]
    rows += [candidate(path.stem, path.stat().st_size, scored=scored) for path in deltas]
    return Comparison("a base", HOSTILE, (Task("2+2=", "4"), Task(HOSTILE, "b")), tuple(rows))


@pytest.fixture(scope="module")
def page_text(deltas, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    write_report(path, comparison(deltas), deltas, command="deltaweave compare --base 'a b' x.safetensors")
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_nothing_else(page_text):
    page = Page(page_text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page_text)
    assert "@import" not in page_text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    for fragment in re.findall(r"url\(([^)]*)\)", page_text):
        assert fragment.startswith("#")
        assert fragment[1:] in page.ids


def test_names_from_files_are_text(page_text):
    text = "".join(Page(page_text).text)
    assert HOSTILE in text
    assert "<script" not in page_text


def test_every_number_is_there(page_text, deltas):
    text = " ".join("".join(Page(page_text).text).split())
    for wanted in ("5.125", "0.1000", "± 0.0196", "87.5 %", "80.0 %", "67.0 to 88.8", "77.8 %", "1/8.0", "2+2="):
        assert wanted in text, wanted
    assert "deltaweave compare --base 'a b' x.safetensors" in text
    for path in deltas:
        with Delta.open(path) as delta:
            assert delta.header.base.root in text


def test_plots_follow_the_page_s_colours_and_are_told_in_words(page_text):
    drawings = re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL)
    # Accuracy, KL, bytes, two errors; seven spectra for two deltas; layers for three.
    assert len(drawings) == 5 + 2 * 7 + 3
    for drawing in drawings:
        assert 'role="img"' in drawing
        assert re.search(r'aria-label="[^"]{20,}', drawing)
        assert not re.search(r"fill: #(?!fff)[0-9a-f]{6}", drawing), "a colour that no theme changes"
    defined = re.search(r":root \{.*?\}", page_text, flags=re.DOTALL)[0]
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: {light};" in defined
        assert f"--{name}: {dark};" in page_text
    assert set(re.findall(r"var\(--([\w-]+)\)", page_text)) <= {*COLOURS, "page", "card", "accent", "font"}


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_from_its_ground(theme):
    """WCAG: 4.5 for text, 3 for what a plot is read by."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ground = luminance(("#ffffff", "#171c23")[theme])
    for name, values in COLOURS.items():
        value = luminance(values[theme])
        contrast = (max(value, ground) + 0.05) / (min(value, ground) + 0.05)
        wanted = 4.5 if name in ("ink", "muted") else 3 if name.startswith("series") else 0
        assert contrast >= wanted, name


def test_the_same_input_gives_the_same_page(page_text, deltas, tmp_path):
    path = write_report(
        tmp_path / "r.html", comparison(deltas), deltas, command="deltaweave compare --base 'a b' x.safetensors"
    )
    assert path.read_text(encoding="utf-8") == page_text


def test_without_scores_there_are_bytes_and_errors(deltas, tmp_path):
    page_text = write_report(tmp_path / "r.html", comparison(deltas[2:], scored=False), deltas[2:]).read_text("utf-8")
    Page(page_text)
    assert "perplexity" not in page_text
    assert "Task accuracy" not in page_text
    assert "Bytes by kind" in page_text
    assert "Relative error per layer" in page_text


def test_details_are_those_of_the_file(deltas):
    calibrated, rounded, bitdelta = read_details(deltas)
    assert calibrated.kinds == KINDS
    assert len(calibrated.spectra) == len(calibrated.errors) == 2 * 7
    with Delta.open(deltas[0]) as delta:
        record = delta.record("model.layers.1.mlp.down_proj.weight")
        spectrum = next(s for s in calibrated.spectra if (s.layer, s.kind) == (1, "down_proj"))
        error = next(e for e in calibrated.errors if (e.layer, e.kind) == (1, "down_proj"))
        assert (spectrum.sigma == record.sigma).all()
        assert spectrum.bands == tuple((band.bits, band.rank) for band in record.bands)
        assert (error.weight, error.output) == (record.quality["weight_error"], record.quality["output_error"])
    assert all(error.output is None for error in rounded.errors)
    assert bitdelta.spectra == ()
    assert len(bitdelta.errors) == 14
    for path, detail in zip(deltas, (calibrated, rounded, bitdelta), strict=True):
        assert sum(byte_kinds(detail).values()) == path.stat().st_size


def test_an_existing_report_is_kept(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("mine")
    with pytest.raises(DeltaweaveError, match="exists"):
        write_report(path, comparison([]), [])
    assert path.read_text() == "mine"
    write_report(path, comparison([]), [], force=True)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_plots_as_files(deltas, tmp_path):
    files = save_plots(tmp_path / "plots", comparison(deltas), deltas)
    assert len(files) == len(set(files)) == 22
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
    assert {"accuracy.png", "kl.png", "bytes.png"} <= {file.name for file in files}
