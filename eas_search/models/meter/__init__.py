"""METER, which `transformers` lacks; importing this package makes its Auto classes know it."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForVisualQuestionAnswering

from eas_search.models.meter.configuration import MeterConfig
from eas_search.models.meter.gates import gate_names
from eas_search.models.meter.heads import MeterForClassification, MeterForImageAndTextRetrieval
from eas_search.models.meter.model import MeterModel

__all__ = ["MeterConfig", "MeterForClassification", "MeterForImageAndTextRetrieval", "MeterModel", "gate_names"]

AutoConfig.register(MeterConfig.model_type, MeterConfig)
AutoModel.register(MeterConfig, MeterModel)
for _auto in (AutoModelForVisualQuestionAnswering, AutoModelForSequenceClassification):
    _auto.register(MeterConfig, MeterForClassification)
