"""The text data module: its batches, its prompts, and its refusals."""

from pathlib import Path

import pytest
import torch

from mtp_modules.data import TextDataModule
from mtp_modules.data.corpus import split_of


def module(corpus: Path, **kwargs: object) -> TextDataModule:
    return TextDataModule(
        **{"sources": [str(corpus)], "window": 16, "lookahead": 4, "batch_size": 4, "val_share": 0.2, "test_share": 0.2}
        | kwargs
    )


def test_batches_hold_window_and_lookahead(corpus: Path) -> None:
    data = module(corpus)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert batches[0]["tokens"].shape == (4, 20)
        assert batches[0]["tokens"].dtype == torch.int64
        for batch in batches:
            crossing = (batch["tokens"][:, :-1] == data.tokenizer.end_token).any().item()
            assert ("document_ids" in batch) == crossing
    assert data.vocab_size == 256


def test_sides_share_no_text(corpus: Path) -> None:
    data = module(corpus)
    names = [set(data.rows(split).stream.names) for split in ("train", "val", "test")]
    assert len(set.union(*names)) == sum(len(side) for side in names) == 61
    assert all(split_of(name, val_share=0.2, test_share=0.2) == "val" for name in names[1])


def test_evaluation_can_be_limited(corpus: Path) -> None:
    data = module(corpus, max_eval_windows=3)
    assert sum(len(batch["tokens"]) for batch in data.val_dataloader()) == 3
    assert sum(len(batch["tokens"]) for batch in module(corpus).val_dataloader()) > 3


def test_a_side_can_be_left_out(corpus: Path) -> None:
    data = module(corpus, val_share=0.0)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="the val split is empty because val_share is 0"):
        data.prompts("val", 1, 4, 0)


def test_prompts_start_lines_of_distinct_files(corpus: Path) -> None:
    data = module(corpus)
    stream = data.rows("test").stream
    count = len(stream.names)
    prompts = [data.tokenizer.decode(prompt) for prompt in data.prompts("test", count, 12, 0)]
    assert all(prompt.startswith("line ") and len(prompt) == 12 for prompt in prompts)
    numbers = [prompt.split("\n")[0].split(" of ")[1] for prompt in prompts]
    assert len(set(numbers)) == count
    assert data.prompts("test", 3, 12, 0) == data.prompts("test", 3, 12, 0) != data.prompts("test", 3, 12, 1)


def test_prompts_take_any_place_when_lines_run_out(corpus: Path) -> None:
    data = module(corpus)
    stream = data.rows("val").stream
    places = sum(max(0, length - 1 - 20 + 1) for length in _lengths(data))
    prompts = data.prompts("val", places, 20, 0)
    assert len(prompts) == places > len(stream.names)
    assert not any(data.tokenizer.end_token in prompt for prompt in prompts)
    with pytest.raises(ValueError, match=rf"room for {places} prompts of 20 tokens, {places + 1} were asked for"):
        data.prompts("val", places + 1, 20, 0)


def _lengths(data: TextDataModule) -> list[int]:
    stream = data.rows("val").stream
    ends = [*stream.document_starts[1:].tolist(), len(stream.tokens)]
    return [end - start for start, end in zip(stream.document_starts.tolist(), ends, strict=True)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 0}, "TextDataModule: window must be at least 1, got 0"),
        ({"window": 8, "lookahead": 8}, "TextDataModule: the largest horizon must be below the window"),
        ({"batch_size": 0}, "TextDataModule: batch_size must be at least 1, got 0"),
        ({"val_share": 0.6, "test_share": 0.4}, r"TextDataModule: val_share \+ test_share must be below 1"),
        ({"val_share": -0.1}, r"TextDataModule: val_share must lie in \[0, 1\], got -0.1"),
        ({"max_eval_windows": 0}, "TextDataModule: max_eval_windows must be at least 1, got 0"),
        ({"num_workers": -1}, "TextDataModule: num_workers must be at least 0, got -1"),
    ],
)
def test_senseless_arguments_are_refused_at_once(corpus: Path, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(corpus, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sources": ["no/such/file"]}, "source 'no/such/file' does not exist"),
        ({"window": 4000}, r"the text of the train split has \d+ tokens, a row needs window \+ lookahead = 4000 \+ 4"),
        ({"val_share": 1e-9}, "the val split got none of the 61 documents; add documents, raise val_share"),
    ],
)
def test_senseless_data_are_refused_in_setup(corpus: Path, kwargs: dict[str, object], message: str) -> None:
    data = module(corpus, **kwargs)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    data = module(tmp_path, val_share=0.0, test_share=0.0)
    with pytest.raises(ValueError, match="the text of the train split has 0 tokens"):
        data.setup()


def test_an_unknown_split_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="there is no split 'dev'; the splits are train, val, test"):
        module(corpus).rows("dev")
