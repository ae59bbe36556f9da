"""Bugs of rounds that are recorded and replayed: what a CUDA graph, or a tape of kernels, does not do anew."""

from tests.mutation.mutant import OURS, Mutant

TAPE = "unit/decoders/test_tape.py::test_a_recording_computes_what_the_function_computes"
HOST = "unit/decoders/test_tape.py::test_numbers_on_the_host_are_refused"
UNIT = "unit/decoders/test_recorded.py::"
SAME = UNIT + "test_recorded_rounds_give_the_same_tokens_without_recording_twice[transformer_previous-recurrent]"

MUTANTS = (
    Mutant(
        "replayed-result-not-copied",
        "decoders/replays.py",
        "return recording.result.clone()",
        "return recording.result",
        "what a round has told changes when the next round runs",
        "TensorRT-LLM#14326",
        (UNIT + "test_what_a_round_returns_is_not_written_over",),
    ),
    Mutant(
        "recordings-shared-by-runs",
        "decoders/recorded.py",
        "used = self._free.pop() if self._free else _Set(self.unembedding.weight.device)",
        'used = self._shared = getattr(self, "_shared", None) or _Set(self.unembedding.weight.device)',
        "two runs at once write over each other's keys and values",
        OURS,
        (UNIT + "test_several_runs_at_once_do_not_disturb_each_other",),
    ),
    Mutant(
        "states-of-a-failed-run-used-again",
        "decoders/recorded.py",
        "    if not used.failed:\n        free.append(used)",
        "    free.append(used)",
        "keys that are not numbers stay behind the mask, and spoil the next run",
        OURS,
        (UNIT + "test_states_of_a_run_that_failed_are_not_used_again",),
    ),
    Mutant(
        "recorded-from-what-the-first-call-left",
        "decoders/replays.py",
        "for found in (*moved.states, *moved.others)]",
        "for found in moved.states]",
        "a graph is captured behind a first call, and finds random numbers that were made there",
        OURS,
        (UNIT + "test_a_gpu_would_start_from_the_same_twice",),
    ),
    Mutant(
        "states-left-as-they-were",
        "decoders/replays.py",
        "            setattr(moving.states[index], name, self._apart(value))",
        "            setattr(moving.states[index], name, getattr(moving.states[index], name))",
        "hidden states of a replayed round are not committed",
        "pytorch#114844",
        (SAME,),
    ),
    Mutant(
        "recording-of-another-size",
        "decoders/replays.py",
        "kind = (tensor.shape, tensor.dtype)",
        "kind = (tensor.dim(), tensor.dtype)",
        "a round of another size is replayed",
        "aprender#2030",
        (SAME,),
    ),
    Mutant(
        "inputs-stay-where-they-are",
        "decoders/replays.py",
        "            kept.copy_(tensor)",
        "            kept.copy_(kept)",
        "a replay reads what the recorded round read",
        OURS,
        (SAME,),
    ),
    Mutant(
        "constants-never-made-again",
        "decoders/tape.py",
        "self.constants.pop(memory).constant = False",
        "self.constants.pop(memory)",
        "a constant that is written to keeps what the last replay wrote",
        OURS,
        (TAPE,),
    ),
    Mutant(
        "numbers-of-the-host-recorded",
        "decoders/tape.py",
        "    return name in _OF_THE_HOST or torch.Tag.dynamic_output_shape in func.tags",
        "    return torch.Tag.dynamic_output_shape in func.tags",
        "a recording keeps what the host decided when it was made",
        "TensorRT-LLM#17110",
        (HOST,),
    ),
    Mutant(
        "buckets-without-a-mask",
        "layers/cache.py",
        "return self._same_sizes or min(self.lengths)",
        "return min(self.lengths)",
        "slots beyond a row's length are attended to",
        OURS,
        (SAME,),
    ),
)
