"""LaTeX tables for papers: what is bold, how wide they are, and that every row has every column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import font_manager
from matplotlib.textpath import TextPath

from cl_graft.report import ReportedCell
from cl_graft.report.overview import Standing
from cl_graft.report.paper import tables
from cl_graft.report.paper.latex import GAP, POINTS, Column, Row, table, width
from cl_graft.report.paper.sheet import WIDTHS, environment
from cl_graft.report.paper.standing import Scores
from cl_graft.report.protocols import TOLD, UNTOLD
from cl_graft.report.ranks import Ranks
from cl_graft.report.significance import RankedLine, ranked_lines
from cl_graft.report.statistics import Difference, Interval
from tests.report.test_overview import right
from tests.report.test_protocols import MIXED, at
from tests.report.test_routing import told
from tests.report.test_tables import cell

ROMAN = Path(font_manager.__file__).parent / "mpl-data/fonts/ttf/cmr10.ttf"  # Computer Modern


def grid(text: str) -> list[list[str]]:
    """The cells of a table, heads first; asserts what LaTeX asks for: environments and braces closed, and every row of as
    many cells as the table has columns."""
    open_: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([a-z*]+)\}", text):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert not open_
    bare = re.sub(r"\\[{}%&_#$]", "", text)
    assert bare.count("{") == bare.count("}")
    (spec,) = re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", text)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [re.split(r"(?<!\\)&", r) for r in re.findall(r"^(?!\\[tm])(.+) \\\\$", body, re.M)]
    assert {len(row) for row in rows} == {len(spec)}
    return [[cell.strip() for cell in row] for row in rows]


def column(text: str, head: str) -> dict[str, str]:
    heads, *rows = grid(text)
    place = next(k for k, name in enumerate(heads) if name.split()[0] == head)
    return {row[0]: row[place] for row in rows}


def placed(cells: list[dict[str, Any]]) -> list[RankedLine]:
    return ranked_lines([ReportedCell(Path(str(k)), c) for k, c in enumerate(cells)], right)


BLOCK = [Row("a", [50.04, 1.0]), Row("b", [49.96, 3.0]), Row("c", [40.0, 2.0])]


def test_the_best_of_a_block_is_bold_as_it_is_printed_and_the_next_underlined() -> None:
    """50.04 and 49.96 are both 50.0 in print; a reader would ask why one of them is better. Of the second, less is."""
    made = table([Column("OP"), Column("FM", better=-1)], [BLOCK, [Row("d", [90.0, 0.0])]], "", "x")
    assert column(made, "OP") == {
        "a": r"\textbf{50.0}",
        "b": r"\textbf{50.0}",
        "c": r"\underline{40.0}",
        "d": "90.0",  # alone in its block
    }
    assert column(made, "FM") == {
        "a": r"\textbf{1.0}",
        "b": "3.0",
        "c": r"\underline{2.0}",
        "d": "0.0",
    }


def test_nothing_is_best_where_all_are_alike_or_more_is_not_better() -> None:
    rows = [Row("a", [0.0, 5.0]), Row("b", [0.01, 7.0]), Row("c", [float("nan"), 6.0])]
    made = table([Column("BWT"), Column("Storage", better=0)], [rows], "", "x")
    assert column(made, "BWT") == {"a": "0.0", "b": "0.0", "c": "--"}
    assert column(made, "Storage") == {"a": "5.0", "b": "7.0", "c": "6.0"}


def test_names_and_captions_are_escaped() -> None:
    made = table([Column("a_b & c")], [[Row("task_arithmetic", [1.0])]], "50 % of_it", "t")
    assert grid(made)[0][1] == r"a\_b \& c $\uparrow$"
    assert grid(made)[1][0] == r"task\_arithmetic"
    assert r"\caption{50 \% of\_it}" in made and r"\label{tab:t}" in made


def test_scores_of_a_group_stand_apart_by_protocol_and_have_references_below() -> None:
    made = tables.scores("mini · 10%", placed(MIXED), "mini")
    assert set(made) == {"scores-untold.tex", "scores-told.tex"}
    untold, given = made["scores-untold.tex"], made["scores-told.tex"]
    assert [row[0] for row in grid(untold)] == [
        "Strategy",
        "base model",
        "graftllm",  # with inferred tasks: best of its block
        "lora",
        "sequential",
    ]
    assert untold.count(r"\midrule") == 3
    assert column(untold, "OP")["graftllm"].startswith(r"\textbf{70.0}")
    assert column(untold, "OP")["lora"].startswith(r"\underline{50.0}")
    assert [row[0] for row in grid(given)[2:]] == ["graftllm", "individual"]
    assert r"\label{tab:mini-untold}" in untold and r"\label{tab:mini-told}" in given
    assert "resizebox" not in untold + given


def test_a_star_is_who_is_behind_the_best_by_the_test_of_the_page() -> None:
    cells = [at(n, x + 0.02 * s, s) for n, x in {"a": 0.9, "b": 0.5}.items() for s in (0, 1, 2)]
    best, worse = placed(cells)
    assert worse.significant
    text = tables.scores("x", [best, worse], "x")["scores-untold.tex"]
    assert column(text, "OP")["b"].endswith(r"\rlap{$^{*}$}")
    assert "*" not in column(text, "OP")["a"]
    one = RankedLine(worse.line, worse.op, Difference(-0.4, -0.6, 0.1, 0.2, 3, 60))
    text = tables.scores("x", [best, one], "x")["scores-untold.tex"]
    assert "*" not in column(text, "OP")["b"]


def test_tasks_are_left_out_where_they_have_no_room() -> None:
    def many(count: int) -> list[dict[str, Any]]:
        tasks = [f"benchmark_{k}" for k in range(count)]
        rows = [[0.1] * count, *[[0.5] * count] * count]
        empty: Any = [{task: {} for task in tasks}] * (count + 1)
        same: Any = [[False] * count] * (count + 1)
        return [cell(matrix=rows, tasks=tasks, routing=empty, identical=same)]

    few, more = (
        tables.scores("x", placed(many(count)), "x")["scores-untold.tex"] for count in (3, 15)
    )
    assert len(grid(few)[0]) == 1 + 3 + 5
    assert len(grid(more)[0]) == 1 + 5
    assert column(more, "OP")["base model"] == "10.0"
    assert column(more, "OP")["graftllm"].startswith("50.0 {")


def printed(text: str, size: float = 8.0) -> float:
    """Points that a cell takes in Computer Modern."""
    plain = re.sub(r"\\(textbf|underline|rlap)|[{}\\]|\$\^\{\*\}\$", "", text)
    for sign, letter in (
        ("$pm$", "x"),
        ("$uparrow$", "i"),
        ("$downarrow$", "i"),
        ("$-$", "x"),
    ):
        plain = plain.replace(sign, letter)
    plain = plain.replace("scriptsize", "")
    assert "$" not in plain, plain
    path: Any = TextPath((0, 0), plain or " ", size=size, prop={"fname": str(ROMAN)})  # type: ignore[arg-type]
    return float(path.get_extents().width)


def wide(text: str) -> float:
    """Inches that a table takes as LaTeX sets it, about."""
    rows = [[printed(cell) for cell in row] for row in grid(text)]
    columns = [max(those) for those in zip(*rows, strict=True)]
    return (sum(columns) + 2 * GAP * (len(columns) - 1)) / POINTS


def test_tables_are_no_wider_than_the_text_they_stand_in() -> None:
    """Measured by the letters of Computer Modern, which are wider than those of Times."""
    made = tables.scores("mini", placed(MIXED), "mini")
    for text in made.values():
        over = "table*" in text
        assert wide(text) <= WIDTHS["2col" if over else "1col"]
    names = ["model_grafting_and_more", "WWWWWWWW", "svd_quant"]
    rows = [Row(name, [12.3] * 6, {2: 4.5}, frozenset({2})) for name in names]
    columns = [Column(head) for head in ("math", "code", "OP", "BWT", "General", "DBpedia")]
    text = table(columns, [rows], "", "x")
    assert wide(text) <= width(columns, rows) < 1.35 * wide(text)


def test_strategies_by_scenarios_go_on_in_a_further_table() -> None:
    names = tuple(f"scenario {k}" for k in range(14))
    nan = float("nan")
    scores = {n: [Interval(x, nan, nan)] * 14 for n, x in {"a": 0.5, "b": 0.25, "": 0.1}.items()}
    standings = [Standing("", ("base model", "", ""), scores[""])]
    standings += [Standing(UNTOLD, (n, "", ""), scores[n]) for n in "ab"]
    none = Ranks((), (), (), (), nan, nan)
    block: Any = (("s", ("t",), "m"),)
    ranks = {UNTOLD: Ranks(("a", "b"), (1.0, 2.0), block, (), nan, nan), TOLD: none}
    made = tables.overview(Scores("", names, standings, ranks), "scenarios")
    assert set(made) == {"scenarios-untold.tex"}
    first, second = made["scenarios-untold.tex"].split(r"\end{table*}")[:2]
    heads = [
        re.findall(r"scenario \d+|Rank", part[part.index("toprule") :].split("midrule")[0])
        for part in (first, second)
    ]
    assert [*heads[0][:-1], *heads[1][:-1]] == list(names)
    assert heads[0][-1] == heads[1][-1] == "Rank"
    assert r"\label{tab:scenarios-untold}" in first and "untold-2}" in second
    assert r"a & \textbf{50.0}" in first and r"& \textbf{1.0} \\" in second


@pytest.mark.parametrize("text", [environment("curves", ["100 % of_it", "wide"], "mini-curves")])
def test_a_figure_has_a_caption_and_a_label_and_the_wide_one_is_a_comment(text: str) -> None:
    live = [line for line in text.split("\n") if not line.startswith("%")]
    assert live[:3] == [
        r"\begin{figure}[t]",
        r"\centering",
        r"\includegraphics[width=\columnwidth]{curves-1col}",
    ]
    assert r"\caption{100 \% of\_it}" in live and r"\label{fig:mini-curves}" in live
    assert "% \\includegraphics[width=\\textwidth]{curves-2col}" in text.split("\n")


def test_methods_that_are_told_the_task_are_never_in_one_table_with_others() -> None:
    cells = [at("lora", 0.5), at("ties", 0.4), at("graftllm", 0.9, make=told)]
    made = tables.scores("x", placed(cells), "x")
    assert "graftllm" not in made["scores-untold.tex"]
    assert r"\textbf{50.0}" in made["scores-untold.tex"]
    assert "textbf" not in made["scores-told.tex"]  # alone
