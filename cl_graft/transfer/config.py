"""What a build is: frozen, validated data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cl_graft.errors import CLGraftError


class BuildConfig(BaseModel):
    """Sources x prompts, how they are sampled, judged and selected.

    prompts: a file, SCENARIO/TASK, or a hub data set. task: SCENARIO/TASK or a rule; none: that of the prompts.
    options: {scenario: {option: value}}. limit: the first so many different prompts.
    max_new_tokens: none: the task's own, or else 512. chat: prompts are a user's turn; none: where a
    source has a chat template.
    logits: likeliest tokens of each source that are stored for every token of the SFT rows; 0: none are.
    min_gap, max_gap: in units of the reward model, for pairs that it ranked; both bounds are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    sources: tuple[str, ...] = Field(min_length=1)
    prompts: str
    out: Path
    task: str | None = None
    reward_model: str | None = None
    samples: int = Field(4, ge=1)
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1)
    min_gap: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_gap: float | None = Field(None, ge=0, allow_inf_nan=False)
    logits: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**31)
    limit: int | None = Field(None, ge=1)
    backend: Literal["hf", "vllm"] = "hf"
    chat: bool | None = None
    data_dir: Path | None = None
    options: dict[str, dict[str, Any]] = {}
    allow_code_execution: bool = False

    @field_validator("sources")
    @classmethod
    def _different(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(sources):
            if name in sources[:i]:
                raise CLGraftError(f"source {name!r} is named twice; name each source once.")
        return sources

    @model_validator(mode="after")
    def _possible(self) -> BuildConfig:
        if self.temperature == 0 and self.samples > 1:
            raise CLGraftError(
                "at temperature 0 all answers to a prompt are the same; give --samples 1 or a higher temperature."
            )
        asked = self.min_gap is not None or self.max_gap is not None
        if asked and self.reward_model is None:
            raise CLGraftError(
                "the gap between right and wrong by a rule is always 1; bounds on it (--min-gap, --max-gap) "
                "need a --reward-model."
            )
        low, high = self.gaps
        if low > high:
            raise CLGraftError(
                f"no gap is at least {low:g} and at most {high:g}; give a --min-gap below --max-gap."
            )
        return self

    @property
    def gaps(self) -> tuple[float, float]:
        """The least and the greatest gap of a pair that the reward model ranked."""
        return self.min_gap or 0.0, math.inf if self.max_gap is None else self.max_gap
