"""``python -m mtp_modules chat``: a conversation with a trained model."""

import sys
import time

from mtp_modules.commands.common import load_on
from mtp_modules.commands.conversation import Conversation, conversation
from mtp_modules.commands.decoding import decoder_for, sampling_for
from mtp_modules.commands.writing import TokenWriter, in_colour
from mtp_modules.core.checks import InputError, at_least
from mtp_modules.decoders import ContinuedExecutor, Decoder, DecodingStats, SamplingParams, StopRule
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
    system: str | None = None,
    use_template: bool = True,
    separator: str = "\n",
    device: str = "cpu",
) -> None:
    """Talk with a trained model: it answers every line that is typed.

    The conversation is written by the tokenizer's chat template; without one it is one text, which the model continues.
    The keys and values of earlier turns are used again.
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
        system: What the system says at the beginning, through the chat template.
        use_template: Whether to use the tokenizer's chat template, if it has one.
        separator: Without a template, the text between what was typed and the answer, and after it.
        device: Device to run on, such as cpu or cuda.
    """
    at_least("chat", "max_new_tokens", max_new_tokens, 1)
    model, tokenizer = load_on(ckpt_path, device)
    chosen = decoder_for(model, decoder, num_drafts)
    talk = conversation(tokenizer, separator=separator, system=system, use_template=use_template)
    options = {
        "max_new_tokens": max_new_tokens,
        "stop": StopRule(tokens=talk.ends, strings=stop or (), tokenizer=tokenizer),
        "sampling": sampling_for(chosen, sampling, temperature, top_k, top_p),
    }
    assistant = _Assistant(model, talk, chosen, options)
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
            assistant.forget()
        elif typed:
            try:
                assistant.answer(typed, seed)
            except InputError as error:
                print(f"error: {error}")
            seed += 1


class _Assistant:
    """Answers lines, and holds the states of the conversation so far."""

    def __init__(self, model: MTPModel, talk: Conversation, decoder: Decoder, options: dict[str, object]) -> None:
        self.model, self.talk, self.decoder, self.options = model, talk, decoder, options
        self.states = ContinuedExecutor(model)

    def forget(self) -> None:
        """Begin a new conversation."""
        self.talk.forget()
        self.states.forget()

    def answer(self, typed: str, seed: int) -> None:
        """Write an answer as it is generated, and what it took.

        Raises:
            ValueError: If the line has no tokens, or there is no room for it.
        """
        prompt = self.talk.prompt(typed)
        limit = self.model.trunk.max_positions
        if limit is not None and len(prompt) > limit and self.talk.tokens:
            print(f"The context of {limit} tokens is full; this is a new conversation.", file=sys.stderr)
            self.forget()
            prompt = self.talk.prompt(typed)
        beams = isinstance(self.decoder, BeamSearchDecoder)
        used = self.model if beams else self.states
        written, stats, new = TokenWriter(self.talk.tokenizer, in_colour(), prompt), DecodingStats(), list[int]()
        started = time.perf_counter()
        try:
            for done in self.decoder.stream(used, [prompt], seed=seed, **self.options):  # type: ignore[arg-type]
                stats.count(done)
                for token, depth in zip(done.tokens[0], done.depths[0], strict=True):
                    new.append(token)
                    if token not in self.talk.ends:
                        sys.stdout.write(written.write(token, depth=depth))
                sys.stdout.flush()
        except KeyboardInterrupt:
            self.states.forget()  # it may have come in the middle of a forward pass
        seconds = time.perf_counter() - started
        sys.stdout.write(written.flush() + "\n")
        self.talk.answered(typed, prompt, new)
        held = "" if beams else f", {self.states.num_reused} of {len(prompt)} context tokens were read before"
        print(
            f"[{stats.tokens} tokens, {sum(stats.accepted)} accepted drafts, "
            f"{stats.tokens / max(seconds, 1e-9):.0f} tokens/s{held}]"
        )
