"""Every configuration on the page about text gives batches, from real files of the kind it names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_modules.configuration import assemble_data
from mtp_modules.core.component import describe
from mtp_modules.data import __all__ as names
from tests.command_line import ROOT
from tests.small_tokenizers import chat_tokenizer
from tests.unit.data.test_chat import TALK
from tests.unit.data.test_streamed import write_chunks

datasets = pytest.importorskip("datasets")
PAGE = (ROOT / "docs/your_text.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block)["data"] for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files that the page names, and work among them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("my_texts", "more", "my_tokenizer"):
        Path(folder).mkdir()
    for number in range(80):
        Path(f"my_texts/{number}.txt").write_text(f"text {number}, " * 9, encoding="utf-8")
        Path(f"more/{number}.md").write_text(f"page {number}, " * 9, encoding="utf-8")
    Path("input.txt").write_text("one text\n" * 99, encoding="utf-8")
    rows = [{"body": f"record {number}, " * 9} for number in range(80)]
    Path("records.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    datasets.Dataset.from_list(rows).to_csv("table.csv")
    datasets.Dataset.from_list(rows).save_to_disk("my_data_set")
    talks = [[*TALK[:2], {"role": "assistant", "content": f"Hi {number}"}] for number in range(80)]
    Path("talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks), encoding="utf-8")
    used = describe(chat_tokenizer())["init_args"]
    Path("my_tokenizer/tokenizer.json").write_text(used["tokenizer_json"], encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings["chat_template"] = used["chat_template"]
    Path("my_tokenizer/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=["paths", "splits", "records", "chat", "cache", "streamed"])
def test_a_configuration_gives_batches(files: Path, block: dict[str, Any]) -> None:
    if block["class_path"] == "StreamedDataModule":
        pytest.importorskip("litdata")
        write_chunks(files / "my_tokens")
        write_chunks(files / "my_held_out_tokens")
    data: Any = assemble_data(block, lookahead=3, vocab_size=300)
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch["tokens"].shape == (block["init_args"]["batch_size"], block["init_args"]["window"] + 3)
        assert ("loss_mask" in batch) == ("keep_whole" in block["init_args"])
    assert (files / "tokens").is_dir() == ("cache" in block["init_args"])


def test_the_table_names_every_source() -> None:
    import mtp_modules.data

    of_table = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    exported = (getattr(mtp_modules.data, name) for name in names)
    kinds = {kind.__name__ for kind in exported if isinstance(kind, type)}
    sources = {name for name in kinds if issubclass(getattr(mtp_modules.data, name), mtp_modules.data.DocumentSource)}
    assert of_table == sources - {"DocumentSource"}
