"""The same events to Weights & Biases. It is never the only record, and its failures never stop a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .config import RunConfig, WandbMode

LOGGED = ("options", "versions", "tasks", "base", "data", "budget_bytes", "base_bytes")


def resolve(mode: WandbMode) -> str:
    """`auto` is online where somebody is logged in, offline elsewhere."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return "offline" if os.environ["WANDB_MODE"] == "offline" else "off"
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    logged_in = os.environ.get("WANDB_API_KEY") or (
        netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    )
    return "online" if logged_in else "offline"


class Tracker:
    """A W&B run of one cell: config, scores as they come, then matrix, heatmap, metrics and costs."""

    def __init__(self, config: RunConfig, folder: Path, identity: dict[str, Any]):
        """folder: what W&B writes goes there. identity: what the cell's `cell.json` says."""
        self.run: Any = None
        mode = resolve(config.wandb)
        if mode == "off":
            return
        with self._never_fatal("start"):
            import wandb

            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project="cl-graft",
                name=config.cell,
                group=f"{config.short(config.scenario)}/{config.model}"[:128],
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                config=config.model_dump(mode="json")
                | {f"resolved_{k}" if k == "options" else k: identity[k] for k in LOGGED},
                settings=wandb.Settings(silent=True, console="off"),
            )
            for stepped in ("score/*", "general/*", "seconds/*", "pack_bytes", "tokens"):
                self.run.define_metric(stepped, step_metric="stage")

    def stage(self, record: dict[str, Any]) -> None:
        """Training curve, scores and costs of one stage; `stage` is the scores' x-axis."""
        if self.run is None:
            return
        with self._never_fatal("log a stage"):
            values: dict[str, Any] = {"stage": record["stage"]}
            for metric, row in record["scores"].items():
                for task, cell in row.items():
                    values[f"{metric}/{task}"] = cell["value"]
            for metric, cell in (record["general"] or {}).items():
                values[f"general/{metric}"] = cell["value"]
            values |= {f"seconds/{kind}": value for kind, value in record["seconds"].items()}
            values |= {k: record[k] for k in ("tokens", "peak_memory_mb", "pack_bytes")}
            for point in record["losses"]:
                self.run.log({f"train/{key}": value for key, value in point.items()})
            self.run.log(values)

    def finish(self, result: dict[str, Any]) -> None:
        """The matrix as a table and a heatmap image, the metrics and costs as the summary."""
        if self.run is None:
            return
        with self._never_fatal("finish"):
            import wandb

            from .report.figures import heatmaps

            rows = [[stage, *row] for stage, row in enumerate(result["matrix"])]
            self.run.log(
                {
                    "matrix": wandb.Table(columns=["stage", *result["tasks"]], data=rows),
                    "heatmap": wandb.Image(heatmaps([result])),
                }
            )
            summary = {f"metrics/{k}": v for k, v in result["metrics"].items() if v is not None}
            summary |= {f"total_seconds/{k}": v for k, v in result["seconds"].items()}
            summary |= {
                "pack_bytes_max": max(result["pack_bytes"]),
                "base_bytes": result["base_bytes"],
                "total_tokens": result["tokens"],
                "peak_memory_mb_max": result["peak_memory_mb"],
            }
            self.run.summary.update(summary)
            self.run.finish()

    def abandon(self) -> None:
        """Close the run after a failure."""
        if self.run is not None:
            with self._never_fatal("close"):
                self.run.finish(exit_code=1)

    def _never_fatal(self, what: str) -> _NeverFatal:
        return _NeverFatal(what)


class _NeverFatal:
    """Turns any failure of the tracker into one line on stderr."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        print(
            f"W&B could not {self.what} ({error}); results on disk are not affected.",
            file=sys.stderr,
        )
        return True
