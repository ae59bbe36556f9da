"""``python -m mtp_modules chat``: a conversation with a trained model."""

import sys
import time

from mtp_modules.commands.common import encode, load_on
from mtp_modules.commands.decoding import decoder_for, end_tokens, sampling_for, stop_for
from mtp_modules.commands.writing import TokenWriter, in_colour
from mtp_modules.core.checks import InputError, at_least
from mtp_modules.core.interfaces import Tokenizer
from mtp_modules.decoders import ContinuedExecutor, Decoder, DecodingStats, SamplingParams
from mtp_modules.decoders.beam.decoders import BeamSearchDecoder
from mtp_modules.model import MTPModel

_NEW, _END = "/new", "/end"


def chat(
    ckpt_path: str,
    max_new_tokens: int = 200,
    num_drafts: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    decoder: Decoder | None = None,
    sampling: SamplingParams | None = None,
    separator: str = "\n",
    device: str = "cpu",
) -> None:
    """Talk with a trained model: it continues the conversation so far, after every line that is typed.

    The context is all that was typed and generated, as one text; the keys and values of earlier turns are used again.
    After every turn stand its tokens, the accepted drafts among them, and tokens a second. /new begins a new
    conversation; /end, or an end of file, ends. Ctrl-C interrupts an answer.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        max_new_tokens: Largest number of tokens of an answer.
        num_drafts: Largest number of drafts per forward pass; as many as the heads can draft if null.
        temperature: Sampling temperature; 0 is greedy decoding, 1 samples from the model's distribution.
        top_k: Sample from the top_k most likely tokens.
        top_p: Sample from the smallest set of most likely tokens with at least this probability.
        seed: Seed of the samples of the first turn; every turn adds 1.
        stop: End an answer after any of these strings.
        decoder: Class of the decoder, as for generate.
        sampling: SamplingParams, as for generate.
        separator: Text between what was typed and the answer, and after it; without a tokenizer there is none.
        device: Device to run on, such as cpu or cuda.
    """
    at_least("chat", "max_new_tokens", max_new_tokens, 1)
    model, tokenizer = load_on(ckpt_path, device)
    chosen = decoder_for(model, decoder, num_drafts)
    options = {
        "max_new_tokens": max_new_tokens,
        "stop": stop_for(tokenizer, stop),
        "sampling": sampling_for(chosen, sampling, temperature, top_k, top_p),
    }
    conversation = _Conversation(model, tokenizer, chosen, options, "" if tokenizer is None else separator)
    print(f"{_NEW} begins a new conversation, {_END} ends.", file=sys.stderr)
    while True:
        try:
            typed = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if typed == _END:
            return
        if typed == _NEW:
            conversation.forget()
        elif typed:
            try:
                conversation.answer(typed, seed)
            except InputError as error:
                print(f"error: {error}")
            seed += 1


class _Conversation:
    """The tokens so far, and the states that hold them."""

    def __init__(
        self,
        model: MTPModel,
        tokenizer: Tokenizer | None,
        decoder: Decoder,
        options: dict[str, object],
        separator: str,
    ) -> None:
        self.model, self.tokenizer, self.decoder, self.options = model, tokenizer, decoder, options
        self.separator, self.end = separator, end_tokens(tokenizer)
        self.states = ContinuedExecutor(model)
        self.tokens: list[int] = []

    def forget(self) -> None:
        """Begin a new conversation."""
        self.tokens = []
        self.states.forget()

    def answer(self, typed: str, seed: int) -> None:
        """Write an answer as it is generated, and what it took.

        Raises:
            ValueError: If the line has no tokens, or there is no room for it.
        """
        before = self.separator if self.tokens else ""
        prompt = [*self.tokens, *encode(before + typed + self.separator, self.tokenizer)]
        limit = self.model.trunk.max_positions
        if limit is not None and len(prompt) > limit and self.tokens:
            print(f"The context of {limit} tokens is full; this is a new conversation.", file=sys.stderr)
            self.forget()
            prompt = encode(typed + self.separator, self.tokenizer)
        beams = isinstance(self.decoder, BeamSearchDecoder)
        used = self.model if beams else self.states
        written, stats, new = TokenWriter(self.tokenizer, in_colour(), prompt), DecodingStats(), list[int]()
        started = time.perf_counter()
        try:
            for done in self.decoder.stream(used, [prompt], seed=seed, **self.options):  # type: ignore[arg-type]
                stats.count(done)
                for token, depth in zip(done.tokens[0], done.depths[0], strict=True):
                    new.append(token)
                    if token not in self.end:
                        sys.stdout.write(written.write(token, depth=depth))
                sys.stdout.flush()
        except KeyboardInterrupt:
            self.states.forget()  # it may have come in the middle of a forward pass
        seconds = time.perf_counter() - started
        sys.stdout.write(written.flush() + "\n")
        self.tokens = [*prompt, *(new[:-1] if new[-1:] == self.end else new)]
        held = "" if beams else f", {self.states.num_reused} of {len(prompt)} context tokens were read before"
        print(
            f"[{stats.tokens} tokens, {sum(stats.accepted)} accepted drafts, "
            f"{stats.tokens / max(seconds, 1e-9):.0f} tokens/s{held}]"
        )
