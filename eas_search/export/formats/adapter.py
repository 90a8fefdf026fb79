"""`adapter`: what was trained and the skip configuration, in PEFT's shape, to be put onto the base model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eas_search.exceptions import ConfigError, StorageError
from eas_search.export.files import describe, read_content, read_json, write_json
from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.manifest import check_manifest
from eas_search.models.loading import load_model
from eas_search.models.options import LoadOptions
from eas_search.pia import Pia
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

Model = TypeVar("Model", bound=nn.Module)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterFormat(Format):
    """Small, and exact on the same base model."""

    name: ClassVar[str] = "adapter"
    summary: ClassVar[str] = "PIAs and light adapters alone, for the base model; small"
    usage: ClassVar[str] = (
        "import eas_search as eas\n\n"
        'student = eas.load_adapter(base_model, "path/to/this/folder")\nmodel = eas.merge(student)  # as fast as `eas`'
    )

    def plan(self, student: Any) -> Verdict:
        """See the class."""
        return Verdict("exact", "needs the base model; merge after loading for its speed")

    def write(self, job: Writing) -> dict[str, Any]:
        """PEFT's two files."""
        tensors = adapter_tensors(job.student)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, job.folder / ADAPTER_WEIGHTS
        )
        write_json(
            job.folder / ADAPTER_CONFIG,
            {
                "peft_type": "EAS",
                "base_model_name_or_path": job.base_name,
                "base_model_class": type(job.student).__name__,
                "inference_mode": True,
                "skip_config": describe(job.student, self.name)["skip_config"],
            },
        )
        return {}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """The student on its base model."""
        return load_adapter(base_model(folder, content, base), folder)


def adapter_tensors(student: nn.Module) -> dict[str, nn.Parameter]:
    """What was trained: PIAs, light adapters and whatever else may still be trained, such as a new head."""
    adapters = {id(p) for module in student.modules() if isinstance(module, Pia) for p in module.parameters()}
    return {name: p for name, p in student.named_parameters() if id(p) in adapters or p.requires_grad}


def load_adapter(model: Model, folder: str | Path) -> Model:
    """A student on `model`, in eval mode, with the adapters of an export in the format `adapter`.

    Args:
        model: the base model from which the search started; it is untouched.
        folder: of the export.

    Raises:
        ConfigError: the model is another one: another class, other sites or other sizes.
        StorageError: not such an export.
        VerificationError: a file is not what was exported.
    """
    folder = Path(folder)
    content = read_content(folder)
    if content["kind"] != AdapterFormat.name:
        raise StorageError(
            f"export {str(folder)!r} has format {content['kind']!r}; expected 'adapter': load it as its card says"
        )
    check_manifest(folder, frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS}))
    wanted = read_json(folder, ADAPTER_CONFIG).get("base_model_class")
    if type(model).__name__ != wanted:
        raise ConfigError(
            f"adapter {str(folder)!r} is for a {wanted}, got a {type(model).__name__}: load its base model"
        )
    student = apply_skips(model, SkipConfig(**content["skip_config"]))
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{ADAPTER_WEIGHTS} in {str(folder)!r} cannot be read ({error}); export again") from error
    _fill(student, tensors, folder)
    return student.requires_grad_(False).eval()


def _fill(student: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every adapter gets its values; nothing silently keeps those it started with."""
    parameters = dict(student.named_parameters())
    missing = sorted(set(adapter_tensors(student)) - set(tensors)) + sorted(set(tensors) - set(parameters))
    odd = missing or [name for name, tensor in tensors.items() if parameters[name].shape != tensor.shape]
    if odd:
        raise ConfigError(
            f"adapter {str(folder)!r} does not fit this {type(student).__name__}: {odd[0]!r} is on one side only or of "
            "another size; expected the base model from which the search started"
        )
    for name, tensor in tensors.items():
        own = parameters[name]
        # A frozen parameter is shared with the caller's model, so a trained head is replaced, never written into.
        owner, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(owner), leaf, nn.Parameter(tensor.to(own.device, own.dtype)))


def base_model(folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
    """The given base model, or the one that the export names.

    Raises:
        ConfigError: it names none, or it cannot be loaded.
    """
    if base is not None:
        return base
    facts = content.get("about", {})
    if not isinstance(facts.get("base_model"), str):
        raise ConfigError(f"export {str(folder)!r} names no base model; expected one: give it as `base`")
    options = LoadOptions(device="cpu", dtype=content["dtype"])
    return load_model(facts["base_model"], options, facts.get("head", "generation"), facts.get("labels"))[0]
