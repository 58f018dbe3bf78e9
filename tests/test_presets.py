"""Presets are commands of others: each is read as the recipes read it, and what is written about it is held against it.

No model is downloaded here: the shapes of the models that presets name come with qllava.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration
from trl import SFTConfig

from benchmarks import shapes
from qllava.config import InputError
from qllava.models import ledger
from qllava.models.known import known_config
from qllava.models.lora import Lora
from qllava.models.shapes import shapes_of
from qllava.training import memory, scores
from qllava.training.options.before import look
from qllava.training.options.command import Given, read
from qllava.training.options.defaults import FINETUNE, NANO_FINETUNE, PRETRAIN
from qllava.training.options.fields import TRL
from qllava.training.settings import Settings, TrainConfig, parse
from tests.test_recipes import commands, understand

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted((ROOT / "recipes").glob("*.yaml"))
PAGE = ROOT / "docs" / "first-7b.md"
BUILT = [path for path in PRESETS if not path.stem.startswith("llava15")]
SHAPES = {
    "llava-hf/llava-1.5-7b-hf": shapes.llava_7b,
    "lmsys/vicuna-7b-v1.5": shapes.llava_7b,
    "lmsys/vicuna-13b-v1.5": shapes.llava_13b,
    "meta-llama/Llama-3.1-8B-Instruct": shapes.llama31_8b_siglip,
    "meta-llama/Llama-3.2-3B-Instruct": shapes.llama32_3b_siglip,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": shapes.smollm2_siglip,
}

each_preset = pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)


def load(path: Path, *flags: str) -> Settings:
    return parse(["--config", str(path), *flags], output_dir="runs/x", nano=NANO_FINETUNE)


def shape_of(settings: Settings) -> LlavaConfig:
    return shapes_of(settings.model).config


@each_preset
def test_a_preset_needs_no_network_for_its_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan went to the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refused)
    settings = load(path)
    found, name = shape_of(settings), settings.model.model_name_or_path or settings.model.language_model or ""
    assert found.to_dict() == SHAPES[name]().to_dict() and known_config(name) is not None


def comments(path: Path) -> str:
    """The comments of a preset as prose, so that what is broken over lines is whole."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.partition("#")[2].removeprefix(" ") for line in lines if "#" in line)


def suggestions(text: str) -> list[list[str]]:
    """The flags that a text proposes in backticks, as words."""
    return [found.split() for found in re.findall(r"`(--fit_memory[^`]*|--lora_r [^`]*)`", text)]


def samples_per_step(train: TrainConfig) -> int:
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24])
def test_there_is_one_for_every_card(gigabytes: int) -> None:
    assert [path for path in PRESETS if f"_{gigabytes}gb" in path.stem]


@each_preset
def test_a_preset_says_what_it_is_named_for(path: Path) -> None:
    settings = load(path)
    model, train = settings.model, settings.train
    assert not model.is_nano and shape_of(settings)
    assert train.fit_memory == re.findall(r"_(\d+)gb", path.stem)[0] + "GB"
    assert model.lora_alpha == 2 * model.lora_r and model.load_in_4bit
    # The user's own, by flags; and what fit_memory and the card decide.
    left_out = {"train_file", "eval_file", "image_folder", "pretrain_file", "projector", "output_dir", "template"}
    left_out |= {"tokens_per_pack", "recompute_layers", "optim", "gradient_checkpointing", "bf16", "fp16"}
    left_out |= {own.name for own in TRL if own.refused}
    assert not left_out & given(path).keys()
    assert train.activation_checkpointing, "nano's defaults are not a 7B's"
    assert (train.max_length, train.lr_scheduler_type, train.warmup_steps) == (2048, "cosine", 0.03)


