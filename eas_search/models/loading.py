"""Loading a pretrained model and its processor: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eas_search.exceptions import ConfigError, EasSearchError, UnsupportedModelError
from eas_search.models.demo import DEMO, demo_path
from eas_search.models.heads import AUTO_CLASSES, CLASSIFIERS, HEAD_SEED, new_head, set_labels
from eas_search.models.options import Head, LoadOptions
from eas_search.models.own import own_class, register_for
from eas_search.models.placement import placement_arguments, resolve_device, settle

__all__ = [
    "architecture_class",
    "empty_model",
    "load_config",
    "load_model",
    "load_processor",
    "model_location",
    "resolve_device",
]


# Classes by which a checkpoint with code of its own may say how it generates.
GENERATORS = ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")


def model_location(name: str) -> str:
    """Where `from_pretrained` finds the model called `name`.

    Raises:
        ConfigError: `name` looks like a path but is no model folder.
    """
    if name == DEMO:
        return str(demo_path())
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model folder {name!r} has no config.json; expected a Hugging Face model folder")
        return name
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_local:
        raise ConfigError(
            f"model {name!r} is not a folder; expected '{DEMO}', a hub id like 'owner/name' or an existing model folder"
        )
    return name


def load_model(
    name: str,
    options: LoadOptions | None = None,
    head: Head = "generation",
    labels: Sequence[str] | None = None,
) -> tuple[nn.Module, Any]:
    """(model in eval mode, processor) of `name`.

    A classification head that the checkpoint lacks, or has for other labels, is new: it is drawn with a fixed seed, and
    the names of its parameters are at `model.eas_trainable`, because such a head must be trained.

    Args:
        name: `demo`, a hub id, or a folder in the Hugging Face layout.
        options: device, precision, …; None for the defaults.
        head: what the model ends in.
        labels: names of the classes in the order of the logits; None keeps those of the checkpoint.

    Raises:
        ConfigError: the model or its processor cannot be found or read.
        UnsupportedModelError: its class is not part of `transformers`, has no such head, or the checkpoint lacks
            weights other than those of a classification head.
    """
    import transformers

    options = options or LoadOptions()
    location = model_location(name)
    if (Path(location) / "eas_config.json").is_file():
        raise ConfigError(f"model {name!r} is an export of eas_search; expected an original model: name its base model")
    transformers.utils.logging.disable_progress_bar()  # the search has its own display
    config = load_config(location, name, options.trust_remote_code)
    cls = head_class(config, name, head, options.trust_remote_code)
    other_labels = set_labels(config, labels)
    placement = placement_arguments(
        options, trained_parts(cls, config, options) if options.quantization and head in CLASSIFIERS else None
    )
    try:
        with torch.random.fork_rng(), report_left_to_us():
            torch.manual_seed(HEAD_SEED)
            model, report = cls.from_pretrained(
                location,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=head in CLASSIFIERS,
                trust_remote_code=options.trust_remote_code,
                **placement,
            )
        processor = load_processor(location, options.trust_remote_code)
    except Exception as error:  # libraries raise many kinds for damaged files
        raise _unusable(name, error) from error
    missing = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    # A new head, and what a model of ours trains beside its adapters in any case.
    always = getattr(model, "trained_with_adapters", ())
    model.eas_trainable = tuple(dict.fromkeys((*new_head(model, name, head, missing, other_labels), *always)))
    model.config.architectures = [type(model).__name__]  # an export is rebuilt from it
    return settle(model, name, options), processor


def empty_model(name: str, trust_remote_code: bool = False, head: Head = "generation") -> nn.Module:
    """The model called `name` without its weights, on the meta device.

    Raises:
        ConfigError: its configuration cannot be found or read.
        UnsupportedModelError: its class is not part of `transformers`.
    """
    config = load_config(model_location(name), name, trust_remote_code)
    cls = head_class(config, name, head, trust_remote_code)
    with torch.device("meta"):
        if hasattr(cls, "_from_config"):
            return cls._from_config(config)
        return cls.from_config(config, trust_remote_code=trust_remote_code)


def load_config(location: str, name: str, trust_remote_code: bool = False) -> Any:
    """The configuration of the model called `name`.

    Raises:
        ConfigError: it cannot be found or read.
        UnsupportedModelError: it needs code that comes with it.
    """
    import transformers

    try:
        register_for(location)
        return transformers.AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except Exception as error:  # a value of the wrong type raises what the class of the model happens to raise
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> EasSearchError:
    if "trust_remote_code" in str(error):
        return _needs_code(name)
    reason = " ".join(str(error).split())[:200]
    if "ignore_mismatched_sizes" in reason:  # the library's message only names this option of its own
        reason = "its weights have other shapes than its config.json says"
    elif not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__} {reason}"
    return ConfigError(
        f"model {name!r} cannot be loaded: {reason}; expected '{DEMO}', a hub id or a complete model folder"
    )


def _needs_code(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model {name!r} needs code that comes with it, which is not run unasked; expected a model class of "
        "transformers: read that code, then add --trust-remote-code, or choose another model"
    )


def architecture_class(config: Any, name: str) -> Any:
    """The `transformers` class that a configuration names as its architecture.

    Raises:
        UnsupportedModelError: it names none, or something that is no model.
    """
    import transformers

    architectures = getattr(config, "architectures", None) or [None]
    cls = own_class(config.model_type, architectures[0]) or getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        if getattr(config, "auto_map", None):
            raise _needs_code(name)
        raise UnsupportedModelError(
            f"model {name!r} names architecture {architectures[0]!r}; expected a model class of transformers "
            f"{transformers.__version__}: set 'architectures' in its config.json"
        )
    return cls


def head_class(config: Any, name: str, head: Head, trust_remote_code: bool = False) -> Any:
    """The class of `transformers` that loads this configuration with this head.

    Raises:
        UnsupportedModelError: the kind of model has no such head.
    """
    import transformers

    brought = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if head == "generation":
        auto = next((auto for auto in GENERATORS if auto in brought), None)
        return architecture_class(config, name) if auto is None else getattr(transformers, auto)
    if head == "image-text-retrieval":
        return retrieval_class(config, name)
    auto = getattr(transformers, AUTO_CLASSES[head])
    if type(config) not in auto._model_mapping and auto.__name__ not in brought:
        raise UnsupportedModelError(
            f"model {name!r} is of type {config.model_type!r}, for which transformers {transformers.__version__} has "
            f"no {auto.__name__}; expected a model that the task can use: choose another model or task"
        )
    known = auto._model_mapping.get(type(config), None)
    if head == "visual-question-answering" and known is not None and known.can_generate():
        raise UnsupportedModelError(
            f"model {name!r} is of type {config.model_type!r}, which writes its answers; expected one that chooses "
            "among known answers, such as METER or ViLT: choose another model, or the task 'vqa'"
        )
    return auto


def retrieval_class(config: Any, name: str) -> Any:
    """The class that scores pairs of texts and images, given one image and several texts per row.

    Raises:
        UnsupportedModelError: this package has none for the kind of model.
    """
    cls = own_class(config.model_type, f"{type(config).__name__.removesuffix('Config')}ForImageAndTextRetrieval")
    if cls is None:
        raise UnsupportedModelError(
            f"model {name!r} is of type {config.model_type!r}, which cannot be trained to rank texts and images here; "
            "expected METER: convert its checkpoint with eas_search.models.meter.convert"
        )
    return cls


def trained_parts(cls: Any, config: Any, options: LoadOptions) -> list[str]:
    """Names of the modules of a model that may be trained, and so must not be quantised: what is not its body."""
    with torch.device("meta"):
        if hasattr(cls, "_from_config"):
            empty = cls._from_config(config)
        else:
            empty = cls.from_config(config, trust_remote_code=options.trust_remote_code)
    return [name for name, _ in empty.named_children() if name != empty.base_model_prefix] + ["pooler"]


@contextmanager
def report_left_to_us() -> Iterator[None]:
    """Without the table that `transformers` logs about missing weights: what is wrong with them is said here."""
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)


def load_processor(location: str, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub id."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return transformers.AutoProcessor.from_pretrained(location, trust_remote_code=trust_remote_code)
