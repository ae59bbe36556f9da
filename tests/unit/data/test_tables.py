"""Tables and data sets of the package ``datasets``, from files that are really there."""

import json
from pathlib import Path

import pytest

from mtp_modules.data import ByteTokenizer, DocumentSource, HuggingFaceDataset, TableFiles, TextDataModule
from mtp_modules.data.documents import skipped_sentence

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

TEXTS = ["once upon\na time", "é, twice", "", "three"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(source: DocumentSource) -> dict[str, object]:
    return {document.name: document.text for document in source.documents(ByteTokenizer())}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
def test_rows_of_tables_are_documents(tmp_path: Path, suffix: str) -> None:
    table = datasets.Dataset.from_dict({"id": [0, 1, 2, 3], "body": TEXTS})
    path = tmp_path / f"t.{suffix}"
    table.to_parquet(path) if suffix == "parquet" else table.to_csv(path, sep="\t" if suffix == "tsv" else ",")
    source = TableFiles(paths=[str(tmp_path)], field="body")
    assert read(source) == {f"t.{suffix}:{row}": TEXTS[row - 1] for row in (1, 2, 4)}
    assert skipped_sentence(source) == f"TableFiles: left out 1 empty (such as 't.{suffix}:3')."
    with pytest.raises(ValueError, match=rf"^TableFiles: 't.{suffix}:1' has no field 'text' \(it has 'id', 'body'\)"):
        read(TableFiles(paths=[str(path)]))


def test_what_a_table_says_is_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,body\n1,NA\n2,null\n3,007\n4,1e3\n5,\n", encoding="utf-8")
    assert list(read(TableFiles(paths=[str(tmp_path)], field="body")).values()) == ["NA", "null", "007", "1e3"]


def test_a_saved_data_set_with_other_rows_is_another(tmp_path: Path) -> None:
    for streaming in (False, True):
        found = []
        for text in ("one", "two"):
            datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / f"set-{streaming}")
            source = HuggingFaceDataset(dataset=str(tmp_path / f"set-{streaming}"), streaming=streaming)
            found.append(source.fingerprint(str))
        assert found[0] != found[1]


def test_messages_come_out_of_parquet(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    datasets.Dataset.from_dict({"messages": [talk]}).to_parquet(tmp_path / "t.parquet")
    (document,) = TableFiles(paths=[str(tmp_path / "t.parquet")], field="messages").documents(ByteTokenizer())
    assert document.messages == talk


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    for name, message in {"a.txt": r"is none of \.parquet, \.csv", "a.parquet": "cannot be read"}.items():
        (tmp_path / name).write_text("no table", encoding="utf-8")
        with pytest.raises(ValueError, match=f"^TableFiles: .*{message}"):
            read(TableFiles(paths=[str(tmp_path / name)]))


def test_a_data_set_from_disk_and_by_name(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "held": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert list(read(HuggingFaceDataset(dataset=str(tmp_path / "one"))).values()) == [*TEXTS[:2], TEXTS[3]]
    assert read(HuggingFaceDataset(dataset=str(tmp_path / "two"), split="held")) == {"two:1": TEXTS[1]}
    with pytest.raises(ValueError, match="split must be one of train, held, got 'test'"):
        read(HuggingFaceDataset(dataset=str(tmp_path / "two"), split="test"))
    (tmp_path / "named").mkdir()  # a folder of files is loaded as a name on the hub is
    (tmp_path / "named" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for streaming in (False, True):
        source = HuggingFaceDataset(dataset=str(tmp_path / "named"), streaming=streaming)
        assert list(read(source).values()) == [*TEXTS[:2], TEXTS[3]]
        assert source.num_documents() == (None if streaming else 4)
    with pytest.raises(ValueError, match=r"^HuggingFaceDataset: dataset '.*gone' cannot be read \("):
        read(HuggingFaceDataset(dataset=str(tmp_path / "gone")))


def test_a_data_set_is_cached_by_its_content(tmp_path: Path) -> None:
    def prepared(texts: list[str]) -> int:
        folder = tmp_path / "set"
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
        data = TextDataModule(
            train=[HuggingFaceDataset(dataset=str(folder))],
            window=4,
            lookahead=1,
            batch_size=1,
            cache=str(tmp_path / "k"),
        )
        data.prepare_data()
        return len(list((tmp_path / "k").glob("*/index.json")))

    assert prepared(TEXTS) == 1
    assert prepared([*TEXTS, "four"]) == 2
