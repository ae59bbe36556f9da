"""Take a model of ``transformers`` apart, and check that its parts compute what it computes."""

from typing import Any, NamedTuple

import torch
from torch import nn

from mtp_modules.core.checks import refuse
from mtp_modules.core.objective import OutputMatrix
from mtp_modules.core.shapes import Tensor

_SOFT_CAPS = (
    *("final_logit_softcapping", "logit_softcap", "logits_soft_cap"),
    *("output_logits_soft_cap", "output_logit_soft_cap"),
)
_NO_CAP = 2.0**100
"""Stands for no cap: some architectures need a number. A power of two, so that dividing by it is exact."""
_NO_LOGIT = 1e30
"""Caps from here on are none."""


class Loaded(NamedTuple):
    """A model in parts.

    Attributes:
        model: Without its output matrix, in evaluation mode.
        config: Its configuration.
        output: The output matrix and its bias; tied to the embedding or not.
        output_scale: Factor on the hidden state before the output matrix.
        num_caches: Number of layers with a KV cache; ``None`` if the model cannot decode with it.
    """

    model: nn.Module
    config: Any
    output: OutputMatrix
    output_scale: float
    num_caches: int | None


def without_cap(kind: type, name: str, value: Any) -> Any:
    """Return the value of a configuration; instead of ``None``, for a cap that must be a number, one that none reaches.

    Args:
        kind: Class of the configuration.
        name: Of the value.
        value: What is wanted.
    """
    if value is not None or name not in _SOFT_CAPS:
        return value
    try:
        kind(**{name: None})
    except Exception:  # the validation of transformers has errors of its own
        return _NO_CAP
    return None


def check_uncapped(owner: object, config: Any, *, in_memory: bool = False) -> None:
    """Raise an error for a model that caps its logits.

    Args:
        owner: Named in the error message.
        config: Of the model.
        in_memory: Whether the model is there already, so that its configuration is to be changed by the caller.

    Raises:
        ValueError: If it has a cap that a logit can reach.
    """
    for cap in _SOFT_CAPS:
        value = getattr(config.get_text_config(), cap, None)
        if value is not None and value < _NO_LOGIT:
            way = f"set model.config.{cap} = 1e30" if in_memory else f"load it with config={{{cap!r}: None}}"
            refuse(
                owner,
                f"{config.model_type} caps its logits ({cap} is {value}), which an output matrix cannot; choices by "
                f"likelihood are the same without, so {way} if that is enough.",
            )


def in_parts(owner: object, whole: Any, num_caches: int | None) -> Loaded:
    """Separate the output matrix from the rest, and check that together they compute the model's logits.

    Args:
        owner: Named in error messages.
        whole: A model of ``transformers``, in evaluation mode.
        num_caches: See :class:`Loaded`.

    Raises:
        ValueError: If the model has other parts, is not causal, or has a weight that is not finite.
    """
    name = type(whole).__name__
    try:  # of a model that reads images or sounds too, the part that reads tokens
        composed = whole.config.get_text_config() is not whole.config
        model = whole.get_decoder() if composed else whole.base_model
        model = whole.model if model is whole else model
        head, embedding = whole.get_output_embeddings(), model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        head = embedding = None
    if head is None and isinstance(embedding, nn.Embedding):
        refuse(owner, f"{name} has no output matrix; take the class that has one, such as AutoModelForCausalLM.")
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding) or model is whole:
        refuse(
            owner,
            f"{name} has no embedding, layers and output matrix apart, as the decoders of encoder-decoder models and "
            "models with several inputs; wrap it by RecomputedTrunk (the page about trunks), or take another model.",
        )
    _own_memory(model)
    output = OutputMatrix(head.weight, head.bias)
    if output.weight.is_meta:
        return Loaded(model, model.config, output, _scale_unseen(owner, model), num_caches)
    tokens = _usual_tokens(model.config, len(embedding.weight)).to(output.weight.device)
    try:
        with torch.no_grad():
            wanted: Tensor = whole(input_ids=tokens, use_cache=False).logits
            hidden: Tensor = model(input_ids=tokens, use_cache=False).last_hidden_state
            _check_finite(owner, whole, wanted)
            _check_causal(owner, whole, model, tokens, hidden)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, IndexError) as error:
        refuse(
            owner,
            f"{name} does not read tokens alone ({str(error).strip().partition(chr(10))[0]:.200}); wrap it by "
            "RecomputedTrunk (the page about trunks), or take another model.",
        )
    return Loaded(model, model.config, output, _scale(owner, name, model, hidden, wanted, output), num_caches)


