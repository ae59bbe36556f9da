"""What comes with data runs no code, reads no other file, and takes no more memory than the file is long."""

import io
import json
import os
import pickle
import random
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import nn

from mtp_modules import LinearHeads, MTPModel, RecurrentTrunk, TransformerTrunk, load_model
from mtp_modules.core import build, describe
from mtp_modules.core.checks import InputError
from mtp_modules.core.checksums import CHECKSUMS, damaged_file
from mtp_modules.core.pickles import check_shards, load_pickle, only_weights
from mtp_modules.data import ByteTokenizer, HuggingFaceTokenizer
from mtp_modules.data.token_files import read_documents, write_documents
from mtp_modules.interop import export_model, import_model
from mtp_modules.interop.files import read_tensors
from mtp_modules.loading import CHECKPOINT_KEY, read_checkpoint
from mtp_modules.pretrained import FORMAT
from mtp_modules.training.checkpointing import check_description
from tests.interop import glm
from tests.unit.training.running import data, module, trainer

RAN = "MTP_SECURITY_TEST_RAN"
"""Environment variable that code in a file would set."""


class Runs:
    """Runs code when it is unpickled without restriction."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ['{RAN}'] = '1'",)


@pytest.fixture(autouse=True)
def _little_time_and_memory() -> Iterator[None]:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "more than a gigabyte"
    assert time.monotonic() - began < 60


def small() -> MTPModel:
    torch.manual_seed(0)
    trunk = TransformerTrunk(vocab_size=256, d_model=8, num_layers=1, num_heads=2, max_positions=32)
    return MTPModel(trunk=trunk, heads=LinearHeads(d_model=8, num_horizons=2))


def checkpoint(model: MTPModel | None = None) -> dict[str, Any]:
    model = model or small()
    described = {"format": FORMAT, "model": describe(model), "tokenizer": describe(ByteTokenizer())}
    return {CHECKPOINT_KEY: described, "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def changed(description: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**description, "init_args": {**description["init_args"], **arguments}}


# Code.


def test_a_checkpoint_cannot_name_a_module_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text(f"raise SystemExit('{RAN}')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    own = module()
    run.fit(own, data())
    run.save_checkpoint(tmp_path / "own.ckpt")
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    content[CHECKPOINT_KEY]["model"]["init_args"]["trunk"]["class_path"] = "beside.Trunk"
    sentence = "ckpt_path: the checkpoint holds a model with a 'beside.Trunk', which the configured model does not have"
    with pytest.raises(InputError, match=f"^{sentence}"):
        check_description(own, content[CHECKPOINT_KEY]["model"], "the checkpoint")
    path = saved(tmp_path / "other.ckpt", content)
    for stage in ("fit", "validate", "test", "predict"):
        again = trainer(tmp_path, max_steps=2, max_epochs=-1)
        with pytest.raises(
            InputError, match=r"^ckpt_path: model\.trunk is RecurrentTrunk here, but the checkpoint was"
        ):
            getattr(again, stage)(module(), datamodule=data(), ckpt_path=path)
    with pytest.raises(InputError, match=r"^build: class 'beside\.Trunk' is not from a trusted package"):
        load_model(path)


def test_shards_of_another_model_are_still_found() -> None:
    own = module()
    heads = describe(LinearHeads(d_model=16, num_horizons=2))
    with pytest.raises(InputError, match=r"do not fit the model: model\.heads"):
        check_description(own, changed(describe(own.model), heads=heads), "the checkpoint")
    trunk = changed(describe(RecurrentTrunk(vocab_size=9, d_model=16)), vocab_size=10**9)
    with pytest.raises(InputError, match="asks for a tensor of 16000000000 elements"):
        check_description(own, changed(describe(own.model), trunk=trunk), "the checkpoint")


NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a teacher": ("training.teacher.TeacherModel", {"ckpt_path": "/x"}, "TeacherModel: a file names '/x' as a teacher"),
    "a trunk": (
        "trunks.huggingface.HuggingFaceTrunk",
        {"pretrained": "a/b"},
        "HuggingFaceTrunk: a file names pretrained='a/b'",
    ),
    "an attention kernel": (
        "trunks.huggingface.HuggingFaceTrunk",
        {"config": {"model_type": "llama", "_attn_implementation": "a/kernel"}},
        "HuggingFaceTrunk: a file gives config._attn_implementation",
    ),
    "a backbone": (
        "trunks.huggingface.HuggingFaceTrunk",
        {"config": {"model_type": "llama", "text_config": {"name": "a/b"}}},
        "HuggingFaceTrunk: a file gives config.name='a/b'",
    ),
    "a tokenizer": (
        "data.huggingface.HuggingFaceTokenizer",
        {"pretrained": "gpt2"},
        "HuggingFaceTokenizer: a file names pretrained='gpt2'",
    ),
    "what is no component": ("core.checks.refuse", {}, "build: 'mtp_modules.core.checks.refuse' is not a component"),
    "an import": ("__main__.main", {}, "build: 'mtp_modules.__main__.main' is not a component"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_description_names_no_file_and_no_model(name: str) -> None:
    path, arguments, sentence = NAMES[name]
    inner = {"class_path": f"mtp_modules.{path}", "init_args": arguments}
    for description in (inner, changed(describe(small()), trunk=inner)):
        with pytest.raises(InputError, match=f"^{sentence}"):
            build(description)


def test_a_model_is_a_model_and_a_tokenizer_a_tokenizer(tmp_path: Path) -> None:
    content = checkpoint()
    content[CHECKPOINT_KEY]["tokenizer"] = content[CHECKPOINT_KEY]["model"]
    with pytest.raises(InputError, match="MTPModel' is not a Tokenizer"):
        load_model(saved(tmp_path / "x.ckpt", content))
    content[CHECKPOINT_KEY]["model"] = describe(ByteTokenizer())
    with pytest.raises(InputError, match="ByteTokenizer' is not a MTPModel"):
        load_model(saved(tmp_path / "x.ckpt", content))


def test_no_setting_opens_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(CheckpointIO):
        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
            return torch.load(path, weights_only=False)

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None: ...

        def remove_checkpoint(self, path: Any) -> None: ...

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    first = trainer(tmp_path, max_steps=1, max_epochs=-1)
    first.fit(module(), data())
    first.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    content = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    saved(tmp_path / "hpc_ckpt_2.ckpt", {**content, "callbacks": {"x": Runs()}})
    for plugins in ([], [Careless()]):
        with pytest.raises(InputError, match=r"names .*exec, and only tensors and plain values are loaded"):
            trainer(tmp_path, plugins=plugins).fit(module(), data(), ckpt_path="hpc", weights_only=False)
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    hidden = io.BytesIO()
    torch.save(Runs(), hidden)
    hidden.seek(0)
    with only_weights(), pytest.raises(pickle.UnpicklingError):
        torch.load(hidden, weights_only=False)
    assert RAN not in os.environ


# Pickles.


def opcodes(*code: bytes) -> bytes:
    return b"\x80\x02" + b"".join(code) + b"."


LAUGHS = b"".join((b"(K\x01K\x02tq\x00", *(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))))
AGAIN = b"".join((b"(", b"K\x01" * 200, b"tq\x00", b"ctorch\nSize\nq\x01", b"h\x01h\x00\x85R" * 50))
PICKLES: dict[str, bytes] = {
    "a size again and again": opcodes(AGAIN),
    "bytes again and again": opcodes(
        b"X\xc8\x00\x00\x00",
        b"a" * 200,
        b"q\x00X\x06\x00\x00\x00latin1q\x01c_codecs\nencode\nq\x02",
        b"h\x02h\x00h\x01\x86R" * 50,
    ),
    "bytes in a slow encoding": opcodes(b"c_codecs\nencode\n", b"X\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R"),
    "bytes": opcodes(b"cbuiltins\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x10", b"\x85R"),
    "code": opcodes(b"cos\nsystem\n", b"X\x02\x00\x00\x00id\x85R"),
    "a key that takes forever": opcodes(b"}", LAUGHS, b"K\x01s"),
    "a set that takes forever": opcodes(b"cbuiltins\nset\n]", LAUGHS, b"a\x85R"),
    "an ordered dictionary that takes forever": opcodes(b"ccollections\nOrderedDict\n]]", LAUGHS, b"aK\x01aa\x85R"),
    "a place in the memo": opcodes(b"K\x01r\xff\xff\xff\x7f"),
    "a long string": opcodes(b"X\xff\xff\xff\x7f"),
}


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
        for name, record in records.items():
            file.writestr(f"archive/data/{name}", record)
    return path


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_asks_for_more(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.ckpt", PICKLES[name])
    with pytest.raises(InputError, match=r"^ckpt_path: .*x\.ckpt "):
        read_checkpoint(path)
    path.write_bytes(PICKLES[name])
    with pytest.raises(InputError, match=r"is not a checkpoint"):
        read_checkpoint(path)
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"is from before torch 1\.6"):
        read_checkpoint(path)


def test_records_that_overlap_are_not_read_again_and_again(tmp_path: Path) -> None:
    """The list of an archive can name one record many times."""
    record, path = bytes(2**20), tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data/0", record)
        place = file.infolist()[0]
        for number in range(1, 5000):
            copy = zipfile.ZipInfo(f"archive/data/{number}")
            copy.header_offset, copy.file_size, copy.compress_size, copy.CRC = (
                0,
                place.file_size,
                place.file_size,
                place.CRC,
            )
            file.filelist.append(copy)
        file._didModify = True
    began = time.process_time()
    with pytest.raises(InputError, match="has entries that overlap"):
        read_checkpoint(path)
    assert time.process_time() - began < 2


def test_a_tensor_that_is_larger_than_its_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a tensor of the size \(1000000, 1000000\) in 4 bytes"):
        load_pickle("x", saved(tmp_path / "x.pt", {"a": torch.zeros(1).expand(10**6, 10**6)}))
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(4)})
    with zipfile.ZipFile(path) as file:
        content = {entry.partition("/")[2]: file.read(entry) for entry in file.namelist()}
    wider = content["data.pkl"].replace(b"K\x04tq", b"J\xff\xff\xff\x7ftq")
    assert wider != content["data.pkl"]
    with pytest.raises(InputError, match="holds a tensor of 8589934588 bytes in a record of 16"):
        load_pickle("x", archive(path, wider, **{"0": content["data/0"]}))
    with pytest.raises(InputError, match="has compressed entries"):
        load_pickle("x", archive(path, content["data.pkl"], zipfile.ZIP_DEFLATED, **{"0": content["data/0"]}))


def test_tensors_of_every_kind_are_loaded(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    content = {str(kind): torch.ones(3, 2).to(kind)[1:] for kind in (*kinds, torch.float8_e4m3fn, torch.uint16)}
    more = {"shape": torch.Size([1, 2]), "dtype": torch.bfloat16, "bytes": b"ab", "nested": [(1, None, 2.5, "x")]}
    more |= {"parameter": nn.Parameter(torch.ones(2)), "empty": torch.empty(0), "device": torch.device("cpu")}
    found = load_pickle("x", saved(tmp_path / "x.pt", content | more))
    assert all(found[name].dtype == tensor.dtype for name, tensor in content.items())
    assert all(torch.equal(found[name].real.float(), torch.ones(2, 2)) for name in content)
    assert {name: found[name] for name in ("shape", "dtype", "bytes", "nested")} == {
        name: more[name] for name in ("shape", "dtype", "bytes", "nested")
    }


# Shards.


def shards(folder: Path, extra: Any = 0.5) -> Path:
    dcp.save(
        {"state_dict": small().state_dict(), "lr": extra, "betas": (0.9, 0.99)}, checkpoint_id=folder, no_dist=True
    )
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards_hold_tensors_and_plain_values(tmp_path: Path) -> None:
    check_shards("ckpt_path", shards(tmp_path / "good"))
    with pytest.raises(InputError, match=r"__0_0\.distcp names .*exec"):
        check_shards("ckpt_path", shards(tmp_path / "code", Runs()))
    for content in (pickle.dumps(Runs()), b"", b"hello", *PICKLES.values()):
        (tmp_path / "good" / ".metadata").write_bytes(content)
        with pytest.raises(InputError, match=r"^ckpt_path: .*\.metadata "):
            check_shards("ckpt_path", tmp_path / "good")


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "link", "missing"])
def test_checksums_are_of_files_in_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / CHECKSUMS).write_text(f"00000000 {name}\n", encoding="utf-8")
    assert damaged_file(folder) == name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("old", "new"), [("relative_path", "../x.distcp"), ("offset", 10**15), ("offset", -5), ("length", 10**15)]
)
def test_shards_lie_in_their_folder(tmp_path: Path, old: str, new: Any) -> None:
    metadata = pickle.loads((shards(tmp_path) / ".metadata").read_bytes())
    place = next(iter(metadata.storage_data.values()))
    object.__setattr__(place, old, new)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"^ckpt_path: "):
        check_shards("ckpt_path", tmp_path)


# More than is stored.

SIZES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layers": lambda model: model["init_args"]["trunk"]["init_args"].update(num_layers=10**7),
    "width": lambda model: model["init_args"]["trunk"]["init_args"].update(d_model=10**6, vocab_size=10**6),
    "vocabulary": lambda model: model["init_args"]["trunk"]["init_args"].update(vocab_size=10**10),
    "positions": lambda model: model["init_args"]["trunk"]["init_args"].update(max_positions=10**12),
    "horizons": lambda model: model["init_args"]["heads"]["init_args"].update(num_horizons=10**9),
    "previous": lambda model: model["init_args"]["trunk"]["init_args"].update(num_previous=10**6),
    "drafts": lambda model: model["init_args"].update(num_draft_tokens=10**9),
    "an endless number": lambda model: model["init_args"]["trunk"]["init_args"].update(d_model=10**400),
    "a text": lambda model: model["init_args"]["trunk"]["init_args"].update(d_model="wide"),
    "a list": lambda model: model["init_args"].update(trunk=[1]),
    "no class": lambda model: model.update(class_path=3),
    "no arguments": lambda model: model.update(init_args=3),
    "a small step too far": lambda model: model["init_args"]["trunk"]["init_args"].update(ffn_width=10**6),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_description_asks_for_no_more_than_is_stored(name: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config, content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")), checkpoint()
    del config["weights"]  # it is no longer the one that was saved with them
    SIZES[name](config["model"])
    SIZES[name](content[CHECKPOINT_KEY]["model"])
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path, saved(tmp_path / "x.ckpt", content)):
        with pytest.raises(InputError) as refused:
            load_model(path)
        assert len(str(refused.value)) < 600


def test_a_description_is_not_nested_without_end(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    for depth in (100, 10**5):
        (tmp_path / "config.json").write_text(config.replace("32", "[" * depth + "]" * depth, 1), encoding="utf-8")
        with pytest.raises(InputError):
            load_model(tmp_path)
    content = checkpoint()
    laugh: list[Any] = [1, 2]
    for _ in range(60):
        laugh = [laugh, laugh]
    for place in (content[CHECKPOINT_KEY]["model"]["init_args"], content[CHECKPOINT_KEY]):
        place["trunk"] = laugh
        with pytest.raises(InputError, match=r"^ckpt_path: is nested deeper"):
            load_model(saved(tmp_path / "x.ckpt", content))
        del place["trunk"]


def test_tensors_without_elements_allow_no_layers(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["weights"]
    config["model"]["init_args"]["trunk"]["init_args"]["num_layers"] = 4000
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {f"empty{n}": torch.zeros(0) for n in range(5000)}, tmp_path / "model.safetensors")
    began = time.process_time()
    with pytest.raises(InputError, match="num_layers=4000"):
        load_model(tmp_path)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64])
def test_weights_that_are_no_real_numbers_are_not_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} is stored as .*, and the model has torch.float32"):
        load_model(tmp_path)


def test_a_class_path_without_end_is_a_sentence() -> None:
    with pytest.raises(InputError, match="there is no class"):
        build({"class_path": "mtp_modules." + "a." * 5000 + "b", "init_args": {}})


@pytest.mark.parametrize("places", [["x"], {"a": 3}, {"a": ["x"]}, {"a": "../x.safetensors"}, None])
def test_an_index_names_files_beside_it(tmp_path: Path, places: Any) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    with pytest.raises(InputError, match="has no weight_map that names files beside it"):
        read_tensors("format", tmp_path / "in")


def test_a_tokenizer_does_not_make_a_text_a_thousand_times_longer() -> None:
    doubles = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    usual = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    for part, many in (("normalizer", "normalizers"), ("decoder", "decoders")):
        for count, fine in ((9, True), (40, False)):
            content = json.dumps({part: {"type": "Sequence", many: [usual] * 20 + [doubles] * count}})
            if fine:
                HuggingFaceTokenizer.check_stored({"tokenizer_json": content})
            else:
                with pytest.raises(InputError, match="could make a text 1000 times longer"):
                    HuggingFaceTokenizer.check_stored({"tokenizer_json": content})


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**7), ("vocab_size", 10**10), ("max_position_embeddings", 10**12), ("hidden_size", 10**6)],
)
def test_a_foreign_configuration_asks_for_no_more_than_is_stored(name: str, value: int, tmp_path: Path) -> None:
    export_model(glm(), tmp_path / "out", format="glm")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    with pytest.raises(InputError):
        import_model(tmp_path / "out", format="glm")


@pytest.mark.parametrize(
    "index",
    [
        {"dtype": "object"},
        {"dtype": "float64"},
        {"document_starts": [0, 10**12]},
        {"document_starts": [0, "1"]},
        {"document_starts": [0, 0.5]},
        {"vocab_size": 10**12},
        {"vocab_size": "many"},
        {"document_starts": {"0": 1}},
    ],
    ids=str,
)
def test_a_token_file_is_as_long_as_its_index_says(index: dict[str, Any], tmp_path: Path) -> None:
    write_documents(tmp_path / "x.bin", [[1, 2], [3]], vocab_size=9)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | index), encoding="utf-8")
    with pytest.raises(InputError, match=r"needs x\.json beside it"):
        read_documents(tmp_path / "x.bin")


# Random damage.


def damaged(content: bytes, seed: int) -> bytes:
    rng, changed = random.Random(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(len(changed), 4000) if seed % 2 else len(changed))
        changed[place] = rng.randrange(256)
    return bytes(changed)


def files(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    small().save_pretrained(folder / "model", tokenizer=ByteTokenizer())
    export_model(glm(), folder / "glm", format="glm")
    write_documents(folder / "x.bin", [[1, 2], [3]], vocab_size=9)
    saved(folder / "x.ckpt", checkpoint())
    shards(folder / "shards")
    return {
        "checkpoint": (folder / "x.ckpt", lambda: load_model(folder / "x.ckpt")),
        "config": (folder / "model" / "config.json", lambda: load_model(folder / "model")),
        "weights": (folder / "model" / "model.safetensors", lambda: load_model(folder / "model")),
        "foreign config": (folder / "glm" / "config.json", lambda: import_model(folder / "glm", format="glm")),
        "foreign weights": (folder / "glm" / "model.safetensors", lambda: import_model(folder / "glm", format="glm")),
        "sidecar": (folder / "glm" / "mtp_modules.json", lambda: import_model(folder / "glm", format="glm")),
        "index": (folder / "x.json", lambda: read_documents(folder / "x.bin")),
        "metadata": (folder / "shards" / ".metadata", lambda: check_shards("x", folder / "shards")),
        "shard": (folder / "shards" / "__0_0.distcp", lambda: check_shards("x", folder / "shards")),
    }


KINDS = (
    "checkpoint",
    "config",
    "weights",
    "foreign config",
    "foreign weights",
    "sidecar",
    "index",
    "metadata",
    "shard",
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [*KINDS, "shard"])
def test_random_damage_is_one_sentence_or_none(kind: str, tmp_path: Path) -> None:
    path, read = files(tmp_path)[kind]
    content = path.read_bytes()
    read()
    for seed in range(40):
        path.write_bytes(damaged(content, seed))
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error).strip(), seed  # noqa: PT017


def test_safetensors_are_as_long_as_their_header_says(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for header in (b"\xff" * 8, (2**40).to_bytes(8, "little"), b"\x00" * 8):
        path.write_bytes(header + content[8:])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            load_model(tmp_path)
    path.write_bytes(content)
    tensors = load_file(path)
    save_file({**tensors, "more": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="is damaged: its description is not what was saved"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="does not fit the model"):
        load_model(tmp_path)
