"""The model as it is, without a compiler."""

from mtp_modules.core.drafts import Draft
from mtp_modules.core.shapes import Float, Int, Tensor
from mtp_modules.core.targets import at_positions
from mtp_modules.decoders.graphs.executor import Executor, States
from mtp_modules.decoders.request import DecodableModel
from mtp_modules.decoders.round import RoundInputs, RoundOutputs, draft_and_verify


class EagerExecutor(Executor):
    """Runs a model operation by operation."""

    def __init__(self, model: DecodableModel) -> None:
        self.trunk, self.heads, self.unembedding = model.trunk, model.heads, model.unembedding

    def new_states(self, rows: int, capacity: int, *, longest: int, for_drafts: bool) -> States:
        """Make empty states for a run."""
        heads_state = self.heads.new_state(rows, capacity, for_drafts=for_drafts)
        return States(self.trunk.new_state(rows, capacity), heads_state)

    def hidden(self, chunk: Int[Tensor, "B C"], states: States) -> Float[Tensor, "B C D"]:
        """Append a chunk to the states, and return horizon 1's states."""
        output = self.trunk(chunk, state=states.trunk)
        given = self.heads.features_of(output)
        return self.heads.extend(output.hidden, states.heads, tokens=chunk, embed=self.trunk.embedding, **given)

    def read_prompt(self, chunk: Int[Tensor, "B C"], last: Int[Tensor, " B"], states: States) -> Float[Tensor, "B 1 V"]:
        """Append a chunk of the prompts to the states, and return horizon 1's logits at one place of each row."""
        return self.unembedding.logits(at_positions(self.hidden(chunk, states), last[:, None]))

    def read(self, chunk: Int[Tensor, "B C"], draft: Draft, states: States) -> Float[Tensor, "B C V"]:
        """Append a chunk to the states, and return horizon 1's logits."""
        states.expect(draft)
        return self.unembedding.logits(self.hidden(chunk, states))

    def round(self, inputs: RoundInputs, states: States) -> RoundOutputs:
        """Draft, read and verify."""
        return draft_and_verify(
            inputs,
            self.heads,
            states.heads,
            self.trunk.embedding,
            self.unembedding,
            lambda chunk, draft: self.read(chunk, draft, states),
        )


def as_executor(model: DecodableModel) -> Executor:
    """Return a compiled model itself, and an executor for any other."""
    return model if isinstance(model, Executor) else EagerExecutor(model)
