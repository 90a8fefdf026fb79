"""`LatencyConfig`: how thoroughly latency is measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eas_search.exceptions import ConfigError
from eas_search.skip_config import one_line


class LatencyConfig(BaseModel):
    """How thoroughly to measure: about rounds × (warmup + blocks) × models × (prefill + decode) seconds.

    Attributes:
        rounds: groups of blocks; before each the weights move in memory. The estimate and the interval come
            from the middle half of them.
        blocks: samples of every model in a round.
        warmup: untimed samples of every model at the start of a round.
        decode_tokens: greedy steps in one decode sample; 0 measures the prefill only.
        min_sample_s: a sample repeats its phase until it lasts about this long, in seconds.
        threads: torch's intra-op threads during the run; None leaves torch's setting.
        confidence: of the intervals.
        process_sd: standard deviation of the log ratio between one occasion and the next (another process,
            other neighbours) that the rounds of one run do not show, see `statistics.repeat_interval`. None
            judges it from how much the rounds differ, as `studies/bench_latency_aa` found it.
        fresh_copies: time copies whose weights move before every round; None does when all models together
            hold less than 1 GiB. Models compiled with `torch.compile` need False.
        seed: of the order within the blocks; torch's random state is not touched.
        time_limit_s: blocks, then rounds are given up to stay below this many seconds, but three rounds of
            one block always run; None sets no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(default=12, ge=3)
    blocks: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)
    decode_tokens: int = Field(default=4, ge=0)
    min_sample_s: float = Field(default=0.002, gt=0)
    threads: int | None = Field(default=None, ge=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    process_sd: float | None = Field(default=None, ge=0)
    fresh_copies: bool | None = None
    seed: int = Field(default=0, ge=0)
    time_limit_s: float | None = Field(default=60.0, gt=0)

    def __init__(self, /, **values: object) -> None:
        """Validate; an unusable value raises `ConfigError` in one line."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(one_line(error, "latency configuration")) from error

    @classmethod
    def fast(cls, **changes: object) -> LatencyConfig:
        """For a search trial: the prefill only, 24 of each model (0.5 s if a prefill takes 10 ms)."""
        return cls(**{"rounds": 6, "blocks": 3, "warmup": 1, "decode_tokens": 0, "time_limit_s": 3.0, **changes})
