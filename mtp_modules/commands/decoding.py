"""From the options of a command to a decoder, sampling parameters and a stop rule."""

from collections.abc import Sequence

from mtp_modules.core.checks import refuse
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.decoders import AutoregressiveDecoder, Decoder, SamplingParams, SpeculativeDecoder, StopRule
from mtp_modules.model import MTPModel


def decoder_for(model: MTPModel, decoder: Decoder | None, num_drafts: int | None) -> Decoder:
    """Return the decoder that was asked for, or the usual one of a model.

    Args:
        model: Its heads draft, if it has more than one horizon.
        decoder: Asked for by its class; the usual one if ``None``.
        num_drafts: Most drafts a round of the usual one.

    Raises:
        ValueError: If both are given.
    """
    if decoder is not None:
        if num_drafts is not None:
            refuse("num_drafts", "belongs to the usual decoder; write --decoder.num_drafts instead.")
        return decoder
    return SpeculativeDecoder(num_drafts=num_drafts) if len(model.horizons) > 1 else AutoregressiveDecoder()


def sampling_for(
    decoder: Decoder, sampling: SamplingParams | None, temperature: float, top_k: int | None, top_p: float
) -> SamplingParams | None:
    """Return the sampling parameters that were asked for; ``None`` for those of the decoder.

    Args:
        decoder: Beam searches have parameters of their own.
        sampling: Asked for as a whole.
        temperature: The short option.
        top_k: The short option.
        top_p: The short option.

    Raises:
        ValueError: If sampling is given as a whole and by a short option.
    """
    usual = (temperature, top_k, top_p) == (0.0, None, 1.0)
    if sampling is not None:
        if not usual:
            refuse("sampling", "and temperature, top_k and top_p say the same; write --sampling.temperature instead.")
        return sampling
    if usual and decoder.default_sampling.temperature > 0:
        return None
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)


def stop_for(tokenizer: Tokenizer | None, strings: Sequence[str] | None) -> StopRule:
    """Return a rule that ends at the tokenizer's end token, and behind any of some strings.

    Args:
        tokenizer: Of the model.
        strings: None if ``None``.
    """
    return StopRule(tokens=end_tokens(tokenizer), strings=strings or (), tokenizer=tokenizer)


def end_tokens(tokenizer: Tokenizer | None) -> list[int]:
    """Return the token that ends a text, if there is one.

    Args:
        tokenizer: Of the model.
    """
    return [] if tokenizer is None or tokenizer.end_token is None else [tokenizer.end_token]
