"""What a round with some drafts costs and brings on this machine."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtp_modules.core.checks import at_least, refuse
from mtp_modules.decoders.autoregressive import AutoregressiveDecoder
from mtp_modules.decoders.drafting.policies import now
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.decoders.results import DecodingStats, Round
from mtp_modules.decoders.speculative import SpeculativeDecoder


@dataclass(frozen=True)
class DecodingSpeed:
    """Greedy decoding of some prompts, one at a time, with a number of drafts a round.

    Attributes:
        num_drafts: 0 is plain decoding.
        round_seconds: Median time of a round with all its drafts.
        speed_up: Over plain decoding of the same prompt, in tokens a second; median over the prompts.
        stats: Counts over all rounds but those that read a prompt; ``seconds`` is their time.
    """

    num_drafts: int
    round_seconds: float
    speed_up: float
    stats: DecodingStats


def measure_speeds(
    model: DecodableModel, prompts: Sequence[Sequence[int]], *, num_drafts: Sequence[int], new_tokens: int
) -> list[DecodingSpeed]:
    """Decode greedily with each of some numbers of drafts a round, all side by side.

    Every number of drafts takes a round in turn, so that whatever else happens on the machine falls on all alike.
    Reading the prompt, which all have in common, is left out.

    Args:
        model: Trunk, heads and unembedding.
        prompts: Token ids; the first is also decoded once before, to warm up.
        num_drafts: Numbers of drafts, first of all 0, plain decoding, which the others are compared with.
        new_tokens: How many tokens follow each prompt's first new one.

    Returns:
        One speed a number, in the order of ``num_drafts``.

    Raises:
        ValueError: If ``new_tokens`` is below 1, there is no prompt, ``num_drafts`` does not begin with 0, or the
            decoders refuse the prompts or a number of drafts.
    """
    at_least("measure_speeds", "new_tokens", new_tokens, 1)
    at_least("measure_speeds", "number of prompts", len(prompts), 1)
    if list(num_drafts[:1]) != [0]:
        refuse(
            "measure_speeds",
            f"num_drafts must begin with 0, plain decoding, for others are compared with it; got {list(num_drafts)}.",
        )
    decoders = [AutoregressiveDecoder(), *(SpeculativeDecoder(num_drafts=count) for count in num_drafts[1:])]
    total = [DecodingStats() for _ in decoders]
    full_rounds: list[list[float]] = [[] for _ in decoders]
    pace: list[list[float]] = [[] for _ in decoders]
    for turn, prompt in enumerate([prompts[0], *prompts]):
        runs = [decoder.stream(model, [prompt], max_new_tokens=new_tokens + 1) for decoder in decoders]
        timed = _in_turns(runs)
        if not all(timed):
            refuse(
                "measure_speeds",
                f"a prompt of {len(prompt)} tokens leaves the trunk, which reads max_positions="
                f"{model.trunk.max_positions}, no room to go on; shorten the prompts.",
            )
        if turn == 0:
            continue
        for index, (count, rounds) in enumerate(zip(num_drafts, timed, strict=True)):
            seconds = sum(duration for _, duration in rounds)
            pace[index].append(seconds / sum(len(done.tokens[0]) for done, _ in rounds))
            full = [duration for done, duration in rounds if done.drafted[0] == count]
            full_rounds[index] += full or [duration for _, duration in rounds]
            total[index].seconds += seconds
            for done, _ in rounds:
                total[index].count(done)
    return [
        DecodingSpeed(
            num_drafts=count,
            round_seconds=statistics.median(full_rounds[index]),
            speed_up=statistics.median(plain / own for plain, own in zip(pace[0], pace[index], strict=True)),
            stats=total[index],
        )
        for index, count in enumerate(num_drafts)
    ]


def _in_turns(runs: Sequence[Iterator[Round]]) -> list[list[tuple[Round, float]]]:
    """Let each run take a round in turn, and return the rounds after the first of each with their seconds."""
    for run in runs:
        next(run)
    found: list[list[tuple[Round, float]]] = [[] for _ in runs]
    going = list(range(len(runs)))
    while going:
        for index in list(going):
            started = now()
            done = next(runs[index], None)
            if done is None:
                going.remove(index)
            else:
                found[index].append((done, now() - started))
    return found
