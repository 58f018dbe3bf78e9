"""Signals within one process: what asks for a save, what ends at once, and that the former handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from transformers import TrainerControl

from qllava.training.durable.signals import SaveAndStop, Stopped, handled
from qllava.training.main import main
from tests import commands
from tests.tiny_runs import Tiny, make_trainer


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_ends_at_once_where_nothing_is_trained(name: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert main(lambda settings: os.kill(os.getpid(), number), lambda: None) == status  # type: ignore[arg-type, return-value]
    assert f"stopped by {name}; run the same command to resume" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_asks_for_a_save_and_a_second_interrupt_is_the_kernels() -> None:
    stop, control = SaveAndStop(), TrainerControl(should_evaluate=True)
    stop.on_step_end(None, None, control)
    assert not control.should_save and not control.should_training_stop and control.should_evaluate
    with handled(stop.ask):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL
    stop.on_step_end(None, None, control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate


def test_the_end_of_its_epoch_is_not_measured() -> None:
    """Transformers asks for that once more when it has left the epoch."""
    stop, control = SaveAndStop(), TrainerControl(should_evaluate=True, should_save=True, should_training_stop=True)
    stop.name = "SIGTERM"  # came after the last step: the other processes do not know of it
    stop.on_epoch_end(None, None, control)
    assert control.should_evaluate and control.should_save
    stop.on_step_end(None, None, control)
    control.should_evaluate = control.should_save = True
    stop.on_epoch_end(None, None, control)
    assert not control.should_evaluate and not control.should_save


def test_another_thread_is_let_alone() -> None:
    kept = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        with handled():
            assert signal.getsignal(signal.SIGTERM) is kept

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_says_where_it_stopped() -> None:
    assert str(Stopped("SIGUSR1", 7)) == "saved at step 7 and stopped by SIGUSR1; run the same command to resume."


WORKERS = """
import subprocess
from torch.utils.data import DataLoader
from qllava.training.durable.signals import leave_to_main
batches = iter(DataLoader(range(40), num_workers=2, worker_init_fn=leave_to_main, persistent_workers=True))
seen = [next(batches), next(batches)]
subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in batches._workers)], check=True)
subprocess.run(["kill", "-INT", *(str(worker.pid) for worker in batches._workers)], check=True)
print(len(seen + list(batches)))
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nobody says here who sent a signal")
def test_workers_leave_signals_to_the_main_process_and_end_with_it() -> None:
    """The loader is alive at the end, as after an error: the main process then ends its workers, and waits for them."""
    done = commands.run("-c", WORKERS, timeout=120)
    assert (done.returncode, done.stdout) == (0, "40\n"), done.stderr


def test_both_loaders_have_such_workers(tiny: Tiny, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, tmp_path, dataloader_num_workers=2, per_device_eval_batch_size=2)
    trainer.eval_dataset = trainer.train_dataset
    for batches in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        started = iter(getattr(batches, "base_dataloader", batches))
        first = [next(started), next(started)]  # one of each worker: both have begun
        subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in started._workers)], check=True)
        assert len(first + list(started)) == len(batches) > 2
