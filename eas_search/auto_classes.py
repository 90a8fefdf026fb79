"""Exports load through `transformers.AutoModelFor….from_pretrained(folder)` once this package is imported."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from eas_search.exceptions import ConfigError
from eas_search.import_hook import after_import

MODEL_TYPE = "eas_student"
_AUTO = "transformers.models.auto"


def register() -> None:
    """Make `transformers` know our model type, now or when it is imported; loads nothing itself."""
    after_import({f"{_AUTO}.configuration_auto": _register_config, f"{_AUTO}.modeling_auto": _register_models})


def _register_config() -> None:
    from transformers.configuration_utils import PreTrainedConfig

    config_class = type("EasConfig", (PreTrainedConfig,), {"model_type": MODEL_TYPE, "__module__": __name__})
    import_module(f"{_AUTO}.configuration_auto").AutoConfig.register(MODEL_TYPE, config_class, exist_ok=True)


def _register_models() -> None:
    config_class = import_module(f"{_AUTO}.configuration_auto").CONFIG_MAPPING[MODEL_TYPE]
    module = import_module(f"{_AUTO}.modeling_auto")
    for name in dir(module):
        auto = getattr(module, name)
        # Asking whether the mapping is empty would import every model of transformers.
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            auto.register(config_class, _loader(auto), exist_ok=True)


def _loader(auto: Any) -> type:
    """What `auto` takes for the model class of an export."""

    class StudentLoader:
        """Gives the student, whose class is that of its base model."""

        @classmethod
        def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **options: Any) -> Any:
            """The student in `folder`, as `eas_search.load_pretrained` gives it.

            Args:
                folder: of an export.
                args: none are known.
                config: as read by `AutoConfig`.
                options: `dtype`, `attn_implementation` and `device_map` (one device) are followed; what else changes a
                    model is refused.

            Raises:
                ConfigError: the export has another head, or an option that an export cannot follow.
            """
            # Found by name: this module is below the rest of the package.
            load_pretrained = import_module("eas_search.export").load_pretrained
            _check_head(auto, config, folder)
            device, dtype = _options(options, folder)
            student = load_pretrained(folder, device=device, dtype=dtype)
            if (attention := getattr(config, "_attn_implementation", None)) is not None:
                student.set_attn_implementation(attention)
            return student

    return StudentLoader


def _check_head(auto: Any, config: Any, folder: str | Path) -> None:
    """An export has the head that its base model had; another Auto class would have made a new one."""
    architecture = (config.architectures or [None])[0]
    base: str = config.base_config.get("model_type")
    names = auto._model_mapping._model_mapping.get(base, ())
    own = import_module("eas_search.models.own").own_class(base, architecture)
    known = own is not None and auto._model_mapping.get(own.config_class, None) is own
    if not known and architecture not in ((names,) if isinstance(names, str) else names):
        raise ConfigError(
            f"export {str(folder)!r} is a {architecture}, which {auto.__name__} does not load; expected the Auto class "
            "of that model: use it, or eas_search.load_pretrained"
        )


# Where `transformers` looks for files and how it says what it did; a student is one local folder.
_WITHOUT_EFFECT = frozenset(
    {"_from_auto", "adapter_kwargs", "trust_remote_code", "low_cpu_mem_usage", "local_files_only", "use_safetensors"}
    | {"revision", "cache_dir", "token", "force_download", "weights_only", "_commit_hash", "code_revision"}
)


def _options(options: dict[str, Any], folder: str | Path) -> tuple[str, Any]:
    """(device, dtype or None)."""
    left = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT and value is not None}
    dtype, device = left.pop("dtype", left.pop("torch_dtype", None)), left.pop("device_map", "cpu")
    dtype = _dtype(dtype, folder)
    if isinstance(device, dict) and set(device) == {""}:
        device = device[""]
    device = "auto" if device in ("auto", "balanced") else device
    if left or isinstance(device, dict):
        name = next(iter(left), "device_map")
        raise ConfigError(
            f"{name} = {left.get(name, device)!r} cannot be followed for export {str(folder)!r}; expected dtype and "
            "a device_map of one device: load without it"
        )
    return str(device), dtype


def _dtype(wanted: Any, folder: str | Path) -> Any:
    """The torch.dtype that is asked for; None: the saved one."""
    if wanted is None or wanted == "auto":
        return None
    torch = import_module("torch")
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"dtype = {wanted!r} cannot be followed for export {str(folder)!r}; expected 'auto' or a floating point "
            "type: load with 'bfloat16', for example"
        )
    return dtype
