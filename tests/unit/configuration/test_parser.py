"""What a parser says in many lines, in one sentence."""

import pytest

from mtp_modules.configuration.parser import sentence

NESTED = """Parser key "model.loss":
  Problem with given class_path 'mtp_modules.MultiTokenLoss':
    Parser key "weights":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'mtp_modules.core.interfaces.HorizonWeights'>, <class 'NoneType'>]
      Errors:
        - Problem with given class_path 'mtp_modules.GeometricWeights':
            Option 'gama' is not accepted
        - Expected a <class 'NoneType'>
      Given value type: <class 'dict'>
      Given value: {'class_path': 'GeometricWeights', 'init_args': {'gama': 0.5}}"""

SENTENCES = {
    NESTED: "model.loss.weights: GeometricWeights has no argument 'gama'. Known: gamma, preserve_total.",
    "Subcommand 'fit' does not accept option 'model.tie'": "model has no argument 'tie'. "
    "Known: trunk, heads, loss, optimizer, lr_schedule, tie_embeddings, own_unembeddings, output_bias, freeze, "
    "lr_scales, activation_checkpointing, compile_blocks, sharding, teacher, num_draft_tokens, skip_non_finite, "
    "objectives.",
    "Subcommand 'fit' does not accept option 'mdl'": "unknown argument 'mdl'. Known: one, two.",
    "unrecognized arguments: --mdl.x 3 --other": "unknown argument 'mdl.x'. Known: one, two.",
    "Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: three": "a.b: must be of type int, got three.",
    'Parser key "config":\n  File does not exist: x': "config: File does not exist: x",
    "something\n  else": "something else",
}


@pytest.mark.parametrize(("message", "expected"), SENTENCES.items(), ids=[s[:20] for s in SENTENCES.values()])
def test_one_sentence(message: str, expected: str) -> None:
    assert sentence(message, ["one", "two"]) == expected
