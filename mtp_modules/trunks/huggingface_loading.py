"""Build models of ``transformers``, from a configuration or from weights."""

import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mtp_modules.core.budget import named_values
from mtp_modules.core.checks import refuse
from mtp_modules.trunks.huggingface_parts import Loaded, check_uncapped, in_parts, without_cap

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_A_PLACE = (
    *(
        "_name_or_path",
        "_model_name_or_path",
        "quantization_config",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
    ),
    *("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder"),
)
"""Keys of a configuration that refer to its origin, or to other tasks."""
_FLOAT = "__float__"
"""Key under which ``transformers`` writes a number that JSON does not have, such as infinity."""


def load(
    owner: object,
    *,
    model: nn.Module | None,
    pretrained: str | None,
    config: Mapping[str, Any] | None,
    gguf_file: str | None,
    revision: str | None,
    dtype: str | None,
) -> Loaded:
    """Build a model; see :class:`~mtp_modules.trunks.HuggingFaceTrunk` for the arguments.

    Args:
        owner: Named in the error message.
        model: A model in memory, instead of all others.
        pretrained: A folder, or a name on the hub.
        config: Sizes, or changes.
        gguf_file: In the folder.
        revision: On the hub.
        dtype: Precision of the weights.

    Raises:
        ValueError: If a package, a file or a weight is missing, or the model is not supported.
    """
    if model is not None:
        given = {
            "pretrained": pretrained,
            "config": config,
            "gguf_file": gguf_file,
            "revision": revision,
            "dtype": dtype,
        }
        return _in_memory(owner, model, [name for name, value in given.items() if value is not None])
    if (pretrained is None) and not (config and "model_type" in config):
        refuse(owner, "needs a model, pretrained, or a config with a model_type such as llama; give one of them.")
    for name, value in (("gguf_file", gguf_file), ("revision", revision)):
        if value is not None and pretrained is None:
            refuse(owner, f"{name} is {value!r}, but pretrained is not given; name the folder or model.")
    if dtype is not None and dtype not in _DTYPES:
        refuse(owner, f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    transformers = _transformers(owner)
    origin = {"gguf_file": gguf_file} if gguf_file else {}
    origin |= {"revision": revision} if revision else {}
    made = _config(owner, transformers, pretrained, dict(config or {}), origin)
    kind = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(made), None)
    if kind is None:
        refuse(owner, f"transformers has no causal language model of type {made.model_type!r}; take one that is.")
    check_uncapped(owner, made)
    num_caches = _num_caches(kind, made)
    how: dict[str, Any] = {"dtype": _DTYPES[dtype] if dtype else torch.get_default_dtype()}
    if how["dtype"] == torch.float64:
        how["experts_implementation"] = "eager"  # torch's grouped products do not support float64
    if num_caches is not None:
        from mtp_modules.trunks.huggingface_cache import ATTENTION

        how["attn_implementation"] = ATTENTION
    if pretrained is None:
        whole = transformers.AutoModelForCausalLM.from_config(made, trust_remote_code=False, **how)
    else:
        whole = _with_weights(owner, transformers, pretrained, made, {**origin, **how})
    return _rebuildable(owner, in_parts(owner, whole.eval(), num_caches), transformers)


def _rebuildable(owner: object, loaded: Loaded, transformers: Any) -> Loaded:
    """Return the parts, if a saved trunk can be built again from the configuration of the part that reads tokens."""
    if type(loaded.config) not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = loaded.config.model_type
        refuse(owner, f"transformers has no causal language model of type {kind!r} alone; take a model of text only.")
    return loaded


def _in_memory(owner: object, whole: Any, also: list[str]) -> Loaded:
    """Take a model of ``transformers`` apart, in the mode and the precision that it has."""
    if also:
        refuse(owner, f"model is given, and {also[0]} too; give one of them.")
    transformers = _transformers(owner)
    if not isinstance(whole, transformers.PreTrainedModel):
        merge = (
            "merge its adapters first (merge_and_unload)" if hasattr(whole, "merge_and_unload") else "wrap it yourself"
        )
        refuse(
            owner,
            f"model must be a causal language model of transformers, got {type(whole).__name__}; {merge}, see the page "
            "about trunks.",
        )
    check_uncapped(owner, whole.config, in_memory=True)
    num_caches = _num_caches(type(whole), whole.config)
    if num_caches is not None:
        from mtp_modules.trunks.huggingface_cache import ATTENTION

        whole.set_attn_implementation(ATTENTION)
    trains = whole.training
    loaded = _rebuildable(owner, in_parts(owner, whole.eval(), num_caches), transformers)
    whole.train(trains)
    return loaded


