"""Damaged adapter files: each one clear sentence, and nothing is loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from toys import Toy, adapted, config, inputs, train

from loratlas import AtlasLoraConfig, UserError
from loratlas.analysis.adapter_folder import read_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = adapted("lora", r=2)
    train(model, inputs(), steps=3)
    model.save_pretrained(tmp_path)
    return tmp_path


def damaged(content: bytes, count: int, header_only: bool = False) -> Iterator[tuple[str, bytes]]:
    """`count` variants of a file, in turn cut short and with one flipped bit."""
    chance = random.Random(0)
    end = 8 + int.from_bytes(content[:8], "little") if header_only else len(content)
    for number in range(count):
        place = chance.randrange(end)
        if number % 2 and not header_only:
            yield f"cut at {place}", content[:place]
        else:
            yield (
                f"bit flipped in byte {place}",
                (content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]),
            )


def load(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(Toy(), folder)


def test_a_thousand_damaged_files_are_a_thousand_sentences(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for number, (how, bad) in enumerate(damaged(content, 1000)):
        file.write_bytes(bad)
        reader: Callable[[Path], object] = read_adapter if number % 4 > 1 else load
        with pytest.raises(UserError) as refused:
            reader(folder)
        assert str(file) in str(refused.value), how
        assert "save or copy the adapter again" in str(refused.value), how
        assert "\n" not in str(refused.value), how
    file.write_bytes(content)
    load(folder)


def test_headers_are_checked_where_there_is_no_checksum(folder: Path) -> None:
    forget_checksum(folder)
    file = folder / "adapter_model.safetensors"
    content, loaded, refused = file.read_bytes(), 0, []
    for _, bad in damaged(content, 400, header_only=True):
        file.write_bytes(bad)
        for reader in (read_adapter, load):
            try:
                reader(folder)
                loaded += 1  # a flipped dtype of the same width, or a bit of the metadata
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 5 * loaded
    assert not any("\n" in sentence for sentence in refused)


def forget_checksum(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert len(settings.pop("tensors_sha256")) == 64
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_a_file_changed_on_purpose_loads_without_its_checksum(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\0\0"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"if you changed the file on purpose, remove tensors_sha256 from adapter_conf"):
        load(folder)
    forget_checksum(folder)
    load(folder)


def test_the_checksum_is_of_the_file_that_lies_beside(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    assert model.peft_config["default"].tensors_sha256 is None
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    model.save_pretrained(folder)
    load(folder)
    # saved alone, as transformers saves it before it writes the tensors: the file there may be about to be replaced
    config("lora", r=2).save_pretrained(str(folder))
    assert json.loads((folder / "adapter_config.json").read_text())["tensors_sha256"] is None
    (folder / "adapter_model.safetensors").unlink()
    assert AtlasLoraConfig.from_pretrained(str(folder)).r == 2
    with pytest.raises(UserError, match="has a config but no tensors"):
        read_adapter(folder)
