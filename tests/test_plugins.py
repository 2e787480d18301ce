"""Finding scenarios and strategies: our folders, a user's file, an installed package; and reading their options."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from cl_graft import plugins
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.ranges import Count, Positive, Rest, Share
from cl_graft.strategy import Strategy, compressor, merger
from cl_graft.task import Scenario
from tests.refusals import one_sentence

ROOT = Path(__file__).parents[1]

STRATEGY = '''"""Keeps {what}."""
from cl_graft.strategy import compressor

@compressor()
def {name}(delta, context, *, density: float = 0.5, rank: int | None = None):
    """Keep {what}."""
    return context.top_magnitude(delta)
'''

SCENARIO = '''"""Streams {what}."""
from cl_graft.task import Example, Scenario, Task

def {name}(*, seed: int, data_dir=None, size: int = 2):
    examples = [Example(str(i), str(seed)) for i in range(size)]
    return Scenario("{name}", (Task("only", examples, examples, "exact"),))
'''


def written(folder: Path, name: str, text: str = STRATEGY, what: str = "nothing") -> Path:
    file = folder / f"{name}.py"
    file.write_text(text.format(name=name, what=what), encoding="utf-8")
    return file


# --- by name ---


@pytest.mark.parametrize("name", plugins.names("strategy"))
def test_every_strategy_loads_by_its_name(name: str) -> None:
    found = plugins.load("strategy", name)
    assert issubclass(found, Strategy) and found.__name__ == name
    assert found.__doc__ and plugins.about("strategy", name)
    assert plugins.check_options("strategy", name, found, {}) == plugins.options(found)


@pytest.mark.parametrize("name", plugins.names("scenario"))
def test_every_scenario_loads_by_its_name(name: str) -> None:
    found = plugins.load("scenario", name)
    assert callable(found) and found.__name__ == name
    assert plugins.about("scenario", name)
    assert not {"seed", "data_dir"} & plugins.options(found).keys()


def test_the_names_are_those_of_the_files() -> None:
    strategies = {p.stem for p in (ROOT / "baselines").glob("*.py")}
    strategies |= {"graftllm", "graftllm_adaptive"}
    scenarios = {p.stem for p in (ROOT / "scenarios").glob("*.py")}
    assert set(plugins.names("strategy")) == strategies
    assert set(plugins.names("scenario")) == scenarios
    assert {"lora", "model_grafting", "model_tailor", "graftllm", "sequential"} <= strategies
    assert {"mini", "math_then_code", "text_classification"} <= scenarios


@pytest.mark.parametrize(
    ("kind", "typo", "meant"),
    [
        ("strategy", "grafllm", "graftllm"),
        ("strategy", "model_taylor", "model_tailor"),
        ("scenario", "minni", "mini"),
        ("scenario", "text_clasification", "text_classification"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(kind: str, typo: str, meant: str) -> None:
    with pytest.raises(UnknownName) as refused:
        plugins.load(kind, typo)
    assert f"no {kind} named {typo!r}; did you mean {meant}" in str(refused.value)


def test_a_name_near_to_none_is_answered_with_all() -> None:
    with pytest.raises(UnknownName, match="known: .*graftllm.*lora.*ties"):
        plugins.load("strategy", "zzzzzzzz")


def test_listing_imports_nothing() -> None:
    """`cl-graft list` answers at once, so no plugin, and no torch, is imported for it."""
    code = """
import sys
from cl_graft import plugins
for kind in plugins.KINDS:
    assert all(plugins.about(kind, name) for name in plugins.names(kind))
loaded = [m for m in sys.modules if m.split(".")[0] in ("torch", "transformers", "baselines", "scenarios")]
assert not loaded and "cl_graft.strategy.graftllm" not in sys.modules, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- from a path ---


def test_a_strategy_from_a_users_path(tmp_path: Path) -> None:
    file = written(tmp_path, "my_method")
    found = plugins.load("strategy", str(file))
    assert issubclass(found, Strategy)
    assert plugins.options(found) == {"density": 0.5, "rank": None}
    assert plugins.load("strategy", str(file)) is found


def test_a_scenario_from_a_users_path(tmp_path: Path) -> None:
    make = plugins.load("scenario", str(written(tmp_path, "my_stream", SCENARIO)))
    scenario = make(
        seed=7, data_dir=None, **plugins.check_options("scenario", "s", make, {"size": 3})
    )
    assert isinstance(scenario, Scenario) and len(scenario.tasks[0].test) == 3


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one = plugins.load("strategy", str(written(tmp_path / "a", "twin", what="one")))
    two = plugins.load("strategy", str(written(tmp_path / "b", "twin", what="two")))
    assert (one.__doc__, two.__doc__) == ("Keep one.", "Keep two.")


def refusal(kind: str, file: Path | str) -> str:
    return one_sentence(lambda: plugins.load(kind, str(file)))


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal("strategy", tmp_path / "nowhere.py")


