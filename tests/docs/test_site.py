"""The documentation as a whole: it builds, every link leads somewhere, and nothing in it has drifted from the code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml

from cl_graft import plugins
from cl_graft.cli import built
from cl_graft.skillpack.codecs import CODECS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub and MkDocs make them from headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def links(page: Path) -> list[str]:
    without_code = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, link
            continue
        target = page if not parts.path else page.parent / unquote(parts.path)
        assert target.exists(), f"{page.name}: {link}"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_menu() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [file for entry in config["nav"] for file in entry.values()]
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


class _References(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "img": "src", "link": "href"}.get(tag)
        self.found += [value for name, value in attrs if name == wanted and value]


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (extra `docs`)"
)
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        made = _References()
        text = (tmp_path / page.with_suffix(".html").name).read_text("utf-8")
        made.feed(text)
        assert made.found and not [url for url in made.found if urlsplit(url).netloc], page.name
        assert "| " not in re.sub(r"<(code|pre).*?</\1>", "", text, flags=re.DOTALL), page.name
    reference = (tmp_path / "cli.html").read_text("utf-8")
    assert "cl-graft sweep" in reference and "--retry-failed" in reference
    for name, row in (("sweep-files", "task_ids"), ("reports", "intransigence")):
        assert f"<td><code>{row}</code></td>" in (tmp_path / f"{name}.html").read_text("utf-8")


def test_the_command_lines_on_the_pages_exist() -> None:
    """Each command and each option, as the commands themselves know them."""
    for page in PAGES:
        blocks = re.findall(
            r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
        )
        text = "\n".join(blocks).replace("\\\n", " ")
        for line in re.findall(r"^(?:srun )?cl-graft (.*)$", text, re.MULTILINE):
            words = line.split("#")[0].split()
            command = built(words.pop(0))
            context = typer.Context(command)
            while words and hasattr(command, "commands") and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            assert not hasattr(command, "commands"), f"{page.name}: {line}"
            known = {o for p in command.get_params(context) for o in getattr(p, "opts", [])}
            for option in (word for word in words if word.startswith("--")):
                assert option in known, f"{page.name}: {option} in {line}"


def test_every_codec_and_scorer_is_described() -> None:
    pack, scenario = (DOCS / name for name in ("pack-format.md", "adding-a-scenario.md"))
    assert set(CODECS) <= set(re.findall(r"^\| `(\w+)` \|", pack.read_text("utf-8"), re.MULTILINE))
    told = re.findall(r"^\| `(\w+)` \|", scenario.read_text("utf-8"), re.MULTILINE)
    assert set(plugins.names("scorer")) <= set(told)