def _usual_tokens(config: Any, vocab_size: int) -> Tensor:
    """Return a few tokens, ``(1, T)``: no padding and no ends of texts, from which some models make masks."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "pad_index", "decoder_start_token_id", "sep_token_id")
    special = {getattr(config, name, None) for name in names}
    usual = [token for token in range(vocab_size) if token not in special][:6]
    return torch.tensor([usual or [0]])


def _own_memory(model: nn.Module) -> None:
    """Give every weight that is a part of a larger tensor memory of its own: files hold whole tensors only."""
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


def _check_finite(owner: object, whole: Any, logits: Tensor) -> None:
    """Raise an error for logits that are not finite, and name the weight that is not."""
    if bool(logits.isfinite().all()):
        return
    named = (name for name, value in whole.named_parameters() if not bool(value.isfinite().all()))
    name, found = next(named, None), type(whole).__name__
    if name is None:
        refuse(owner, f"the logits of {found} are not finite, though its weights are; load it with another dtype.")
    refuse(owner, f"the weight {name} of {found} is not finite; get its files again, or train it again.")


def _check_causal(owner: object, whole: Any, model: nn.Module, tokens: Tensor, hidden: Tensor) -> None:
    """Raise an error for a model whose earlier positions depend on the last token."""
    other = tokens.clone()
    other[0, -1] = tokens[0, 0]
    changed = model(input_ids=other, use_cache=False).last_hidden_state
    earlier = (changed - hidden)[:, :-1].abs().max()
    rounding = 64 if hidden.dtype in (torch.float32, torch.float64) else 4
    if tokens.shape[1] > 1 and float(earlier) > rounding * torch.finfo(hidden.dtype).eps * float(hidden.abs().max()):
        switch = next((each for each in ("is_decoder", "causal") if getattr(whole.config, each, None) is False), None)
        way = "take a causal model"
        if switch:
            way = (
                f"if it was trained so, let from_pretrained load it with {switch}=True, or give its name and "
                f"config={{{switch!r}: True}}"
            )
        refuse(owner, f"{type(whole).__name__} is not causal: its states depend on later tokens; {way}.")


def _named_scales(config: Any) -> set[float]:
    """Return the factors on logits that a configuration names, and their inverses."""
    named = {1.0}
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), int | float) and value:
            named |= {float(value), 1.0 / float(value)}
    return named


def _scale_unseen(owner: object, whole: Any) -> float:
    """Return the factor on logits of a model without values, if it can be only one."""
    if len(_named_scales(whole.config)) > 1:
        refuse(
            owner,
            f"{whole.config.model_type} scales its logits and cannot be built on the meta device; "
            "set init_on_meta to false.",
        )
    return 1.0


@torch.no_grad()
def _scale(owner: object, name: str, model: nn.Module, hidden: Tensor, wanted: Tensor, output: OutputMatrix) -> float:
    """Return the factor on logits: one from the configuration that reproduces the model's logits."""
    coarse = max(torch.finfo(wanted.dtype).eps, torch.finfo(output.weight.dtype).eps)
    wanted = wanted.double()
    bias = 0.0 if output.bias is None else output.bias.double()
    if hidden.shape[-1] == output.weight.shape[1]:
        plain: Tensor = nn.functional.linear(hidden.double(), output.weight.double())
        tolerance = 64 * coarse * float(wanted.abs().max()) + 1e-12
        for factor in sorted(_named_scales(model.config), key=lambda value: value != 1.0):
            if float((plain * factor + bias - wanted).abs().max()) <= tolerance:
                return factor
    refuse(
        owner,
        f"the logits of {name} are not its output matrix times its last hidden state, by any factor in "
        "its configuration; wrap it by RecomputedTrunk (the page about trunks), or take another model.",
    )
