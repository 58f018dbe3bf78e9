"""Fixtures for all tests: reference cases from outside the clone, which may be absent, and tiny runs.

Property tests draw the same examples in every run, so that a test that passed yesterday passes today. The random search
is a separate run (`make test-search`, which sets HYPOTHESIS_PROFILE); what it finds becomes an `@example`.

Tests compute on the CPU on every machine, because types, kernels and figures differ on a GPU. Tests marked `gpu` need
one and run separately (`make test-gpu`, which sets QLLAVA_TEST_GPU).

Fixtures import torch and transformers themselves: the process that only distributes the tests to others needs neither.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before torch is imported; the processes that tests start inherit it.
os.environ.update(
    {}
    if os.environ.get("QLLAVA_TEST_GPU") == "1"
    else dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
)

import pytest
from hypothesis import settings

from tests import commands, skips

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.tiny_runs import Tiny

GPU_TIER = os.environ.get("QLLAVA_TEST_GPU") == "1"

# No database, because what one run found must not change the next; no deadline, because other programs may run
# meanwhile. The blob reproduces a failure on any machine.
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("search", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


# `.ci/run` fails if a test that it expects to run is skipped.
pytest_sessionfinish, pytest_terminal_summary = skips.pytest_sessionfinish, skips.pytest_terminal_summary


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where the GPU is hidden, and all others where it is not."""
    wants = item.get_closest_marker("gpu") is not None
    if wants and not GPU_TIER:
        pytest.skip("the GPU is hidden from these tests: run `make test-gpu`")
    if GPU_TIER and not wants:
        pytest.skip("computes on the CPU: run `make test`")


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection: 600,000 objects that live as long as the tests.

    accelerate collects after every training, which took as long as the four steps of a tiny run.
    """
    gc.collect()
    gc.freeze()


CASES = Path(__file__).resolve().parent / "cases"


@pytest.fixture(scope="session")
def coco_contexts() -> Path:
    """Return the file of captions and boxes of 40 images of COCO (`tests/cases/NOTICE`)."""
    return CASES / "coco_contexts.jsonl"


@pytest.fixture(scope="session")
def reports() -> Path:
    """Return the folder of small inputs that reproduce public reports (`tests/cases/reports/README.md`)."""
    return CASES / "reports"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of reference cases from outside (`../shared/data`)."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the reference cases in ../shared/data are not on this machine")
    return folder


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Return the Llama-2 tokenizer in legacy mode, as LLaVA trained with it, with `<image>` as an added token."""
    from tests.sentencepiece_models import legacy_tokenizer

    folder = tmp_path_factory.mktemp("llama_tokenizer")
    shutil.copy(shared_data / "llama_tokenizer.model", folder / "tokenizer.model")
    return legacy_tokenizer(folder)


@pytest.fixture(scope="session")
def trained_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Return a small sentencepiece tokenizer of the same kind, trained here, because Llama's may not be copied."""
    from tests.sentencepiece_models import legacy_tokenizer, train_sentencepiece

    return legacy_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("trained_tokenizer")))


@pytest.fixture(scope="session", params=["trained", "llama"])
def sentencepiece_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Return both tokenizers in turn; tests with Llama's are skipped if `../shared` is missing."""
    found: PreTrainedTokenizerBase = request.getfixturevalue(f"{request.param}_tokenizer")
    return found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the global generators before each test, so that its random numbers do not depend on the order of tests."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # the global generator, because code under test may use it
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _commands() -> Iterator[None]:
    """Stop the process that is forked for commands, and its commands, at the end of the tests."""
    yield
    commands.end()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a cache folder for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return parts of a tiny LLaVA and runs of both stages with them, made once for all tests; do not change them."""
    from tests.tiny_runs import make_tiny_runs

    return make_tiny_runs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def hf_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random LLaVA in llava-hf's layout."""
    from tests.tiny_models import make_tiny_model, make_tiny_processor, save_llava

    folder = tmp_path_factory.mktemp("llava") / "tiny"
    processor = make_tiny_processor()
    save_llava(make_tiny_model(processor), processor, folder)
    return folder


# Without the browser's own requests: what a test sees on the network was requested by the page.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")  # not session: its event loop runs in the main thread, where no other can run meanwhile
def browser() -> Iterator[Any]:
    """Return the system's chromium, controlled by playwright; skip the test with a reason if one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed: run `make system-deps`")
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_FLAGS)
        yield instance
        instance.close()
