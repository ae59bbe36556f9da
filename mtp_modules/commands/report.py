"""``python -m mtp_modules report``: pages about a trained model."""

from pathlib import Path

from mtp_modules.commands.common import encode, load_on, writable
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders import AutoregressiveDecoder, Decoder, SamplingParams, SpeculativeDecoder, StopRule
from mtp_modules.reports.diagnosis import model_in_words
from mtp_modules.reports.generation_page import generation_page
from mtp_modules.reports.recording import record


def report(
    ckpt_path: str,
    generation: bool = False,
    output: str = "generation.html",
    prompt: str = "def ",
    max_new_tokens: int = 300,
    num_drafts: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
    alternatives: int = 5,
    device: str = "cpu",
) -> None:
    """Write a page about a trained model. With --generation: a prompt's continuation, token by token.

    Each token has the colour of the depth at which it was drafted and accepted; pointing at it shows its probability by
    the model and by the draft's law, and what else they held for likely.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        generation: Show a generation.
        output: The page to write.
        prompt: Text to continue; numbers separated by spaces if the model has no tokenizer.
        max_new_tokens: How many tokens to add at most.
        num_drafts: Most drafts a forward pass verifies; as many as the heads can draft if null.
        temperature: 0 takes the likeliest token; 1 draws from the model's own law.
        top_k: Draw among so many likeliest tokens.
        top_p: Draw among the fewest likeliest tokens that reach this probability.
        seed: Another seed is another sample.
        stop: End after any of these texts.
        alternatives: How many tokens of each law to show.
        device: Where to run, such as cpu or cuda.
    """
    if not generation:
        refuse("report", "nothing says what to write; give --generation.")
    at_least("report", "alternatives", alternatives, 1)
    writable("output", output)
    model, tokenizer = load_on(ckpt_path, device)
    if len(model.horizons) == 1 and num_drafts is not None:
        refuse("num_drafts", f"{type(model.heads).__name__} with one horizon drafts nothing; leave num_drafts out.")
    tokens = encode(prompt, tokenizer)
    end = [] if tokenizer is None or tokenizer.end_token is None else [tokenizer.end_token]
    rule = StopRule(tokens=end, strings=stop or (), tokenizer=tokenizer)
    law = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    decoder: Decoder = AutoregressiveDecoder(return_distributions=True)
    if len(model.horizons) > 1:
        decoder = SpeculativeDecoder(num_drafts=num_drafts, return_distributions=True)
    rounds = decoder.stream(model, [tokens], max_new_tokens=max_new_tokens, stop=rule, sampling=law, seed=seed)
    run = record(tokens, rounds, alternatives=alternatives)
    how = "greedy"
    if temperature > 0:
        cut = "" if top_k is None else f", top_k {top_k}"
        how = f"temperature {temperature:g}{cut}, top_p {top_p:g}, seed {seed}"
    page = generation_page(
        run,
        tokenizer,
        model=model_in_words(model),
        settings=f"{ckpt_path}; {type(decoder).__name__}, {how}",
        greedy=temperature == 0,
    )
    Path(output).write_text(page, encoding="utf-8")
    print(f"{run.stats.tokens} tokens, {run.stats.tokens_per_forward:.2f} per forward pass. Page: {output}")
