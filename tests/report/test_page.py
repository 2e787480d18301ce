"""The pages, as a browser shows them: whatever the cells are, in light and dark, on a phone and on a desk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.bench.report import TASKS, make
from cl_graft.report import ReportedCell, find, page
from cl_graft.report.examples import Answer, ExampleRow, breakdown, outcomes
from cl_graft.report.page import template
from cl_graft.report.provenance import write_provenance
from cl_graft.report.significance import reader
from cl_graft.report.statistics import Interval
from cl_graft.report.tables import write_tables

EVIL = "<script>alert('x')</script> & \"co\""
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-dev-shm-usage", "--disable-quic", "--disable-component-update", "--disable-sync"),
]


def report(folder: Path) -> list[ReportedCell]:
    found = find([folder])
    write_tables([f.cell for f in found], folder / "report")
    page.write(found, folder / "report")
    return found


def odd(folder: Path) -> None:
    """One cell gets markup for its strategy and answers, one is incomplete, one lost its examples, one its prompts."""
    cells = sorted(p.parent for p in folder.glob("*/cell.json"))
    first = json.loads((cells[0] / "cell.json").read_text())
    for name in ("cell.json", "result.json"):
        told = json.loads((cells[0] / name).read_text())
        told["config"]["strategy"] = EVIL
        told |= {"label": EVIL, "strategy": EVIL} if name == "result.json" else {}
        (cells[0] / name).write_text(json.dumps(told))
    for file in cells[0].glob("experiences/*/examples.jsonl"):
        file.write_text(file.read_text().replace(" or so", json.dumps(EVIL)[1:-1]))
    (cells[1] / "result.json").unlink()
    shutil.rmtree(cells[1] / "experiences" / "03")
    shutil.rmtree(cells[2] / "experiences")
    (folder / "data" / f"{first['data']}.jsonl").unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 strategies, two scenarios, a seed of each; the first scenario with odd cells."""
    folder = tmp_path_factory.mktemp("made")
    make(folder, cells=28, examples=6, strategies=14)
    odd(folder)
    report(folder)
    return folder / "report"


def page_of(folder: Path, strategy: str) -> str:
    """The page of this strategy's cell in the second scenario, in which no cell is odd."""
    (file,) = (folder / "cells").glob(f"synthetic-1_{strategy}*.html")
    return file.read_text()


def rows_of(table: str) -> list[list[str]]:
    """The text of every cell of the first table's body."""
    body = table[table.index("<tbody>") : table.index("</tbody>")].replace("<wbr>", "")
    rows = re.findall(r"<tr.*?>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]*>", " ", text).strip() for text in row] for row in cells]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    make(folder, cells=1, examples=4, strategies=1, scenarios=1)
    report(folder)
    return folder / "report"


# --- what is written --------------------------------------------------------------------------


def test_every_cell_has_a_page_and_every_link_a_file(made: Path) -> None:
    assert len(list((made / "cells").iterdir())) == 28
    text = (made / "index.html").read_text()
    links = re.findall(r'(?:href|src|srcset)="([^"#][^"]*)"', text)
    local = {unquote(link) for link in links if not link.startswith("data:")} - {"provenance.md"}
    assert len(local) > 28 + 2 * 5 * 3
    assert {name for name in local if name.endswith(".csv")} == {p.name for p in made.glob("*.csv")}
    assert [link for link in sorted(local) if not (made / link).is_file()] == []


def test_markup_in_names_and_answers_stays_text(made: Path) -> None:
    pages = [made / "index.html", *(made / "cells").iterdir()]
    assert not [p for p in pages if "<script>alert" in p.read_text()]
    assert "&lt;script&gt;alert" in (made / "index.html").read_text()
    assert sum("&lt;script&gt;alert" in p.read_text() for p in pages) >= 2


def test_a_page_may_fetch_nothing_from_the_network(made: Path) -> None:
    for file in (made / "index.html", next((made / "cells").iterdir())):
        (policy,) = re.findall(
            r'http-equiv="Content-Security-Policy" content="(.*?)"', file.read_text()
        )
        rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
        assert rules["default-src"] == rules["form-action"] == rules["base-uri"] == "'none'"
        assert not any(word in policy for word in ("http", "*", "connect-src"))