def test_a_file_that_does_not_define_its_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "named.py"
    file.write_text(STRATEGY.format(name="otherwise", what="nothing"))
    message = refusal("strategy", file)
    assert "named.py" in message and "defines no 'named'" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_package_at_all", "no_such_package_at_all"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("raise ValueError('two\\nlines')", "two"),
    ],
)
def test_a_file_that_does_not_import_is_refused_every_time(
    tmp_path: Path, text: str, reason: str
) -> None:
    """Also the second time: half a module must not stay behind as if it were whole."""
    file = tmp_path / "broken.py"
    file.write_text(text)
    for _ in range(2):
        message = refusal("strategy", file)
        assert "broken.py does not import" in message and reason in message


def test_a_file_is_imported_anew_once_it_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "mended.py"
    file.write_text("from cl_graft.errors import CLGraftError\nraise CLGraftError('not yet.')")
    assert refusal("strategy", file) == "not yet."
    file.write_text(STRATEGY.format(name="mended", what="nothing") + "# and longer\n")
    assert issubclass(plugins.load("strategy", str(file)), Strategy)


@pytest.mark.parametrize(
    "text",
    [
        "plain = 3",
        "def plain(delta, context): return {}",
        "from cl_graft.strategy import Strategy\nclass plain(Strategy): pass",
    ],
)
def test_a_file_whose_object_is_no_strategy_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plain.py"
    file.write_text(text)
    assert "is no strategy; make it one by @compressor" in refusal("strategy", file)


@pytest.mark.parametrize(
    "text",
    ["odd = 3", "def odd(): ...", "def odd(*, seed): ...", "def odd(*, seed, data_dir, size): ..."],
)
def test_a_file_whose_object_is_no_scenario_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.py"
    file.write_text(text)
    assert "'odd' is no scenario" in refusal("scenario", file)


