"""The life cycle of a study: prepare, search, re-measure, hand over."""

from eas_search.study.frames import pareto_front, trials_frame
from eas_search.study.search import SearchResult, create_study, run_study

__all__ = ["SearchResult", "create_study", "pareto_front", "run_study", "trials_frame"]