def test_what_has_not_changed_is_not_written_again(made: Path) -> None:
    kept = [*(made / "cells").iterdir(), *made.glob("*.png"), *made.glob("dark/*.svg")]
    before = {p: p.stat().st_mtime_ns for p in kept}
    cell = next((made.parent).glob("synthetic-1__*__seed0"))
    result = json.loads((cell / "result.json").read_text())
    result["metrics"]["op"] = 0.123
    (cell / "result.json").write_text(json.dumps(result))
    report(made.parent)
    changed = {p for p in kept if p.stat().st_mtime_ns != before[p]}
    changed_page = f"synthetic-1_{cell.name.split('__')[1]}.html"
    assert [p.name for p in changed if p.suffix == ".html"] == [changed_page]
    assert all("synthetic-1" in p.name for p in changed)
    assert "12.3" in (made / "cells" / changed_page).read_text()


def test_what_is_missing_is_made_again_and_prompts_that_change_are_shown(tmp_path: Path) -> None:
    """A figure is three files, and a cell's page shows prompts that are in no file of the cell."""
    make(tmp_path, cells=1, examples=4, strategies=1, scenarios=1)
    report(tmp_path)
    made = tmp_path / "report"
    gone = [next(made.glob("*-curves.png")), next(made.glob("dark/*-curves.svg"))]
    for file in gone:
        file.unlink()
        report(tmp_path)
        assert file.is_file()
    (prompts,) = (tmp_path / "data").glob("*.jsonl")
    prompts.write_text(prompts.read_text().replace("Anna", "Berta"))
    report(tmp_path)
    (cell,) = (made / "cells").iterdir()
    assert "Berta" in cell.read_text() and "Anna" not in cell.read_text()


def test_a_page_leads_back_to_the_section_of_its_group(tmp_path: Path) -> None:
    """The section's name may change with what else is reported: here there are two orders of the tasks then."""
    make(tmp_path, cells=2, examples=4, strategies=2, scenarios=1)
    report(tmp_path)
    cell = sorted(tmp_path.glob("*/result.json"))[0]
    told = json.loads(cell.read_text())
    cell.write_text(json.dumps(told | {"budget": "5%"}))
    report(tmp_path)
    index = (tmp_path / "report" / "index.html").read_text()
    for file in (tmp_path / "report" / "cells").iterdir():
        (section,) = re.findall(r'index\.html#([^"]+)"', file.read_text())
        assert f'<section id="{section}">' in index


def test_a_report_of_a_sweep_under_way_tells_what_is_known(tmp_path: Path) -> None:
    """Two strategies of two seeds, of which one cell has but its base model and another not even that."""
    make(tmp_path, cells=4, examples=4, strategies=2, scenarios=1)
    begun, waits = sorted(p.parent for p in tmp_path.glob("*/result.json"))[:2]
    for cell, left in ((begun, 1), (waits, 0)):
        (cell / "result.json").unlink()
        for experience in sorted((cell / "experiences").iterdir())[left:]:
            shutil.rmtree(experience)
    found = report(tmp_path)
    write_provenance([f.cell for f in found], tmp_path / "report")
    index = (tmp_path / "report" / "index.html").read_text()
    assert "<span>Base model</span><b>–" not in index
    assert "<span>Strategies × seeds</span><b>2 × 2 <span>4 cells</span>" in index
    told = (tmp_path / "report" / "provenance.md").read_text()
    assert re.search(r"together: train \d+, compress \d+, evaluate \d+, harness \d+\.", told)


def test_a_report_tells_plugins_of_one_name_apart(tmp_path: Path) -> None:
    """Cells that `RunConfig.cell` keeps in folders of their own are lines of their own."""
    make(tmp_path, cells=2, examples=4, strategies=2, scenarios=1)
    for folder, cell in zip("ab", sorted(tmp_path.glob("*__*")), strict=True):
        for name in ("cell.json", "result.json"):
            told = json.loads((cell / name).read_text())
            told["config"]["strategy"] = f"/home/me/{folder}/mine.py"
            (cell / name).write_text(json.dumps(told | {"strategy": "mine", "label": "mine"}))
    report(tmp_path)
    index = (tmp_path / "report" / "index.html").read_text().replace("<wbr>", "")
    for name in ("a/mine", "b/mine"):
        assert f"</span>{name}" in index
    assert (tmp_path / "report" / "cells-table.csv").read_text().count("/mine,") == 2


