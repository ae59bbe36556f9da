"""Self-distillation data: what is sampled is what the model says, and what training reads is what was sampled."""

from pathlib import Path

import pytest
import yaml

from mtp_modules import AutoregressiveDecoder
from mtp_modules.commands.sample import sample
from mtp_modules.configuration import assemble
from mtp_modules.data import TextDataModule, WordTokenizer
from mtp_modules.data.token_files import read_documents, write_documents


def configuration(folder: Path) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"file{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 3, encoding="utf-8")
    sections = {
        "model": {
            "trunk": {"class_path": "RecurrentTrunk", "init_args": {"vocab_size": 256, "d_model": 8}},
            "heads": {"class_path": "LinearHeads", "init_args": {"num_horizons": 2}},
            "loss": {"class_path": "MultiTokenLoss"},
        },
        "data": {
            "class_path": "TextDataModule",
            "init_args": {
                "sources": [str(corpus)],
                "window": 8,
                "batch_size": 2,
                "val_share": 0.0,
                "test_share": 0.0,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_samples_are_the_model_s_and_training_reads_them(tmp_path: Path) -> None:
    path, output = configuration(tmp_path), tmp_path / "samples.bin"
    module, data = assemble(*(yaml.safe_load(path.read_text())[name] for name in ("model", "data")))
    module.model.save_pretrained(tmp_path / "model")
    sizes = {"count": 5, "prompt_tokens": 6, "new_tokens": 7, "batch_size": 2}
    sample(str(path), str(output), ckpt_path=str(tmp_path / "model"), temperature=0.0, **sizes)
    documents, vocab_size = read_documents(output)
    prompts = data.prompts("train", 5, 6, 0)
    said = AutoregressiveDecoder().generate(module.model.eval(), prompts, max_new_tokens=7).tokens
    assert vocab_size == 256
    assert len(documents) == 5
    for document, prompt, new in zip(documents, prompts, said, strict=True):
        assert document.tolist() == [*prompt, *(new[: new.index(0) + 1] if 0 in new else new)]

    read = TextDataModule(sources=[str(output)], window=4, lookahead=2, batch_size=1, val_share=0.0, test_share=0.0)
    stream = read.rows("train").stream
    assert sorted(stream.names) == [f"samples.bin/{index}" for index in range(5)]
    assert stream.tokens.tolist() == [token for document in documents for token in document.tolist()]
    assert stream.document_starts[1] == len(documents[0])


def test_documents_of_a_file_go_to_all_sides(tmp_path: Path) -> None:
    path = tmp_path / "samples.bin"
    write_documents(path, [[number, 3, 1, 2, 5, 6, 7] for number in range(40)], vocab_size=256)
    data = TextDataModule(
        sources=[str(path)],
        window=4,
        lookahead=2,
        batch_size=1,
        val_share=0.2,
        test_share=0.2,
    )
    first = [set(data.rows(side).stream.tokens[::7].tolist()) for side in ("train", "val", "test")]
    assert sum(map(len, first)) == 40
    assert set.union(*first) == set(range(40))


def test_what_is_refused(tmp_path: Path) -> None:
    path, words = tmp_path / "samples.bin", WordTokenizer(words=["a", "b"])
    write_documents(path, [[1, 2, 3]], vocab_size=256)
    sizes = {"window": 4, "lookahead": 2, "batch_size": 1, "val_share": 0.0, "test_share": 0.0}
    with pytest.raises(ValueError, match=r"holds tokens of a vocabulary of 256, WordTokenizer has 2; give"):
        TextDataModule(sources=[str(path)], tokenizer=words, **sizes).setup()
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"samples\.bin needs samples\.json beside it, both as the command"):
        TextDataModule(sources=[str(path)], **sizes).setup()
    with pytest.raises(ValueError, match=r"^output: must end in \.bin, got '.*text'\.$"):
        sample(str(configuration(tmp_path)), str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"^write_documents: there is no document to write; give at least one\.$"):
        write_documents(path, [], vocab_size=256)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """The last document would only have been shorter."""
    path = tmp_path / "tokens.bin"
    write_documents(path, [[1, 2, 3], [4, 5, 6]], vocab_size=256)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokens.bin", "tokens.json"]
    for content in (path.read_bytes()[:-2], path.read_bytes()[:-1], path.read_bytes() + b"12"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^TokenFiles: .*tokens\.bin has \d+ bytes, but its index says 12: "):
            read_documents(path)
