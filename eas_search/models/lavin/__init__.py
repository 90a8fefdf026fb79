"""LaVIN on the parts of `transformers`; importing it makes the Auto classes know it."""

from eas_search.models.lavin.configuration import LavinConfig
from eas_search.models.lavin.generating import LavinForConditionalGeneration
from eas_search.models.lavin.modeling import LavinModel
from eas_search.models.lavin.processing import LavinProcessor

__all__ = ["LavinConfig", "LavinForConditionalGeneration", "LavinModel", "LavinProcessor"]