# --- from an installed package ---


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as pip leaves it: a module, and a dist-info folder with entry points."""
    written(tmp_path, "far_away", what="what comes from afar")
    written(tmp_path, "far_stream", SCENARIO)
    (tmp_path / "far_broken.py").write_text("1 / 0")
    info = tmp_path / "far-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[cl_graft.baselines]\nfar_away = far_away:far_away\nfar_broken = far_broken:x\n"
        "far_lost = far_away:nothing\n[cl_graft.scenarios]\nfar_stream = far_stream:far_stream\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("far_away", "far_stream", "far_broken"):
        sys.modules.pop(name, None)


def test_plugins_of_an_installed_package(package: Path) -> None:
    assert "far_away" in plugins.names("strategy") and "far_stream" in plugins.names("scenario")
    assert "far_away" not in plugins.names("scenario")
    assert plugins.load("strategy", "far_away").__doc__ == "Keep what comes from afar."
    assert plugins.load("scenario", "far_stream")(seed=1).task_names == ("only",)
    assert plugins.about("strategy", "far_away") == "Keeps what comes from afar."
    assert plugins.origin("strategy", "far_away") == "far 1.0"
    (package / "far_away.py").rename(package / "elsewhere.py")
    assert "without importing" in plugins.about("strategy", "far_away")
    with pytest.raises(UnknownName, match="did you mean far_away"):
        plugins.load("strategy", "far_awa")


def test_where_a_plugin_comes_from(tmp_path: Path) -> None:
    assert plugins.origin("strategy", "graftllm") == "cl_graft/strategy/graftllm.py"
    assert plugins.origin("strategy", "ties") == "baselines/ties.py"
    assert plugins.origin("scenario", "mini") == "scenarios/mini.py"
    file = str(written(tmp_path, "mine"))
    assert plugins.origin("strategy", file) == file
    assert plugins.about("strategy", file) == "Keeps nothing."
    with pytest.raises(UnknownName, match="did you mean ties"):
        plugins.origin("strategy", "tie")
    with pytest.raises(CLGraftError, match="there is no file"):
        plugins.about("strategy", "./none.py")


def test_a_broken_plugin_of_an_installed_package_is_named(package: Path) -> None:
    message = refusal("strategy", "far_broken")
    assert "far_broken" in message and "installed package" in message and "ZeroDivision" in message
    assert "far_lost" in refusal("strategy", "far_lost")


# --- options ---


@compressor()
def example(
    delta,
    context,
    *,
    share: float = 0.1,
    rank: int | None = None,
    exact: bool = False,
    mode: Literal["fast", "slow"] = "fast",
    bare=3,
    anything=None,
):
    """An example."""
    return {}


DEFAULTS = {
    "share": 0.1,
    "rank": None,
    "exact": False,
    "mode": "fast",
    "bare": 3,
    "anything": None,
}


def test_options_are_the_keyword_only_arguments() -> None:
    assert plugins.options(example) == DEFAULTS

    @merger
    def merged(deltas, *, scale: float = 1.0):
        return deltas[0]

    class trained(Strategy):
        def learn(self, task, context, *, rounds: int = 4):
            return {}

    assert plugins.options(merged) == {"scale": 1.0}
    assert plugins.options(trained) == {"rounds": 4}


@pytest.mark.parametrize(
    "chosen",
    [
        {"share": 1},
        {"share": 0.25, "rank": 8},
        {"rank": None, "exact": True},
        {"mode": "slow", "bare": 5, "anything": [1, "two"]},
    ],
)
def test_chosen_options_replace_defaults(chosen: dict[str, Any]) -> None:
    assert plugins.check_options("strategy", "example", example, chosen) == DEFAULTS | chosen


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("share", "much", "float"),
        ("share", True, "float"),
        ("share", None, "float"),
        ("share", float("nan"), "float"),
        ("rank", "many", "int | None"),
        ("rank", 2.5, "int | None"),
        ("exact", 1, "bool"),
        ("exact", "yes", "bool"),
        ("bare", "x", "int"),
        ("bare", True, "int"),
        ("anything", object(), "Any"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(option: str, value: Any, wanted: str) -> None:
    with pytest.raises(CLGraftError) as refused:
        plugins.check_options("strategy", "example", example, {option: value})
    assert f"example.{option}={value!r} should be {wanted}, as its default" in str(refused.value)


def test_a_choice_that_there_is_none_of_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        UnknownName, match=r"no value of example\.mode named 'medium'; known: fast, slow"
    ):
        plugins.check_options("strategy", "example", example, {"mode": "medium"})


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("count", 0, "ranged.count=0 is not 1 or more; the nearest is 1."),
        ("share", 1.5, "ranged.share=1.5 is not a number from 0, up to 1; the nearest is 1."),
        ("share", -1, "ranged.share=-1 is not a number from 0, up to 1; the nearest is 0."),
        (
            "dropout",
            1.0,
            "ranged.dropout=1.0 is not a number from 0, below 1; give one such as 0.1.",
        ),
        ("rate", 0, "ranged.rate=0 is not a number above 0; give one."),
        ("bits", 7, "ranged.bits=7 is none of 2, 4, 8; the nearest is 8."),
        ("high", 9, "ranged.high=9 is not a number up to 8; the nearest is 8."),
    ],
)
def test_a_number_outside_of_its_range_is_refused_with_the_nearest(option, value, sentence) -> None:
    @compressor()
    def ranged(
        delta,
        context,
        *,
        count: Count | None = None,
        share: Share = 0.5,
        dropout: Rest = 0.1,
        rate: Positive | None = None,
        bits: Literal[2, 4, 8] = 4,
        high: Annotated[int, Field(le=8)] = 8,
    ):
        return {}

    with pytest.raises(CLGraftError) as refused:
        plugins.check_options("strategy", "ranged", ranged, {option: value})
    assert str(refused.value) == sentence


UNBOUNDED: set[str] = set()  # numbers that may be anything


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_number_that_our_plug_ins_take_has_a_range(kind: str) -> None:
    """So that none is found wrong only after training."""
    for name in plugins.names(kind):
        plugin = plugins.load(kind, name)
        function = getattr(plugin, "function", plugin)
        made = function.__init__ if isinstance(function, type) else function
        hints = get_type_hints(made, include_extras=True)
        for option, default in plugins.options(plugin).items():
            parts = {hints.get(option, type(default)), *get_args(hints.get(option))}
            told = f"{name}.{option}" in UNBOUNDED
            ranged = any("Annotated" in str(part) for part in parts)
            assert told or ranged or not parts & {int, float}, f"{name}.{option}"


def test_an_unknown_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName) as refused:
        plugins.check_options("strategy", "example", example, {"shares": 0.5})
    assert "no option of strategy example named 'shares'; did you mean share" in str(refused.value)


def test_an_option_without_a_default_is_refused() -> None:
    @compressor()
    def strict(delta, context, *, needed: int):
        return {}

    with pytest.raises(CLGraftError, match="'needed' of strict has no default"):
        plugins.options(strict)


# --- --set ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lora.rank=8", 8),
        ("lora.rank=-8", -8),
        ("lora.rank=1e-3", 1e-3),
        ("lora.rank=0.5", 0.5),
        ("lora.rank=true", True),
        ("lora.rank=false", False),
        ("lora.rank=null", None),
        ("lora.rank=[1, 2]", [1, 2]),
        ('lora.rank="8"', "8"),
        ("lora.rank=summed", "summed"),
        ("lora.rank=mawps+gsm8k", "mawps+gsm8k"),
        ("lora.rank=a=b", "a=b"),
        ("lora.rank=", ""),
        ("lora.rank=NaN", "NaN"),
        ("lora.rank=-Infinity", "-Infinity"),
        ("lora.rank=007", "007"),
    ],
)
def test_set_reads_json_or_else_a_word(text: str, value: Any) -> None:
    owner, option, found = plugins.parse_set(text)
    assert (owner, option) == ("lora", "rank")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["", "rank=8", "lora.rank", ".rank=8", "lora.=8", "lora=8", "="])
def test_set_that_does_not_name_an_option_is_refused(text: str) -> None:
    with pytest.raises(CLGraftError, match="should read name.option=value"):
        plugins.parse_set(text)


@settings(deadline=None)
@given(st.text())
def test_set_never_fails_otherwise(value: str) -> None:
    assert plugins.parse_set(f"a.b={value}")[:2] == ("a", "b")
