"""Checks of `qllava doctor`: what this machine can do, what is missing, and how to fix it.

Every check results in one line, even if it raises an error, because the command must work on a machine with faults.
`ok` means no problem, `warn` that something optional does not work, `fail` that training cannot run.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

# Packages needed for training, in the order of their dependencies. The version bounds are in the package's metadata.
PACKAGES = (
    "torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "open_clip_torch", "accelerate", "datasets",
    "tokenizers", "sentencepiece", "protobuf", "safetensors", "gradio", "pillow", "numpy", "PyYAML", "tqdm",
)  # fmt: skip
REPAIR = "run `make env` in the clone, or `pip install -e .` in your own environment"

# Bytes for a 7B model, 14 GB in 16 bit: one download, one merge, and checkpoints.
DISK_FOR_7B = 32e9
# Browsers that the tests can drive, by their command names on different systems.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    """Name of the checked part."""
    status: Literal["ok", "warn", "fail"]
    """Status of the part."""
    detail: str
    """Result in words."""
    advice: str = ""
    """Advice if the status is not `ok`."""

    def line(self) -> str:
        """Return the result as one line for the terminal."""
        return f"{self.status:<5} {self.name:<16} {self.detail}" + (f": {self.advice}" if self.advice else "")


def examine() -> list[Check]:
    """Run all checks, in the order in which faults should be fixed; takes seconds, because torch is imported."""
    checks = [_python(), *_packages()]
    for name, look in (("device", _device), ("bf16", _bf16), ("NF4", _nf4)):
        checks.append(_guarded(name, look))
    return [*checks, _guarded("nano", _nano), _guarded("disk", _disk), _browser()]


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """Run a check; any error is a failed check too, because a corrupt driver may raise any type of error."""
    try:
        return look()
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return Check(name, "fail", f"{type(error).__name__}: {first_line}", REPAIR)


def _python() -> Check:
    # Python is at least 3.11 here: neither pip nor make installs into an older one.
    return Check("Python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _packages() -> list[Check]:
    """Compare the version of each package with the bounds of the installed qllava."""
    try:
        required = metadata.requires("qllava") or []
    except metadata.PackageNotFoundError:
        return [
            Check("qllava", "warn", "not installed, only importable from this folder", REPAIR),
            *(_package(name, {}) for name in PACKAGES),
        ]
    return [_package(name, _bounds(required)) for name in PACKAGES]


def _bounds(required: list[str]) -> dict[str, str]:
    """Return version bounds by package, from requirement lines, without those of extras."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    parsed = [Requirement(line) for line in required]
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed if r.marker is None}


def _package(name: str, bounds: dict[str, str]) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", REPAIR)
    if not bounds:
        return Check(name, "ok", found)
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    wanted = bounds.get(canonicalize_name(name), "")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(name, "warn", f"{found}, but tested with {wanted}", REPAIR)
    return Check(name, "ok", found)


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        more = f" and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
        return Check("device", "ok", f"{card.name}, {card.total_memory / 2**30:.0f} GiB{more}")
    if torch.version.cuda and shutil.which("nvidia-smi"):
        return Check(
            "device", "warn", f"an NVIDIA driver is installed, but torch (CUDA {torch.version.cuda}) cannot use it",
            "update the driver, or install the torch build that fits it",
        )  # fmt: skip
    return Check(
        "device", "ok", f"CPU with {torch.get_num_threads()} threads (enough for nano; a 7B model needs a CUDA GPU)"
    )


def _bf16() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("bf16", "ok", "not needed; on the CPU training computes in fp32")
    # bf16 emulated on older GPUs is slower than fp16, so it does not count.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("bf16", "ok", "supported by this GPU")
    return Check("bf16", "ok", "not supported by this GPU; training uses fp16 with loss scaling")


def _nf4() -> Check:
    """Compare a 4-bit layer with the product with its own dequantized weight, and check the gradient through it."""
    import torch

    with contextlib.redirect_stdout(sys.stderr):
        import bitsandbytes as bnb

        from qllava.models.nf4 import unpacked

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    layer.support_avx512bf16_for_cpu = False  # otherwise an evaluation repacks the weight and later gradients are lost
    x = torch.linspace(-1, 1, 4 * 64, device=device).reshape(4, 64).requires_grad_()
    y = layer(x)
    packed: Any = layer.weight  # a Params4bit, which its annotation does not say
    weight = unpacked(packed.data, packed.quant_state)
    y.sum().backward()
    error = (y.detach() - x.detach() @ weight.T).abs().max().item()
    if error > 1e-3 or x.grad is None:
        lost = "no gradient" if x.grad is None else f"the error of the result is {error:.1e}"
        return Check("NF4", "fail", f"a 4-bit layer gives wrong results on {device} ({lost})", REPAIR)
    return Check("NF4", "ok", f"a 4-bit layer works on {device}, forward and backward")


def _nano() -> Check:
    weights = Path(__file__).parent / "nano" / "weights"
    if not list(weights.rglob("*.safetensors")):
        return Check("nano", "fail", "its weights are missing", "install qllava again, or run recipes/build_nano.py")
    size = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file())
    return Check("nano", "ok", f"weights found, {size / 1e6:.1f} MB")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 1e9:.0f} GB free here"
    if free < 1e9:
        return Check(
            "disk", "fail", f"{free / 1e9:.1f} GB free here", "free disk space: even nano's checkpoints need 1 GB"
        )
    if free < DISK_FOR_7B:
        return Check(
            "disk",
            "warn",
            detail,
            f"enough for nano; downloading and merging a 7B model needs {DISK_FOR_7B / 1e9:.0f} GB",
        )
    return Check("disk", "ok", detail)


def _browser() -> Check:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        return Check("chromium", "warn", "not found", "only the browser tests need it; make system-deps installs it")
    return Check("chromium", "ok", found)
