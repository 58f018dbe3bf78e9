"""Models of the hub, from a stand-in on this machine: safetensors wherever they are, and one sentence where not."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qllava.config import InputError
from qllava.models import convert, hub, layouts
from qllava.models.adapter import load_projector, projector_state
from qllava.models.assemble import assemble, load_language_model
from qllava.models.checkpoint import load_config, load_llava
from qllava.models.decided import decided_by
from qllava.models.language import load_tokenizer
from qllava.models.layouts import find_weights
from qllava.models.reading import read_model
from qllava.models.weights import language_model_name, open_weights
from qllava.training.options.before import look
from qllava.training.options.command import read as read_command
from qllava.training.plan import plan
from tests.hub_stand_in import Repository, StandIn, stand_in
from tests.tiny_models import make_tiny_parts
from tests.tiny_runs import Tiny, flags, refusal

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny parts, without runs over them."""
    folder = tmp_path_factory.mktemp("parts")
    return Tiny(*make_tiny_parts(folder), folder / "rows.json", folder / "stage1", folder / "stage2")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[StandIn]:
    """A hub with nothing on it yet."""
    with stand_in(tmp_path / "cache") as serving:
        yield serving


def copy(source: Path, out: Path, *changes: Change) -> Path:
    """A copy of a model that was changed."""
    shutil.copytree(source, out)
    for change in changes:
        change(out)
    return out


def pickled(folder: Path) -> None:
    """Leave a pickle only."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def split(folder: Path) -> list[dict[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    return [{name: tensors[name] for name in half} for half in (names[: len(names) // 2], names[len(names) // 2 :])]


def pickled_in_shards(folder: Path) -> None:
    """Two pickles and their index, as Vicuna has them."""
    where = {}
    for number, tensors in enumerate(split(folder), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def in_shards(begin: str, *, index: str | None) -> Change:
    """Two safetensors of such a name, and an index where it has a name."""

    def change(folder: Path) -> None:
        where = {}
        for number, tensors in enumerate(split(folder), start=1):
            file = f"{begin}-0000{number}-of-00002.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
        if index:
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return change


def called(file: str) -> Change:
    """The weights under another name."""
    return lambda folder: (folder / "model.safetensors").rename(folder / file) and None


NAMES: dict[str, Change] = {
    "as transformers names them": lambda _: None,
    "in shards": in_shards("model", index="model.safetensors.index.json"),
    "in shards without an index": in_shards("model", index=None),
    "in shards of another name": in_shards("vicuna", index="vicuna.safetensors.index.json"),
    "by the name of the pickle": called("pytorch_model.safetensors"),
    "by a name of their own": called("vicuna-7b.safetensors"),
}


def same_language_model(name: str, tiny: Tiny) -> None:
    """Tokenizer, tensors and the loaded model are those of the tiny one."""
    expected = load_file(tiny.language_model / "model.safetensors")
    weights = open_weights(name, lambda own: own)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
    tokenizer = load_tokenizer(name)
    assert tokenizer.get_vocab() == load_tokenizer(str(tiny.language_model)).get_vocab()
    model = load_language_model(name, torch.float32, "cpu", four_bit=False, tokens=len(tokenizer))
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_links_that_another_process_made_meanwhile_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be read already; and links to weights that have changed since are replaced."""
    weights = tmp_path / "m"
    weights.mkdir()
    save_file({"a": torch.zeros(1)}, weights / "other.safetensors")
    found, own = find_weights(["other.safetensors"], "m"), layouts.tensor_names
    assert found is not None
    made: list[tuple[Path, int]] = []

    def names(path: Path) -> list[str]:
        monkeypatch.setattr(layouts, "tensor_names", own)
        place = layouts.arrange(found, weights, weights, tmp_path / "cache", known_as="x")
        made.append((place, place.stat().st_ino))
        return own(path)

    for value in (1, 2):
        monkeypatch.setattr(layouts, "tensor_names", names)
        out = layouts.arrange(found, weights, weights, tmp_path / "cache", known_as="x")
        assert made[-1] == (out, out.stat().st_ino)
        assert load_file(out / "model.safetensors").keys() == load_file(weights / "other.safetensors").keys()
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]
        save_file({"a": torch.zeros(1), f"b{value}": torch.zeros(1)}, weights / "other.safetensors")
    assert len({inode for _, inode in made}) == 2


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("where", ["a folder", "the hub"])
def test_safetensors_under_any_name(kind: str, where: str, tiny: Tiny, served: StandIn, tmp_path: Path) -> None:
    folder = copy(tiny.language_model, tmp_path / "m", NAMES[kind])
    served.models["some/llama"] = Repository(folder)
    before = sorted(folder.iterdir())
    same_language_model("some/llama" if where == "the hub" else str(folder), tiny)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("kind", NAMES)
