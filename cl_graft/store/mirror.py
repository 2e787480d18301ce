"""A copy of what a cell leaves, at an fsspec URL: how a cell goes on where its node's disk is not shared.

Files that say that others are whole go last, each under a name of its own first, so that whoever reads the copy may
trust it as far as they go.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, Refused, first_line

MARKERS = ("stage.json", "experience.json", "result.json")
OWN = (".lock", ".tmp", ".part")  # of a process on its disk


@dataclass(frozen=True)
class Mirror:
    """`url`: any that fsspec knows, such as s3://bucket/sweep or file:///mnt/sweep. Paths below are relative to it.

    Raises CLGraftError for another, and Refused where it cannot be reached, in one sentence.
    """

    url: str

    def check(self) -> None:
        """Raises CLGraftError for a URL that fsspec does not know, or lacks the library for."""
        self._place  # noqa: B018

    @cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec

        try:
            filesystem, path = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CLGraftError(
                f"{self.url!r} cannot be used ({str(error).rstrip('.')}); give a URL that fsspec knows."
            ) from error
        return filesystem, path.rstrip("/")

    def pull(self, name: str, folder: Path) -> None:
        """Fetch what is there under `name`, a file or a folder, and not in `folder` in this size; markers last."""
        filesystem, root = self._place
        with _said(self.url):
            filesystem.invalidate_cache()
            there = filesystem.find(f"{root}/{name}", detail=True)
            for path, about in sorted(there.items(), key=lambda item: _late(item[0])):
                target = folder / Path(path).relative_to(f"{root}/{name}")
                if path == f"{root}/{name}":
                    target = folder
                if path.endswith(OWN) or (
                    target.is_file() and target.stat().st_size == about["size"]
                ):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.{os.getpid()}.part")
                filesystem.get_file(path, str(part))
                os.replace(part, target)

    def push(self, folder: Path, name: str) -> None:
        """Copy `folder`, or one file, to `name`; a file that is there in the same size stays, but for the state."""
        filesystem, root = self._place
        with _said(self.url):
            filesystem.invalidate_cache()
            there = filesystem.find(f"{root}/{name}", detail=True)
            files = [folder] if folder.is_file() else [f for f in folder.rglob("*") if f.is_file()]
            for file in sorted(files, key=lambda f: _late(f.name)):
                inside = file.relative_to(folder) if file != folder else Path()
                target = (
                    f"{root}/{name}/{inside.as_posix()}" if file != folder else f"{root}/{name}"
                )
                known = there.get(target, {}).get("size")
                if file.name.endswith(OWN) or (known == file.stat().st_size and _once(file)):
                    continue
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                # of its own, for another node may send the same file
                part = f"{target}.{secrets.token_hex(4)}.part"
                filesystem.put_file(str(file), part)
                filesystem.mv(part, target)


def mirror_of(config: RunConfig) -> Mirror | None:
    """The copy that the cell's config asks for, if it does."""
    return Mirror(config.mirror) if config.mirror else None


def _late(path: str) -> tuple[bool, bool, str]:
    name = path.rsplit("/", 1)[-1]
    return name == "result.json", name in MARKERS, path


def _once(file: Path) -> bool:
    """Whether a file is written once; a state is written again in the same size."""
    return file.name != "state.json"


class _said:
    """Turns what any file system raises into one sentence."""

    def __init__(self, url: str):
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CLGraftError) or not isinstance(error, Exception):
            return
        reason = first_line(error)
        raise Refused(
            f"{self.url} cannot be read or written ({type(error).__name__}: {reason}); what is on this machine stays, "
            "and the same command continues it."
        ) from error
