"""Figures for papers as files: type that can be read at its printed size, formats, names, and the same bytes."""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from PIL import Image

from cl_graft.bench.report import make
from cl_graft.report import find, paper
from cl_graft.report.paper import sheet
from cl_graft.report.paper.curves import curves
from cl_graft.report.paper.sheet import DPI, SMALL, WIDTHS, files_of
from cl_graft.report.style import DARK, PALETTE, dark_shades
from tests.command import Call, assert_refused
from tests.report.test_figures import shown_text
from tests.report.test_paper import DRAWN, FEW, drawn
from tests.report.test_tables import cell

# --- at its printed size ----------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DRAWN)
def test_type_can_be_read_and_nothing_is_clipped_or_covered(name: str, width: str) -> None:
    figure = drawn(name, width).figure
    assert figure.get_figwidth() == {"1col": 3.25, "2col": 6.75}[width]  # of ICML's style
    assert figure.get_figheight() <= 9  # of a page
    figure.draw_without_rendering()
    page = figure.bbox.padded(1.0)
    texts = [t for t in shown_text(figure) if t.get_rotation() in (0.0, 90.0)]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert min(t.get_fontsize() for t in texts) >= SMALL >= 6
    for text, box in boxes:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1.0).overlaps(b.padded(-1.0)), (one, other)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["plasticity", "bytes", "kl"])
def test_a_legend_covers_no_data(name: str, width: str) -> None:
    figure = drawn(name, width).figure
    figure.draw_without_rendering()
    (legend,) = figure.legends
    for ax in figure.axes:
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["curves", "bytes", "routing", "ranks"])
def test_every_colour_has_one_for_a_dark_page(name: str) -> None:
    """Those of strategies that are light enough stay as they are."""
    svg = io.StringIO()
    FigureCanvasSVG(drawn(name, "1col").figure).print_svg(svg)
    known = {*DARK, *dark_shades(), *map(str.lower, PALETTE)}
    assert {c.lower() for c in re.findall(r"#[0-9a-fA-F]{6}\b", svg.getvalue())} <= known


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of one figure."""
    folder = tmp_path_factory.mktemp("saved")
    return sheet.save(functools.partial(curves, FEW), folder / "curves", "s-curves")


def test_files_are_pdf_png_and_svg_in_two_widths(saved: list[Path]) -> None:
    folder = saved[0].parent
    names = [
        *("curves-1col.pdf", "curves-1col.png", "curves-1col.svg", "dark/curves-1col.svg"),
        *("curves-2col.pdf", "curves-2col.png", "curves-2col.svg", "dark/curves-2col.svg"),
        "curves.tex",
    ]
    assert [file.relative_to(folder).as_posix() for file in saved] == names
    assert sorted(saved) == sorted(f for f in folder.rglob("*") if f.is_file())
    for width, inches in WIDTHS.items():
        with Image.open(folder / f"curves-{width}.png") as image:
            assert image.size[0] == pytest.approx(inches * DPI, abs=1)
            assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
        pdf = (folder / f"curves-{width}.pdf").read_bytes()
        (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", pdf)
        assert float(box) == pytest.approx(inches * 72)
        assert b"/CIDFontType2" in pdf and b"/FontFile2" in pdf  # TrueType, embedded
        assert b"/Type3" not in pdf and b"CreationDate" not in pdf
        svg = (folder / f"curves-{width}.svg").read_text()
        assert f'width="{inches * 72:g}pt"' in svg and "dc:date" not in svg


def test_the_bytes_are_the_same_whatever_the_order_of_sets(
    saved: list[Path], tmp_path: Path
) -> None:
    """Fonts are cut to the letters used, and colours and markers chosen, from sets; a process has its own order."""
    code = (
        "import sys, functools, pathlib; from cl_graft.report.paper import sheet; "
        "from tests.report.test_paper import FEW, curves; "
        "sheet.save(functools.partial(curves, FEW), pathlib.Path(sys.argv[1]), 's-curves')"
    )
    own = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves")], check=True, env=own)
    for one, other in zip(saved, files_of(tmp_path / "curves"), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_figure_of_an_earlier_report_does_not_stay_where_there_is_none(tmp_path: Path) -> None:
    stem = tmp_path / "kl"
    for file in files_of(stem):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    assert sheet.save(lambda width: None, stem, "x") == []
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_what_is_written_of_two_scenarios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: paper.FIGURES[name] for name in ("curves", "kl")}  # the others take their time
    monkeypatch.setattr(paper, "FIGURES", some)
    make(tmp_path / "results", cells=12, examples=4, strategies=3, scenarios=2)
    target = tmp_path / "paper"
    assert paper.write(find([tmp_path / "results"]), target) == target
    written = {f.relative_to(target).as_posix() for f in target.rglob("*.*") if f.is_file()}
    for stem in ("overview", "ranks", "synthetic-0/curves", "synthetic-1/bytes"):
        assert {f.relative_to(target).as_posix() for f in files_of(target / stem)} <= written
    assert {"scenarios-told.tex", "scenarios-untold.tex", "synthetic-0/scores-told.tex"} <= written
    assert not any("kl" in Path(name).name for name in written)  # it was not measured
    assert r"\label{fig:synthetic-0-curves}" in (target / "synthetic-0/curves.tex").read_text()
    assert max(len(Path(name).name) for name in written) <= 24
    before = (target / "ranks-1col.pdf").stat().st_mtime_ns
    paper.write(find([tmp_path / "results"]), target)
    assert (target / "ranks-1col.pdf").stat().st_mtime_ns == before, "nothing had changed"


def test_a_folder_says_what_tells_it_from_the_others() -> None:
    groups = [[c] for c in (cell(), cell(budget="1%"), cell(scenario="trace"))]
    assert list(paper._titles(groups, budgets=True)) == [
        "math-code 10%",
        "math-code 1%",
        "trace 10%",
    ]
    assert list(paper._titles(groups[:1], budgets=True)) == ["math-code"]
    turned = [cell()], [cell(tasks=["code", "math"])]
    assert list(paper._titles(turned, budgets=True)) == [
        "math-code math-code",
        "math-code code-math",
    ]


def test_a_name_that_no_cell_has_is_refused_before_anything_is_made(
    tmp_path: Path, call: Call
) -> None:
    make(tmp_path / "results", cells=2, examples=2, strategies=2, scenarios=1)
    done = call("report", str(tmp_path / "results"), "--paper", "--named", "graftlm")
    assert_refused(done, "there is no strategy among these cells named 'graftlm'", "graftllm")
    assert not (tmp_path / "results" / "report").exists()