def _transformers(owner: object) -> ModuleType:
    try:
        import transformers
    except ImportError:
        refuse(owner, "needs the package transformers; install mtp_modules with the extra hf: pip install -e '.[hf]'.")
    return transformers


def _config(
    owner: object, transformers: Any, pretrained: str | None, config: dict[str, Any], origin: dict[str, Any]
) -> Any:
    """Return the configuration, and reject unknown names."""
    if pretrained is None:
        model_type = config.pop("model_type")
        if model_type not in transformers.CONFIG_MAPPING:
            refuse(owner, f"config.model_type {model_type!r} is unknown to transformers {transformers.__version__}.")
        kind = transformers.CONFIG_MAPPING[model_type]
        config = {name: without_cap(kind, name, value) for name, value in _decoded(config).items()}
        try:
            return transformers.AutoConfig.for_model(model_type, **config)
        except (TypeError, ValueError, KeyError) as error:
            refuse(owner, f"config does not fit model_type {model_type!r} ({_first_line(error)}).")
    try:
        made = transformers.AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **origin)
    except (OSError, ValueError, KeyError) as error:
        refuse(owner, f"pretrained {pretrained!r} cannot be read ({_first_line(error)}).")
    for name, value in config.items():
        if not hasattr(made, name):
            refuse(owner, f"config.{name} is not in the configuration of {pretrained!r}; leave it out.")
        setattr(made, name, without_cap(type(made), name, value))
    return made


def _decoded(value: Any) -> Any:
    """Return plain values with the numbers that JSON does not have; ``transformers`` reads them from files only."""
    if isinstance(value, Mapping):
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        return {name: _decoded(item) for name, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list | tuple) else value


def _with_weights(owner: object, transformers: Any, pretrained: str, config: Any, how: dict[str, Any]) -> nn.Module:
    """Load weights, and reject incomplete ones."""
    if torch.get_default_device().type == "meta":
        refuse(owner, "pretrained weights cannot be loaded on the meta device; set init_on_meta to false.")
    if "gguf_file" not in how:
        how = {**how, "use_safetensors": True}
    try:
        model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
            pretrained, config=config, trust_remote_code=False, output_loading_info=True, **how
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        refuse(owner, f"the weights of {pretrained!r} cannot be read ({_first_line(error)}).")
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loading_info[what])):
            refuse(
                owner,
                f"the weights of {pretrained!r} do not fit its configuration: {what.partition('_')[0]} "
                f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}; get all of the files again.",
            )
    return model


def _num_caches(kind: Any, config: Any) -> int | None:
    """Return the number of layers with a KV cache, if all have one and support the common attention interface."""
    from mtp_modules.trunks.huggingface_cache import caches_of

    common = kind._supports_attention_backend and kind._supports_sdpa
    base = getattr(kind, "base_model_prefix", "")
    return caches_of(config) if common and base else None


def plain_config(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, without keys that refer to its origin.

    Args:
        config: Of a model of ``transformers``.
    """
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in whole.items() if name not in _OF_A_PLACE}


def causal_class(config: Any) -> str:
    """Return the name of the class of a whole model, with its output matrix.

    Args:
        config: Of a model of ``transformers``.
    """
    import transformers

    return str(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def check_plain_config(owner: str, config: Any) -> None:
    """Raise an error for a configuration from a file that names code, a file or a model.

    ``transformers`` downloads an attention implementation, or a backbone, that a configuration names.

    Args:
        owner: Named in the error message.
        config: Plain values.

    Raises:
        ValueError: If it has such a key or value.
    """
    for name, value in named_values(owner, config):
        names_code = name == "auto_map" or "implementation" in name or "backbone" in name
        if names_code and value not in (None, False):
            refuse(owner, f"a file gives config.{name}, which can name code; leave it out.")
        if isinstance(value, str) and ("/" in value or "\\" in value):
            refuse(owner, f"a file gives config.{name}={value!r:.100}, which can name a file or a model; leave it out.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
