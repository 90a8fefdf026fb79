"""The most that skipping attentions can gain, before any search: measured on a few real-size blocks, or counted."""

from eas_search.break_even.report import break_even
from eas_search.break_even.values import BreakEven, BreakEvenSettings, Gain, GridPoint

__all__ = ["BreakEven", "BreakEvenSettings", "Gain", "GridPoint", "break_even"]
