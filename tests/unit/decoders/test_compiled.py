"""Compiled rounds give what rounds give."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from mtp_modules import AutoregressiveDecoder, MTPModel
from mtp_modules.decoders import compile_for_decoding
from mtp_modules.decoders.graphs.inductor import inductor_options, options_for_noise
from tests.drafting import ScriptedHeads
from tests.helpers import make_model, random_tokens

SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "inductor", "frozen"))


@pytest.mark.parametrize("backend", ["quick", *SLOW])
@pytest.mark.timeout(3600)
def test_compiled_rounds_give_the_same_tokens_without_compiling_twice(backend: str) -> None:
    """In a process of its own, for the shapes that tests check are in the compiler's way."""
    command = [sys.executable, "-m", "tests.unit.decoders.compiled", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr[-4000:]


def _scripted() -> object:
    model = make_model("transformer", "linear", 3)
    model.heads = ScriptedHeads(heads=model.heads, script=lambda row, length, num_drafts: [0] * num_drafts)
    return compile_for_decoding(model)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "heads of somebody else": (_scripted, r"^ScriptedHeads: has no read\(\.\.\.\), so it cannot be compiled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("gcc", [True, False])
def test_only_gcc_is_given_its_own_flags(gcc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.is_gcc", lambda: gcc)
    rounding, products = "cpp.enable_floating_point_contract_flag", "max_autotune_gemm_backends"
    options = inductor_options(torch.device("cpu"), freeze=True)
    assert options[products] == "CPP"
    assert options.get(rounding, "").startswith("off -fno-tree") is gcc
    assert ("-fprefetch-loop-arrays --param prefetch-latency=1000" in options.get(rounding, "")) is gcc
    for device, freeze in (("cpu", False), ("cuda", False), ("cuda", True)):
        assert not {rounding, products} & inductor_options(torch.device(device), freeze=freeze).keys()
    assert options_for_noise(options).get(rounding, "").endswith(" -fwrapv") is gcc
    assert options_for_noise({}) == ({rounding: "off -fwrapv"} if gcc else {})


def _changed(model: MTPModel) -> None:
    with torch.no_grad():
        model.trunk.embedding.weight[0] += 1.0


CHANGES: dict[str, tuple[bool, Callable[[MTPModel], object], str]] = {
    "other numbers": (True, _changed, "trunk.embedding.weight has changed since"),
    "another dtype": (False, lambda model: model.float(), "trunk.embedding.weight has another shape, dtype or device"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_were_not_compiled_for_are_refused(name: str) -> None:
    freeze, change, message = CHANGES[name]
    model = make_model("transformer", "linear", 3).eval()
    fast = compile_for_decoding(model, freeze=freeze, backend="eager")
    change(model)
    with pytest.raises(ValueError, match=rf"^compile_for_decoding: {message}.*; call compile_for_decoding"):
        AutoregressiveDecoder().generate(fast, [[1, 2]], max_new_tokens=3)


def test_batches_that_are_larger_than_any_size_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("transformer", "linear", 3)
    fast = compile_for_decoding(model, batch_sizes=(1,))

    def fail(*_: object) -> None:
        raise AssertionError

    for name in ("_read", "_round"):
        monkeypatch.setattr(fast, name, fail)
    prompts = [[1, 2], [3]]
    wanted = AutoregressiveDecoder().generate(model, prompts, max_new_tokens=5)
    assert AutoregressiveDecoder().generate(fast, prompts, max_new_tokens=5).tokens == wanted.tokens
    with pytest.raises(AssertionError):
        AutoregressiveDecoder().generate(fast, prompts, max_new_tokens=[5, 7])


def test_parts_without_a_step_of_their_own_say_so() -> None:
    model = make_model("gru", "linear", 3)
    with pytest.raises(ValueError, match=r"^RecurrentTrunk: cannot be compiled for decoding: it has no read"):
        model.trunk.read(random_tokens(1, 2), model.trunk.new_state(1, 2))