@each_preset
def test_a_preset_shows_how_it_is_called(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    shown = commands(comments(path))
    assert shown and all(f"--config recipes/{path.name}" in command for command in shown)
    for command in shown:
        settings = understand(command, tmp_path)
        assert isinstance(settings, Settings)
        assert settings.train.fit_memory == load(path).train.fit_memory
        assert settings.data.train_file and settings.data.image_folder
    recipes = {command.split()[1] for command in shown}
    stages = {"pretrain": {"recipes/pretrain_projector.py"}, "finetune": {"recipes/finetune_lora.py"}}
    both = {"recipes/pretrain_projector.py", "recipes/finetune_lora.py"}
    assert recipes == stages.get(path.stem.rpartition("_")[2], both if path in BUILT else stages["finetune"])


@each_preset
def test_batches_and_rates_are_the_papers(path: Path) -> None:
    train = load(path).train
    for times, total in re.findall(r"times (\d+) = (\d+)", comments(path)):
        assert train.gradient_accumulation_steps == int(times)
        assert samples_per_step(train) == int(total)
    rates = (samples_per_step(train), train.learning_rate, train.projector_lr)
    if path.stem.endswith("_pretrain"):
        assert rates == (256, 1e-3, None)
    elif path.stem.endswith("_finetune"):
        assert rates == (128, 2e-4, 2e-5)
    elif path in BUILT:
        assert rates == (128, None, None), "a rate would hold for both stages"
    else:
        assert rates == (32, 1e-4, 2e-5)


@pytest.mark.parametrize("path", [path for path in PRESETS if path.stem.endswith("_pretrain")], ids=lambda p: p.stem)
def test_both_stages_have_the_same_parts(path: Path) -> None:
    first, second = load(path).model, load(path.with_stem(path.stem.replace("_pretrain", "_finetune"))).model
    for name in ("language_model", "vision_tower", "projector_type", "vision_feature_layer", "image_aspect"):
        assert getattr(first, name) == getattr(second, name)


@each_preset
def test_proposed_flags_can_be_given(path: Path) -> None:
    for flags in suggestions(comments(path).replace("\n", " ")):
        model = load(path, *flags).model
        assert model.lora_alpha == 2 * model.lora_r


@each_preset
def test_without_bf16_it_is_fp16(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)  # it would look for the card, and so would this:
    monkeypatch.setattr(SFTConfig, "n_gpu", 1)
    train = load(path).train
    assert train.fp16 and not train.bf16


@each_preset
def test_without_data_it_says_so(path: Path, tmp_path: Path) -> None:
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "projector.safetensors").touch()
    stage1 = path.stem.endswith("_pretrain")
    line = ["--config", str(path), "--output_dir", str(tmp_path / "run")]

    def given(*flags: str) -> Given:
        return read([*line, *flags], **(PRETRAIN if stage1 else FINETUNE).for_parsing())

    if path in BUILT and not stage1:
        with pytest.raises(InputError, match="Set projector"):
            look(given("--train_file", str(path)), stage1=False)
        line += ["--projector", str(tmp_path / "aligned")]
    with pytest.raises(InputError, match="train_file is missing"):
        look(given(), stage1=stage1)


