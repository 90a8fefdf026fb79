"""The export formats by name; one file each."""

from eas_search.export.formats.adapter import AdapterFormat, load_adapter
from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.formats.decilm import DeciLmFormat
from eas_search.export.formats.eas import EasFormat
from eas_search.export.formats.lora import LoraFormat
from eas_search.export.formats.onnx import OnnxFormat
from eas_search.export.formats.stock import StockFormat
from eas_search.export.formats.torch_export import TorchExportFormat

FORMATS: dict[str, Format] = {
    kind.name: kind
    for kind in (
        EasFormat(),
        AdapterFormat(),
        LoraFormat(),
        StockFormat(),
        TorchExportFormat(),
        OnnxFormat(),
        DeciLmFormat(),
    )
}

__all__ = ["FORMATS", "Format", "Verdict", "Writing", "load_adapter"]
