"""The fingerprint of a model: what changes answers changes it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from qllava.inference import Chat, fingerprint_of, load
from tests.tiny_models import make_tiny_llava, make_tiny_model, make_tiny_processor


def test_what_changes_answers_changes_it() -> None:
    processor = make_tiny_processor()
    chat = Chat(make_tiny_model(processor), processor, "one")
    first = fingerprint_of(chat)
    assert fingerprint_of(Chat(make_tiny_model(processor), make_tiny_processor(), "another name")) == first
    found = {first, fingerprint_of(Chat(make_tiny_model(processor, seed=1), processor, "one"))}
    found.add(fingerprint_of(Chat(make_tiny_model(processor).bfloat16(), processor, "one")))
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(make_tiny_model(processor), lora).eval()
    found.add(fingerprint_of(Chat(adapted, processor, "one")))
    with torch.no_grad():  # another step of training
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(1.001)
    found.add(fingerprint_of(Chat(adapted, processor, "one")))
    other = make_tiny_processor()
    other.chat_template = "{{ messages }}"
    found.add(fingerprint_of(Chat(make_tiny_model(processor), other, "one")))
    other = make_tiny_processor()
    other.image_processor.do_pad = False
    found.add(fingerprint_of(Chat(make_tiny_model(processor), other, "one")))
    model = make_tiny_model(processor)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, 70]
    found.add(fingerprint_of(Chat(model, processor, "one")))
    assert len(found) == 8


def test_a_folder_that_was_copied_has_the_same(tmp_path: Path) -> None:
    one, other = (load(str(make_tiny_llava(tmp_path / name))) for name in ("one", "other"))
    assert fingerprint_of(one) == fingerprint_of(other)