def test_a_cells_page_shows_what_its_router_did_and_others_have_no_such_part(made: Path) -> None:
    """Counts are those of the record: 6 test examples of each of three tasks."""
    text = page_of(made, "lora")
    result = json.loads(next(made.parent.glob("synthetic-1__lora__*/result.json")).read_text())
    table = text[text.index("What test prompts were taken for") :]
    rows = rows_of(table)
    assert [row[0] for row in rows] == result["tasks"]
    for task, *cells in rows:
        taken = result["routing"][-1][task]
        expected = [taken.get(name, 0) for name in result["tasks"]]
        assert [cell.split() for cell in cells] == [
            [str(n), f"{100 * n / 6:.1f}", "%"] for n in expected
        ]
    (shown,) = rows_of(text[text.index("Routing accuracy, per cent") :])
    assert shown == [f"{100 * x:.1f}" for x in result["routing_accuracy"][1:]]
    assert "task IDs inferred (ridge)" in text
    for strategy, told in (("graftllm", "given"), ("sequential", "not needed")):
        other = page_of(made, strategy)
        assert 'id="routing"' not in other and f"task IDs {told}" in other


def test_a_cells_page_tells_shared_bytes_by_name(made: Path) -> None:
    text = page_of(made, "lora")
    result = json.loads(next(made.parent.glob("synthetic-1__lora__*/result.json")).read_text())
    told = dict(re.findall(r"<dt>([^<]*)</dt><dd>([\d,]+)</dd>", text))
    own = sum(result["pack_bytes"])
    assert told["shared: router"] == "5,000"
    assert told["packs still needed"] == f"{own:,}"
    assert told["alive after the last task"] == f"{own + 5_000:,}"
    assert told["largest pack of a task"] == f"{max(result['pack_bytes']):,}"
    assert "<b>" in text and "5.0 kB of them shared" in text


def test_the_page_says_of_every_row_whether_the_task_was_told(made: Path) -> None:
    text = (made / "index.html").read_text()
    table = text[text.index('data-kind="ranking"') :]
    bodies = table[: table.index("</table>")].split("<tbody>")[1:]
    rows = [row for body in bodies for row in rows_of(f"<tbody>{body}") if len(row) > 1]
    told = {row[0].split()[0]: row[1] for row in rows}
    assert told["graftllm"] == "given" and told["lora(task_ids=inferred)"] == "inferred (ridge)"
    assert told["sequential"] == "not needed"
    assert "compare like with like" in text


def test_right_and_wrong_are_told_by_a_sign_and_a_word() -> None:
    """Not by colour alone; and a score between 0 and 1 as a number."""
    row = ExampleRow(
        0, None, Answer(0.0, "no", ""), Answer(0.75, "nearly", ""), Answer(1.0, "yes", "")
    )
    cells = re.findall(r'<b class="m">(.*?)</b>', page.cell._row(row, row.outcome, False))
    words = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    assert words == ["✗wrong", "✓right 0.75", "✓right"]


def test_an_example_says_what_a_router_took_it_for(made: Path) -> None:
    """The words are those of the record; where the task was told, or no task is needed, there are none."""
    folder = next(made.parent.glob("synthetic-1__lora__*"))
    text = page_of(made, "lora")
    for j, task in enumerate(TASKS):
        section = text[text.index(f'id="task-{j + 1}"') :]
        shown = rows_of(section)
        for label, column, experience in (("learned", 4, j + 1), ("end", 5, 3)):
            lines = (folder / f"experiences/{experience:02d}/examples.jsonl").read_text()
            told = [t for t in map(json.loads, lines.splitlines()) if t["task"] == task]
            assert len(told) == len(shown) == 6
            for row, line in zip(shown, told, strict=True):
                if "same" not in row[column]:
                    assert row[column].endswith(f"taken for {line['taken_for']}"), label
                assert "taken for" not in row[3], "nothing chooses before there is a pack"
    for strategy in ("graftllm", "sequential"):
        assert "taken for" not in page_of(made, strategy)


def test_what_a_router_took_wrongly_is_marked() -> None:
    def said(taken_for: str | None) -> str:
        answer = Answer(1.0, "yes", "", taken_for)
        row = ExampleRow(0, None, Answer(0.0, "no", "", ""), answer, Answer(0.0, "no", ""))
        (found,) = re.findall(r"<small.*?</small>|$", page.cell._row(row, "", False, "math"))[:1]
        return str(found)

    assert said("math") == "<small>taken for math</small>"
    assert said("code") == '<small class="off">taken for code</small>'
    assert said("") == '<small class="off">taken for the base model</small>'
    assert said(None) == ""


