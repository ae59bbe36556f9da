"""What compiled models refuse."""

from collections.abc import Callable

import pytest

from mtp_modules import MTPModel
from mtp_modules.decoders import BeamDecoder, compile_for_decoding
from mtp_modules.decoders.graphs.compiled import CompiledModel
from tests.helpers import make_model

Maker = Callable[..., CompiledModel]
MAKERS: list[tuple[Maker, str]] = [(compile_for_decoding, "compiled")]


def _model() -> MTPModel:
    return make_model("transformer", "linear", 3)


REFUSED: dict[str, tuple[Callable[[Maker], object], str]] = {
    "a recurrent trunk": (
        lambda make: make(make_model("gru", "linear", 3)),
        r"^RecurrentTrunk: has no read\(\.\.\.\), so it cannot be {done} for decoding; decode with the model itself",
    ),
    "no rows": (lambda make: make(_model(), batch_sizes=(0,)), r"^{maker}: batch_sizes must be at least 1, got 0"),
    "no tokens": (lambda make: make(_model(), prompt_sizes=(0,)), r"^{maker}: prompt_sizes must be at least 1, got 0"),
    "beams": (
        lambda make: BeamDecoder(num_beams=2).generate(make(_model()), [[1]], max_new_tokens=3),
        r"^BeamDecoder: has no {done} rounds; pass the model that {maker} was given",
    ),
}


@pytest.mark.parametrize(("make", "done"), MAKERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_no_graph_is_refused(name: str, make: Maker, done: str) -> None:
    refused, message = REFUSED[name]
    with pytest.raises(ValueError, match=message.format(maker=make.__name__, done=done)):
        refused(make)
