"""Exports: a student in one of several formats, with a manifest and the recorded answers that it must give again."""

from eas_search.export.exporting import ExportJob, check_possible, export_student, get_format, plan_formats, usage
from eas_search.export.files import about, check_writable, read_content
from eas_search.export.formats import FORMATS, Format, Verdict, load_adapter
from eas_search.export.manifest import check_manifest, write_manifest
from eas_search.export.reference import write_reference
from eas_search.export.student import load_pretrained, save_pretrained
from eas_search.export.verification import ExportReport, load_export, verify

__all__ = [
    "FORMATS",
    "ExportJob",
    "ExportReport",
    "Format",
    "Verdict",
    "about",
    "check_manifest",
    "check_possible",
    "check_writable",
    "export_student",
    "get_format",
    "load_adapter",
    "load_export",
    "load_pretrained",
    "plan_formats",
    "read_content",
    "save_pretrained",
    "usage",
    "verify",
    "write_manifest",
    "write_reference",
]