def test_links_say_what_they_open(made: Path) -> None:
    """18 examples: 6 of each of three tasks."""
    index = (made / "index.html").read_text()
    (link,) = re.findall(
        r'<a href="cells/synthetic-1_graftllm.html" title="answers[^>]*>.*?</a>', index
    )
    assert link.endswith(">18 examples, seed 0</a>")
    assert "answers of graftllm, seed 0, to every test example of math, code, cipher" in link
    text = page_of(made, "graftllm")
    assert "6 test examples, answered by the base model, after math, after cipher</span>" in text
    assert "6 test examples, answered by the base model, after cipher</span>" in text
    for heading in re.findall(r'<a [^>]*href="#task-\d"[^>]*>', text):
        assert 'title="6 test examples of ' in heading


@given(st.text(max_size=80))
def test_a_name_can_be_broken_everywhere_that_it_must_and_stays_the_same(name: str) -> None:
    pieces = template.breakable(name).split("<wbr>")
    assert "".join(map(unescape, pieces)) == name
    assert all(len(unescape(piece)) <= 18 or not piece.strip() for piece in pieces)


def test_a_name_is_broken_at_its_separators() -> None:
    pieces = template.breakable("graftllm_adaptive(group_size=64)").split("<wbr>")
    assert pieces == ["graftllm_", "adaptive(", "group_", "size=", "64)"]


def test_intervals_that_are_all_but_alike_are_not_magnified() -> None:
    """Two scores 0.04 points apart are 0.0004 / 0.05 of the plot's 122 pixels apart."""
    ranked: list[Any] = [
        SimpleNamespace(line=SimpleNamespace(part="one"), op=Interval(x, x, x, "seeds"))
        for x in (0.0, 0.0004)
    ]
    assert [plot[1] for plot in page.index.rows._plots(ranked)] == [5.0, 6.0]


def test_an_example_is_followed_from_before_to_the_end(tmp_path: Path) -> None:
    make(tmp_path, cells=1, examples=40, strategies=1, scenarios=1)
    (found,) = find([tmp_path])
    rows = breakdown(found.path, found.cell, {})
    assert list(rows) == found.cell["tasks"]
    for j, those in enumerate(rows.values()):
        for experience, answers in ((0, "before"), (j + 1, "learned"), (3, "end")):
            scores = [getattr(row, answers).score for row in those]
            assert sum(scores) / 40 == pytest.approx(found.cell["matrix"][experience][j])
    assert {row.outcome for row in rows["cipher"]} <= {"kept", "known", "never"}  # learned last
    score = sum(weight * x.mean() for weight, x in reader()(found)[1])
    assert score == pytest.approx(found.cell["metrics"]["op"])


def test_scores_that_the_examples_do_not_come_to_are_not_compared(tmp_path: Path) -> None:
    make(tmp_path, cells=1, examples=4, strategies=1, scenarios=1)
    (found,) = find([tmp_path])
    assert list(outcomes(found.path, found.cell, {}, 3)) == found.cell["tasks"]
    found.cell["matrix"][-1][0] += 0.1
    assert outcomes(found.path, found.cell, {}, 3) == {}


def test_templates_escape_and_miss_nothing() -> None:
    made = template.environment()
    assert made.autoescape is True
    with pytest.raises(Exception, match="undefined"):
        template.render("cell.html")


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=120_000)
        yield opened
        opened.close()


