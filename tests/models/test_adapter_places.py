"""Where adapters are: directories, and repos of the hub, complete or not."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from petalnode.errors import ModelError, UsageError
from petalnode.models.sources import find_source
from petalnode.models.tuning.peft_files import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_digest,
    adapter_files,
    load_adapter,
    save_adapter,
)

from .hub_server import HubServer
from .saved_adapters import KINDS, configure, matrices, message, same, save_lora
from .test_tuning import LLAMA


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a LoRA."""
    return save_lora(tmp_path)


def test_saved_again(saved: Path) -> None:
    """Over the old one; the digest tells which it is."""
    digest = adapter_digest(saved)
    assert len(digest) == 8
    int(digest, 16)
    save_adapter(saved, KINDS["lora"], LLAMA, "org/base")
    assert adapter_digest(saved) == digest
    halves = Adapter(KINDS["lora"].tuning.map(lambda tensor: tensor / 2))
    save_adapter(saved, halves, LLAMA, "org/base")
    assert adapter_digest(saved) != digest
    assert same(load_adapter(saved, LLAMA).tuning, halves.tuning)
    digest = adapter_digest(saved)
    configure(saved, lora_alpha=8)
    assert adapter_digest(saved) != digest, "the same weights, times another scale"


def test_files_that_lack(saved: Path) -> None:
    assert adapter_files(str(saved)) == saved
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    for call in (lambda: load_adapter(saved, LLAMA), lambda: adapter_files(str(saved))):
        with pytest.raises(UsageError, match=r"pickled weights \(adapter_model.bin\).*any code"):
            call()
    (saved / "adapter_model.bin").unlink()
    assert f"has no {WEIGHTS}" in message(saved)
    (saved / CONFIG).unlink()
    assert f"has no {CONFIG}" in message(saved)


PLACES = {
    "no directory": "/none/there",
    "a word": "none",
    "a relative path": "./name",
    "one further up": "../name",
    "a longer one": "./org/name",
    "three words": "a/b/c",
    "nobody's home": "~nobody-of-that-name/mine",
    "too long a name": "x" * 5000,
    "no text": "a\0b",
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_are_none(case: str) -> None:
    with pytest.raises(UsageError, match="There is no adapter '") as caught:
        adapter_files(PLACES[case])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_of_an_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A relative path looks like the name of a repo."""
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for place in (f"mine/{file}", f"./mine/{file}", f"~/mine/{file}", str(saved / file)):
        with pytest.raises(UsageError) as caught:
            adapter_files(place)
        assert caught.value.cause == f"{place!r} is a file."
        assert caught.value.remedy == f"Give the directory that holds {CONFIG} and {WEIGHTS}."


def test_a_directory_that_one_is_in(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert load_adapter(adapter_files("."), LLAMA).name == "mine"
    configure(saved, peft_type="IA3")
    assert message(Path()).startswith("The adapter mine is of the kind 'IA3'")


def test_a_directory_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    for call in (lambda: load_adapter(saved, LLAMA), lambda: adapter_files(str(saved))):
        with pytest.raises(UsageError, match="mine cannot be read: Permission denied"):
            call()


def test_a_directory_at_home(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert adapter_files("~/mine") == saved


def test_a_repo_of_the_hub(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    """Two files are fetched, whatever else is there; the second time none."""
    shutil.copy(saved / WEIGHTS, saved / "training_args.bin")
    hub.add("org/adapter", saved)
    place = adapter_files("org/adapter", tmp_path / "hub")
    assert sorted(path.name for path in place.iterdir()) == [CONFIG, WEIGHTS]
    assert same(load_adapter(place, LLAMA).tuning, matrices())
    assert adapter_digest(place) == adapter_digest(saved)
    sent = len(hub.bodies(".safetensors"))
    assert adapter_files("org/adapter", tmp_path / "hub") == place
    assert len(hub.bodies(".safetensors")) == sent == 1


def test_a_repo_of_the_hub_without_safetensors(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    hub.add("org/pickled", saved)
    with pytest.raises(UsageError, match=r"repo org/pickled has only pickled weights"):
        adapter_files("org/pickled", tmp_path / "hub")
    (saved / CONFIG).unlink()
    hub.add("org/model", saved)
    with pytest.raises(ModelError, match=rf"repo org/model lacks the file {CONFIG}"):
        adapter_files("org/model", tmp_path / "hub")


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        adapter_files("org/adapter", tmp_path / "hub")
    assert "'org/adapter'" in str(caught.value)
    assert str(caught.value).endswith("or give the directory of an adapter.")


def test_a_repo_of_the_hub_that_the_disk_has_no_room_for(
    hub: HubServer, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not begun."""
    hub.add("org/adapter", saved)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(ModelError, match="free"):
        adapter_files("org/adapter", tmp_path / "hub")
    assert not hub.bodies(".safetensors")


@pytest.mark.parametrize("place", ["~nobody-of-that-name/mine", "x" * 5000, "a\0b"])
def test_no_text_is_too_odd_for_a_model(place: str) -> None:
    with pytest.raises(ModelError, match="There is no directory") as caught:
        find_source(place, None, None)
    assert len(str(caught.value)) < 400
