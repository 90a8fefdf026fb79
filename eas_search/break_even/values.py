"""What a break-even report is asked and what it says, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eas_search.exceptions import ConfigError
from eas_search.models.options import Dtype
from eas_search.skip_config import one_line

WORTHWHILE = 1.10  # below this even skipping every attention is not worth a search


class BreakEvenSettings(BaseModel):
    """Where and how thoroughly.

    Attributes:
        contexts: tokens per sample; None takes 64, 512, 2048 and 8192 as far as the model's positions go.
        batches: samples per batch.
        measure: `auto` measures on an accelerator, and on the CPU when the blocks to measure hold less than 1 GiB;
            `always` and `never` (formulas only) say so.
        device: `cpu`, `cuda`, `mps`, or `auto` for the first accelerator.
        dtype: precision of the model.
        decode_tokens: greedy steps in one decode sample.
        time_limit_s: seconds of measuring, after which points are left to the formulas; `always` has no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 8)
    measure: Literal["auto", "always", "never"] = "auto"
    device: str = "auto"
    dtype: Dtype = "float32"
    decode_tokens: int = Field(default=4, ge=1)
    time_limit_s: float = Field(default=45.0, gt=0)

    def __init__(self, **values: object) -> None:
        """Validate; an unusable value raises `ConfigError` in one line."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(one_line(error, "break-even")) from error
        for name, numbers in (("contexts", self.contexts), ("batches", self.batches)):
            if numbers is not None and (not numbers or min(numbers) < 1):
                raise ConfigError(f"break-even: {name} are {list(numbers)}; expected numbers from 1, e.g. 64,2048")


@dataclass(frozen=True)
class Gain:
    """One phase of one grid point.

    Attributes:
        share: a, the attentions' share of the time of the whole model: S(k) = 1 / (1 - a k/L).
        low, high: of a, where a repeated measurement falls with 95 % confidence; equal to `share` where it is counted.
        seconds: that the measured blocks took with their attentions (one pass, or one decode step); None where a is a
            share of FLOPs (prefill) or of bytes read (decode).
        spared: f, the share of the time that the blocks take beside their attentions for tokens other than the last.
            Behind the last attention nobody asks for these (see `asked`).
    """

    share: float
    low: float
    high: float
    seconds: float | None
    spared: float = 0.0

    @classmethod
    def counted(cls, share: float, spared: float = 0.0) -> Gain:
        """By formula."""
        return cls(share, share, share, None, spared)

    @property
    def measured(self) -> bool:
        """Whether it was measured, not counted."""
        return self.seconds is not None

    @property
    def undecided(self) -> bool:
        """Whether the interval of a does not tell if skipping every attention is worthwhile."""
        return 1 / (1 - self.low) < WORTHWHILE <= 1 / (1 - self.high)

    def speedup(self, fraction: float) -> float:
        """S when this fraction k/L of the attentions is skipped."""
        return 1 / (1 - self.share * fraction)

    def speedup_of_last(self, k: int, layers: int) -> float:
        """S when the last k of `layers` attentions are skipped: 1 / (1 - a k/L - f (k + 1)/L).

        The block in front of them is the first that need not hand on every token.
        """
        return 1 / (1 - self.share * k / layers - self.spared * min(k + 1, layers) / layers)


@dataclass(frozen=True)
class GridPoint:
    """One context and batch; `decode` is None for a model without a KV cache.

    `kv_bytes` is what the KV cache of one sample holds, all of which goes when every attention is skipped.
    """

    context: int
    batch: int
    prefill: Gain
    decode: Gain | None
    kv_bytes: int

    @property
    def gains(self) -> dict[str, Gain]:
        """By phase."""
        return {"prefill": self.prefill} | ({} if self.decode is None else {"decode": self.decode})

    def to_dict(self, layers: int) -> dict[str, Any]:
        """For JSON; speed-ups when a quarter, half and all of `layers` attentions are skipped, and of the last ones."""
        few = skipped(layers)[:2]
        phases = {
            phase: {
                **asdict(gain),
                "measured": gain.measured,
                "speedup": {str(k): gain.speedup(k / layers) for k in skipped(layers)},
                "speedup_of_last": {str(k): gain.speedup_of_last(k, layers) for k in few if gain.spared},
            }
            for phase, gain in self.gains.items()
        }
        saved = {str(k): round(self.kv_bytes * k / layers) for k in skipped(layers)}
        return {"context": self.context, "batch": self.batch, **phases, "kv_bytes_saved_per_sample": saved}


def skipped(layers: int) -> tuple[int, int, int]:
    """The numbers of skipped attentions that are reported: a quarter, half and all of L."""
    return max(1, round(layers / 4)), max(1, round(layers / 2)), layers


@dataclass(frozen=True)
class BreakEven:
    """The report.

    Attributes:
        model: its class.
        tower: whose attentions are meant.
        layers: L, their number.
        points: the grid, by context and batch.
        method: how the figures were found, for people.
        notes: what they leave out.
        conditions: device, precision, threads.
    """

    model: str
    tower: str
    layers: int
    points: tuple[GridPoint, ...]
    method: str
    notes: tuple[str, ...]
    conditions: dict[str, Any]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Where skipping cannot pay, and where it pays most, one sentence each."""
        sentences = []
        for phase in ("prefill", "decode"):
            gains = {(p.context, p.batch): p.gains[phase] for p in self.points if phase in p.gains}
            best = {place: gain.speedup(1) for place, gain in gains.items()}
            unclear = {place: gain for place, gain in gains.items() if gain.undecided}
            poor = {p: value for p, value in best.items() if value < WORTHWHILE and p not in unclear}
            half = skipped(self.layers)[1]
            at_end = {p: gain.speedup_of_last(half, self.layers) for p, gain in gains.items() if gain.spared}
            only_there = {p: value for p, value in poor.items() if at_end.get(p, 0.0) >= WORTHWHILE}
            if only_there:
                sentences.append(
                    f"Skipping pays in {phase} at context×batch {_places(only_there)} only at the end of the stack: "
                    f"elsewhere at most {max(only_there.values()):.2f}x, with every attention skipped."
                )
            if nowhere := {p: value for p, value in poor.items() if p not in only_there}:
                sentences.append(
                    f"Skipping cannot pay in {phase} at context×batch {_places(nowhere)}: at most "
                    f"{max(nowhere.values()):.2f}x, with every attention skipped."
                )
            if unclear:
                sentences.append(
                    f"Too noisy to say whether skipping pays in {phase} at context×batch {_places(unclear)}: raise "
                    "--time-limit or measure on a quieter machine."
                )
            if clear := {p: value for p, value in best.items() if p not in poor and p not in unclear}:
                place = max(clear, key=lambda p: clear[p])
                last = f" ({at_end[place]:.2f}x if it is the last half)" if place in at_end else ""
                sentences.append(
                    f"Most in {phase}: at context {place[0]}, batch {place[1]}, {gains[place].speedup(0.5):.2f}x with "
                    f"half of the attentions skipped{last}, {clear[place]:.2f}x with all."
                )
        return tuple(sentences)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "tower": self.tower,
            "layers": self.layers,
            "method": self.method,
            "notes": list(self.notes),
            "conditions": self.conditions,
            "verdicts": list(self.verdicts),
            "grid": [point.to_dict(self.layers) for point in self.points],
        }


def _places(points: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{context}×{batch}" for context, batch in points)
