"""``python -m mtp_modules report``: pages about a trained model."""

from mtp_modules.commands.common import encode, load_on, writable
from mtp_modules.core.checks import at_least, refuse
from mtp_modules.core.saving import write_text
from mtp_modules.decoders import AutoregressiveDecoder, Decoder, SamplingParams, SpeculativeDecoder, StopRule
from mtp_modules.reports.diagnosis import model_summary
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
    """Write a page about a trained model. With --generation: the continuation of a prompt, token by token.

    Each token has the colour of the depth at which it was drafted and accepted. Hovering over it shows its probability
    under the model and under the draft distribution, and the most likely tokens of both.

    Args:
        ckpt_path: A checkpoint file, the folder of a run, or a folder that save_pretrained wrote.
        generation: Write the page of a generation.
        output: File for the page.
        prompt: Text to continue; token ids separated by spaces if the model has no tokenizer.
        max_new_tokens: Largest number of tokens to generate.
        num_drafts: Largest number of drafts per forward pass; as many as the heads can draft if null.
        temperature: Sampling temperature; 0 is greedy decoding, 1 samples from the model's distribution.
        top_k: Sample from the top_k most likely tokens.
        top_p: Sample from the smallest set of most likely tokens with at least this probability.
        seed: Seed of the samples.
        stop: Stop after any of these strings.
        alternatives: Number of most likely tokens to show for each distribution.
        device: Device to run on, such as cpu or cuda.
    """
    if not generation:
        refuse("report", "no page was requested; give --generation.")
    at_least("report", "alternatives", alternatives, 1)
    writable("output", output)
    model, tokenizer = load_on(ckpt_path, device)
    if len(model.horizons) == 1 and num_drafts is not None:
        refuse("num_drafts", f"{type(model.heads).__name__} with one horizon cannot draft; omit num_drafts.")
    tokens = encode(prompt, tokenizer)
    end = [] if tokenizer is None or tokenizer.end_token is None else [tokenizer.end_token]
    rule = StopRule(tokens=end, strings=stop or (), tokenizer=tokenizer)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    decoder: Decoder = AutoregressiveDecoder(return_distributions=True)
    if len(model.horizons) > 1:
        decoder = SpeculativeDecoder(num_drafts=num_drafts, return_distributions=True)
    rounds = decoder.stream(model, [tokens], max_new_tokens=max_new_tokens, stop=rule, sampling=sampling, seed=seed)
    run = record(tokens, rounds, alternatives=alternatives)
    settings = "greedy"
    if temperature > 0:
        truncation = "" if top_k is None else f", top_k {top_k}"
        settings = f"temperature {temperature:g}{truncation}, top_p {top_p:g}, seed {seed}"
    page = generation_page(
        run,
        tokenizer,
        model=model_summary(model),
        settings=f"{ckpt_path}; {type(decoder).__name__}, {settings}",
        greedy=temperature == 0,
    )
    write_text(output, page)
    print(f"{run.stats.tokens} tokens, {run.stats.tokens_per_forward:.2f} per forward pass. Page: {output}")