def test_a_llava_and_its_tower_under_any_name(kind: str, tiny: Tiny, hf_layout: Path, tmp_path: Path) -> None:
    llava = copy(hf_layout, tmp_path / "llava", NAMES[kind])
    model, _ = load_llava(str(llava), dtype=torch.float32)
    expected, _ = load_llava(str(hf_layout), dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    tower = copy(tiny.tower, tmp_path / "tower", NAMES[kind])
    assembled = assemble(tiny.recipe(vision_tower=str(tower)))
    assert assembled.recipe.fingerprint == assemble(tiny.recipe()).recipe.fingerprint


@pytest.mark.parametrize("pickles", [pickled, pickled_in_shards])
@pytest.mark.parametrize("shards", [False, True])
def test_the_conversion_of_the_hubs_bot_is_taken(
    pickles: Change, shards: bool, tiny: Tiny, served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `lmsys/vicuna-7b-v1.5` lies on the hub: pickles on main, safetensors in a pull request."""
    main = copy(tiny.language_model, tmp_path / "main", pickles)
    offered = copy(main, tmp_path / "offered")
    shutil.copy(tiny.language_model / "model.safetensors", offered)
    if shards:
        in_shards("model", index="model.safetensors.index.json")(offered)
    config = json.loads((main / "config.json").read_text())
    (main / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))  # corrected since
    served.models["lmsys/vicuna"] = Repository(main, {3: ("SFconvertbot", offered, "open")})

    same_language_model("lmsys/vicuna", tiny)

    loaded = load_language_model("lmsys/vicuna", torch.float32, "cpu", four_bit=False, tokens=8)
    assert loaded.config.rms_norm_eps == 0.5  # everything but the weights is main's
    assert not any("pytorch_model" in path and "index" not in path for path in served.asked if "/resolve/" in path)
    # And again without a network.
    served.models.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same_language_model("lmsys/vicuna", tiny)


@pytest.mark.parametrize("fault", ["of somebody else", "of other pickles", "closed"])
def test_a_conversion_that_may_be_anything_is_not_taken(
    fault: str, tiny: Tiny, served: StandIn, tmp_path: Path
) -> None:
    main = copy(tiny.language_model, tmp_path / "main", pickled)
    offered = copy(main, tmp_path / "offered")
    shutil.copy(tiny.language_model / "model.safetensors", offered)
    if fault == "of other pickles":
        (offered / "pytorch_model.bin").write_bytes(b"others")
    author = "mallory" if fault == "of somebody else" else hub.BOT
    served.models["lmsys/vicuna"] = Repository(main, {3: (author, offered, "closed" if fault == "closed" else "open")})
    with pytest.raises(InputError, match="only pickled weights"):
        open_weights("lmsys/vicuna")


def command(sentence: str) -> list[str]:
    """The arguments of the command that a sentence names."""
    found = re.search(r"python -m qllava\.models\.convert (.+?) \(it reads", sentence)
    assert found, sentence
    return shlex.split(found[1])


@pytest.mark.parametrize("pickles", [pickled, pickled_in_shards])
@pytest.mark.parametrize("where", ["a folder", "the hub"])
def test_where_there_are_only_pickles_the_sentence_has_a_command_that_works(
    pickles: Change, where: str, tiny: Tiny, served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy(tiny.language_model, tmp_path / "my llama", pickles)
    served.models["lmsys/vicuna"] = Repository(folder)
    name = "lmsys/vicuna" if where == "the hub" else str(folder)
    with pytest.raises(InputError) as error:
        load_language_model(name, torch.float32, "cpu", four_bit=False, tokens=8)
    arguments = command(refusal(error.value))

    assert convert.main(arguments) == 0

    same_language_model(arguments[1], tiny)
    assert not list(Path(arguments[1]).glob("*.bin*"))
    assert convert.main(arguments) == 1  # the folder has something in it now


def test_tied_tensors_are_converted(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    shared = torch.ones(3, 2)
    torch.save({"state_dict": {"a": shared, "b": shared}}, tmp_path / "m" / "weights.pt")
    convert.convert(str(tmp_path / "m"), tmp_path / "out")
    assert {key: t.tolist() for key, t in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        "a": shared.tolist(),
        "b": shared.tolist(),
    }


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("content", ["code", "a number", "a list", "settings alone", "no file"])
def test_what_is_no_tensor_is_not_converted(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    held: dict[str, Any] = {"code": {"a": Bomb(tmp_path / "ran")}, "a number": {"a": 1}, "a list": [torch.ones(1)]}
    if content == "settings alone":
        (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    elif content in held:
        torch.save(held[content], tmp_path / "m" / "pytorch_model.bin")
    assert convert.main([str(tmp_path / "m"), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    other = {"settings alone": "no pickled weights", "no file": "is empty"}
    assert said.count("\n") == 1 and other.get(content, "cannot be converted") in said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_every_sentence_of_a_model_that_cannot_be_had(
    tiny: Tiny, hf_layout: Path, served: StandIn, tmp_path: Path
) -> None:
    """Gated and missing, for everything that is read of a model, with what to do."""
    served.models["meta/gated"] = Repository(copy(tiny.language_model, tmp_path / "m", pickled), gated=True)
    readers: list[Callable[[str], Any]] = [
        load_tokenizer,
        open_weights,
        read_model,
        load_config,
        lambda name: load_language_model(name, torch.float32, "cpu", four_bit=False, tokens=8),
        lambda name: load_llava(name, dtype=torch.float32),
        lambda name: plan(model=name),
        lambda name: plan(language_model=name, vision_tower=str(tiny.tower)),
        lambda name: convert.convert(name, tmp_path / "out"),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"^meta/gated is gated. Accept its licence on http.*hf auth login"):
            read("meta/gated")
        with pytest.raises(
            InputError, match=r"^The folder no/such does not exist, and the hub has no model.*Correct the name"
        ):
            read("no/such")


def test_offline_and_what_is_in_the_cache(
    tiny: Tiny, served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.models["some/llama"] = Repository(tiny.language_model)
    served.models["only/read"] = Repository(copy(tiny.language_model, tmp_path / "other"))
    same_language_model("some/llama", tiny)
    load_tokenizer("only/read")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(served.asked)
    same_language_model("some/llama", tiny)
    load_tokenizer("only/read")  # enough of it is there
    for name in ("only/read", "never/seen"):
        with pytest.raises(
            InputError, match=rf"^{name} is not .*in the hub's cache, .*HF_HUB_OFFLINE.*hf download {name}$"
        ):
            open_weights(name)
    assert len(served.asked) == asked


def test_some_shards_in_the_cache_are_no_model(
    tiny: Tiny, served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(tiny.language_model, tmp_path / "m", in_shards("model", index=None))
    served.models["some/llama"] = Repository(folder)
    open_weights("some/llama")
    (hub.settings_folder("some/llama") / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="some/llama is not a folder, is not completely in the hub's cache"):
        open_weights("some/llama")


def test_what_a_ready_llava_decides_is_known_before_its_weights_are_fetched(served: StandIn, hf_layout: Path) -> None:
    """A run looks at its data first, and a 7B is a download of 14 GB."""
    served.models["some/llava"] = Repository(hf_layout)
    assert decided_by("some/llava") == decided_by(str(hf_layout))
    assert not [path for path in served.asked if path.endswith(".safetensors")]
    load_config("some/llava")
    assert [path for path in served.asked if path.endswith(".safetensors")]


def test_no_network(tiny: Tiny, served: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    served.models["some/llama"] = Repository(tiny.language_model)
    same_language_model("some/llama", tiny)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    same_language_model("some/llama", tiny)
    with pytest.raises(
        InputError, match=r"^never/seen is not a folder, is not in the hub's cache, and http://127\.0\.0\.1:9 cannot"
    ):
        open_weights("never/seen")


def test_a_download_that_breaks_off_and_goes_on(
    tiny: Tiny, served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.models["some/llama"] = Repository(tiny.language_model, cut="model.safetensors")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its own trials
    with pytest.raises(InputError, match=r"^The download of some/llama was interrupted .*Run the command again"):
        open_weights("some/llama")
    served.models["some/llama"].cut = ""
    same_language_model("some/llama", tiny)


def test_a_full_disk(tiny: Tiny, served: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    served.models["some/llama"] = Repository(tiny.language_model)
    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(InputError, match=r"^some/llama does not fit on the disk .*HF_HOME"):
        open_weights("some/llama")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json"], None),
        (["adapter_model.safetensors", "projector.safetensors"], None),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "model-00002-of-00003.safetensors is missing",
        ),
        (["a.safetensors", "b.safetensors"], "several weight files and no index (a.safetensors, b.safetensors)"),
        (["a-00001-of-00001.safetensors", "b.safetensors"], "several weight files"),
    ],
)
def test_weights_that_are_missing_or_unclear(files: list[str], said: str | None) -> None:
    if said is None:
        assert find_weights(files, "m") is None
        return
    with pytest.raises(InputError) as error:
        find_weights(files, "m")
    assert said in refusal(error.value)


class TestLlavasOwnLayout:
    """Folders and repositories that LLaVA's own code wrote."""

    CONFIGS = (
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"},
        {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"},
    )

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("where", ["a folder", "the hub"])
    def test_is_recognized_before_anything_is_downloaded(
        self, config: dict[str, Any], where: str, served: StandIn, tmp_path: Path
    ) -> None:
        folder = tmp_path / "llava-v1.5-13b"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        served.models["liuhaotian/llava-v1.5-13b"] = Repository(folder)
        name = str(folder) if where == "a folder" else "liuhaotian/llava-v1.5-13b"
        reads: list[Callable[[], Any]] = [
            lambda: load_llava(name, dtype=torch.float32),
            lambda: read_model(name),
            lambda: plan(model=name),
            lambda: load_tokenizer(name),
            lambda: open_weights(name, language_model_name),
        ]
        for read in reads:
            with pytest.raises(InputError) as error:
                read()
            said = refusal(error.value)
            assert "layout of LLaVA's own code" in said and "llava-hf/llava-1.5-13b-hf" in said
            assert "convert_llava_weights_to_hf.py" in said
        assert not any("pytorch_model.bin" in path for path in served.asked)

    def test_a_lora(self, tmp_path: Path) -> None:
        (tmp_path / "non_lora_trainables.bin").write_bytes(b"a pickle")
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(InputError, match=r"a LoRA of LLaVA's own code .*merge_lora_weights\.py"):
            load_llava(str(tmp_path), dtype=torch.float32)

    def test_a_projector_is_converted_and_taken(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = assemble(tiny.recipe(), seed=5).model
        state = projector_state(model)
        layers = {"linear_1": "0", "linear_2": "2"}
        theirs = {f"model.mm_projector.{layers[k[:8]]}.{k[9:]}": tensor.half() for k, tensor in state.items()}
        (tmp_path / "stage1").mkdir()
        torch.save(theirs, tmp_path / "stage1" / "mm_projector.bin")
        with pytest.raises(InputError) as early:  # a recipe looks before it imports torch
            look(read_command(flags(tiny, projector=tmp_path / "stage1"), output_dir="run", nano={}), stage1=False)
        with pytest.raises(InputError) as error:
            load_projector(model, tmp_path / "stage1")
        assert refusal(error.value).endswith(refusal(early.value).partition("; ")[2])
        found = re.search(r"python -m qllava\.models\.convert ([^)]+)\)", refusal(error.value))
        assert found
        arguments = shlex.split(found[1])
        assert convert.main(arguments) == 0
        other = assemble(tiny.recipe(), seed=6).model
        load_projector(other, Path(arguments[1]))
        assert all(torch.equal(tensor, state[k].half().float()) for k, tensor in projector_state(other).items())


def test_the_command_is_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "--help"])
    with pytest.raises(SystemExit):
        convert.main()
    assert "python -m qllava.models.convert" in capsys.readouterr().out