def test_the_page_proposes_what_can_be_given() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `recipes/")]
    named = {Path(name) for row in rows for name in re.findall(r"`(recipes/\S+\.yaml)`", row)}
    assert named == {path.relative_to(ROOT) for path in PRESETS}
    for row in rows:
        (flags,) = suggestions(row)
        lora, card = re.findall(r"\| r(\d+) \| (\d+) GB \|", row)[0]
        for name in re.findall(r"`(recipes/\S+\.yaml)`", row):
            settings = load(ROOT / name)
            assert settings.train.fit_memory == f"{card}GB"
            assert name.endswith("_pretrain.yaml") or settings.model.lora_r == int(lora)
            other = load(ROOT / name, *flags)
            assert other.train.fit_memory != f"{card}GB" and other.model.lora_alpha == 2 * other.model.lora_r


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=lambda page: page.name)
def test_what_pages_name_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:recipes|docs|tests|benchmarks|demo)/[\w./-]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        inside = target.removeprefix("#")
        assert inside in headings if target != inside else (page.parent / target).is_file(), target


def parameters(config: LlavaConfig, *, whole: bool) -> int:
    """Of the LLaVA, or of its language model alone."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    parts = ledger.ledger(model)
    return sum(line.parameters for line in parts if whole or line.part in ("language model", "lm_head"))


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_on_the_page_are_those_of_the_shapes(name: str) -> None:
    row = re.findall(rf"^\| `{re.escape(name)}` \| ([\d.]+) billion \| ([\d.]+) GB \|", PAGE.read_text("utf-8"), re.M)[
        0
    ]
    count = parameters(SHAPES[name](), whole=name.startswith("llava-hf"))
    assert (float(row[0]), float(row[1])) == (round(count / 1e9, 2), round(2 * count / 1e9, 1))


def test_the_ledger_on_the_page_is_the_models() -> None:
    settings = load(ROOT / "recipes" / "llava15_7b_8gb.yaml")
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(shape_of(settings)).requires_grad_(False)
        lines = ledger.ledger(get_peft_model(model, Lora.of_settings(settings.model).peft_config()))
    rates = {"LoRA": settings.train.learning_rate or 0.0, "projector": settings.train.projector_lr or 0.0}
    shown = PAGE.read_text(encoding="utf-8")
    for line in ledger.format_ledger(lines, rates).splitlines()[2:]:
        part, count, _, trained, rate = re.split(r" {2,}", line)
        assert re.search(rf"^{part} +{count} +\S+ +{trained} +{rate}$", shown, re.M), line


def stages(path: Path) -> list[str]:
    """Which stages a preset is for."""
    named = [stage for stage in ("pretrain", "finetune") if path.stem.endswith(stage)]
    return named or (["pretrain", "finetune"] if path in BUILT else ["finetune"])


def setup_of(settings: Settings, stage: str) -> memory.Setup:
    lora = Lora.of_settings(settings.model) if stage == "finetune" else None
    return memory.setup_of(settings.train, shape_of(settings), lora, load_in_4bit=settings.model.load_in_4bit)


@pytest.mark.parametrize(
    ("path", "stage"),
    [(path, stage) for path in PRESETS for stage in stages(path)],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_every_phase_of_a_preset_fits_its_card(path: Path, stage: str) -> None:
    """With packs of max_length and all layers recomputed, which is among what fit_memory chooses from."""
    settings = load(path)
    setup = setup_of(settings, stage)
    assert setup.tokens_per_pack == settings.train.max_length and not memory.settled(settings.train)
    limit = memory.parse_bytes(str(settings.train.fit_memory))
    found = memory.plan_of(
        setup,
        memory.estimate(setup),
        limit,
        scores.asking_of(settings.train, setup.lora, held_out=scores.expects_held_out(settings)),
    )
    tuned = stage == "finetune"
    assert found.fits and found.peak_bytes <= limit, found
    assert found.estimate.parts["optimizer"] > 0 and (found.estimate.parts["LoRA"] > 0) == tuned
    assert [size > 0 for size in found.phases.values()] == [True, True, "eval_strategy" in given(path), tuned]
    if tuned:  # questions are answered, and more than one at a time
        assert found.phases["evaluation"] > found.phases["chat"] > found.estimate.resident["weights"]


def given(path: Path) -> dict[str, Any]:
    """The keys that a preset sets."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_a_card_that_is_too_small_is_found() -> None:
    """The check above can fail."""
    settings = load(ROOT / "recipes" / "vicuna_13b_12gb_finetune.yaml")
    assert memory.estimate(setup_of(settings, "finetune")).peak_bytes > memory.parse_bytes("8GB")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in PRESETS if p.stem in ("llava15_7b_8gb", "vicuna_13b_12gb_finetune")], ids=lambda path: path.stem
)
def test_what_fit_memory_chooses_stays_under_the_limit(path: Path) -> None:
    settings = load(path)
    limit = memory.parse_bytes(str(settings.train.fit_memory))
    asking = scores.asking_of(settings.train, Lora.of_settings(settings.model), held_out=True)
    fixed = memory.settled(settings.train)
    plan = memory.fit(setup_of(settings, "finetune"), limit, asking=asking, least_tokens=2048, fixed=fixed)
    assert plan.fits and plan.peak_bytes <= limit and plan.tokens_per_pack >= 2048


@pytest.mark.slow
@each_preset
def test_proposed_flags_fit_their_card(path: Path) -> None:
    page = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if f"`recipes/{path.name}`" in line]
    for flags in suggestions(comments(path).replace("\n", " ") + " ".join(page)):
        settings = load(path, *flags)
        limit = memory.parse_bytes(str(settings.train.fit_memory))
        for stage in stages(path):
            setup = setup_of(settings, stage)
            asking = scores.asking_of(settings.train, setup.lora, held_out=scores.expects_held_out(settings))
            assert memory.plan_of(setup, memory.estimate(setup), limit, asking).fits, flags