class Shown:
    """A page in the browser, with all that it complained of and asked for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_load_state("load")

    def column(self, table: str, index: int) -> list[list[str]]:
        """Of each part of a table, what a column sorts by."""
        shown = f"r => r.cells[{index}].dataset.v ?? r.cells[{index}].innerText"
        rows = "[...body.querySelectorAll('tr:not(.part)')]"
        found: list[list[str]] = self.page.eval_on_selector_all(
            f"{table} tbody", f"bodies => bodies.map(body => {rows}.map({shown}))"
        )
        return found

    def close(self) -> None:
        self.page.context.close()


# What is wider or higher than its box, and neither in a box that says so nor scrolled to its end.
CUT = """[...document.querySelectorAll("body *")].filter(e =>
  e.checkVisibility() && e.clientWidth && !e.closest("svg, .sr, select, input")
  && getComputedStyle(e).display !== "inline"
  && (e.scrollWidth > e.clientWidth + 1 && !e.parentElement.matches(".box.right")
    || e.scrollHeight > e.clientHeight + 1 && getComputedStyle(e).overflowY !== "visible"
      && !e.parentElement.matches(".box.down") && !e.matches("table.ex .t"))
).map(e => `${e.tagName}.${e.className} ${e.clientWidth} ${e.scrollWidth}: ${e.innerText.slice(0, 40)}`)"""


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["index", "cell", "incomplete", "evil", "one"])
def test_a_page_loads_whole_and_fits(
    made: Path, one: Path, browser: Any, which: str, scheme: str, width: int
) -> None:
    cells = sorted((made / "cells").iterdir())
    file = {"index": made / "index.html", "one": one / "index.html", "evil": cells[0]}.get(which)
    shown = Shown(browser, file or cells[1 if which == "incomplete" else -1], width, scheme)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith(("file://", "data:"))] == []
    images = shown.page.eval_on_selector_all(
        "img", "all => all.map(i => [i.currentSrc, i.naturalWidth])"
    )
    assert all(natural > 0 for _, natural in images), images
    if which in ("index", "one"):
        assert len(images) >= 5
        assert all(("/dark/" in source) == (scheme == "dark") for source, _ in images)
    size = shown.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert size[0] <= size[1] == width
    assert shown.page.evaluate(CUT) == []
    colour = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 200) == (scheme == "dark")
    shown.close()


def test_a_shadow_says_on_which_side_there_is_more(made: Path, browser: Any) -> None:
    shown = Shown(browser, made / "index.html", 390)
    box = shown.page.locator("#overview .box")
    edges = "e => ['left', 'right', 'down'].filter(name => e.classList.contains(name))"
    shadow = "e => getComputedStyle(e, '::after').boxShadow.match(/-?16px/g)"
    assert (box.evaluate(edges), box.evaluate(shadow)) == (["right"], ["-16px"])
    scroll = "e => {{ e.firstElementChild.scrollLeft = {} }}"
    for far, expected in ((40, ["left", "right"]), (9999, ["left"]), (0, ["right"])):
        box.evaluate(scroll.format(far))
        shown.page.wait_for_function(
            "want => want === ['left', 'right', 'down'].filter(name => document.querySelector("
            "'#overview .box').classList.contains(name)).join()",
            arg=",".join(expected),
        )
    assert box.evaluate("e => e.firstElementChild.tabIndex") == 0, "the keyboard reaches it"
    shown.close()


def test_a_click_on_a_header_sorts_and_another_turns_it_round(made: Path, browser: Any) -> None:
    shown = Shown(browser, made / "index.html")
    table = "#synthetic-1-mini-llama-budget-10pct table[data-kind=ranking]"
    head = f"{table} thead th:nth-child(%d) button"
    before = shown.column(table, 3)
    assert len(before) == 4, "told or not, with a budget or without"
    for part in before:
        assert part == sorted(part, key=float, reverse=True), "the best come first"
    shown.page.click(head % 4)
    assert shown.column(table, 3) == before
    shown.page.click(head % 4)
    assert shown.column(table, 3) == [part[::-1] for part in before]
    assert shown.page.get_attribute(f"{table} thead th:nth-child(4)", "aria-sort") == "ascending"
    shown.page.click(head % 1)
    for names in shown.column(table, 0):
        assert names == sorted(names)
    shown.close()


def test_what_is_unmeasured_stays_last(made: Path, browser: Any) -> None:
    shown = Shown(browser, made / "index.html")
    table = "#synthetic-0-mini-llama-budget-10pct table[data-kind=ranking]"
    for _ in range(2):
        shown.page.click(f"{table} thead th:nth-child(4) button")
        parts = shown.column(table, 3)
        assert any("" in values for values in parts)
        assert all("" not in values[: len(values) - values.count("")] for values in parts)
    shown.close()


def test_cells_are_filtered_and_lead_to_their_pages_and_back(made: Path, browser: Any) -> None:
    shown = Shown(browser, made / "index.html")
    shown.page.fill("input[data-filter]", "lora synthetic-1")
    visible = "#all-cells tbody tr:not([hidden], .part)"
    names = shown.page.eval_on_selector_all(visible, "rows => rows.map(r => r.innerText)")
    assert names and all("lora" in name and "synthetic-1" in name for name in names)
    shown.page.click(f"{visible} a >> nth=0")
    shown.page.wait_for_url("**/cells/*lora*")
    chip = shown.page.locator(".chip").first
    kind = chip.get_attribute("data-show")
    chip.click()
    left = shown.page.eval_on_selector_all(
        "#examples-1 tbody tr:not([hidden])", "rows => rows.map(r => r.dataset.o)"
    )
    assert left and set(left) == {kind}
    shown.page.click("nav a >> nth=0")
    shown.page.wait_for_url("**/index.html#synthetic-1*")
    assert shown.said == []
    shown.close()
